"""What `python -m treeflash.generate` runs: the command `treeflash generate`."""

from treeflash.__main__ import run

if __name__ == "__main__":
    run("generate")
