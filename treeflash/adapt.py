"""What `python -m treeflash.adapt` runs: the command `treeflash adapt`."""

from treeflash.__main__ import run

if __name__ == "__main__":
    run("adapt")
