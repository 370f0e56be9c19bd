"""The checks of `treeflash.doctor`."""
