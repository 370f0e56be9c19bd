"""The checks behind `treeflash doctor`."""
