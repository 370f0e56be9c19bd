"""What `python -m treeflash.launch` runs: the command `treeflash launch`."""

from treeflash.__main__ import run

if __name__ == "__main__":
    run("launch")
