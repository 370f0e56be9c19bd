"""What `python -m treeflash.chat` runs: the command `treeflash chat`."""

from treeflash.__main__ import run

if __name__ == "__main__":
    run("chat")
