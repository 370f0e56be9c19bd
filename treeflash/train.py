"""What `python -m treeflash.train` runs: the command `treeflash train`."""

from treeflash.__main__ import run

if __name__ == "__main__":
    run("train")
