"""What `python -m treeflash.distill` runs: the command `treeflash distill`."""

from treeflash.__main__ import run

if __name__ == "__main__":
    run("distill")
