"""What `python -m treeflash.evaluate` runs: the command `treeflash evaluate`."""

from treeflash.__main__ import run

if __name__ == "__main__":
    run("evaluate")
