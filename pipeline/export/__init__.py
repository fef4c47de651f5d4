"""A trained run in the forms that other programs open: `sail export`."""
