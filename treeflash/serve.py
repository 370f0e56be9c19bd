"""What `python -m treeflash.serve` runs: the command `treeflash serve`."""

from treeflash.__main__ import run

if __name__ == "__main__":
    run("serve")
