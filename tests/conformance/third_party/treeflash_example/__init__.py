"""A treeflash backend in plain NumPy, written against the public interfaces alone."""
