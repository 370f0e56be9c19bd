"""What `python -m treeflash.doctor` runs: the command `treeflash doctor`."""

from treeflash.__main__ import run

if __name__ == "__main__":
    run("doctor")
