"""What is looked at before anything is spent: `sail plan` and `sail doctor`."""
