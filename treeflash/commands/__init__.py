"""The commands of `treeflash`: each module parses a command line, calls and prints."""
