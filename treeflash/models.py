"""What `python -m treeflash.models` runs: the command `treeflash models`."""

from treeflash.__main__ import run

if __name__ == "__main__":
    run("models")
