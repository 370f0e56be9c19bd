"""What `python -m treeflash.convert` runs: the command `treeflash convert`."""

from treeflash.__main__ import run

if __name__ == "__main__":
    run("convert")
