"""The commands of `sail`: their options, checked and handed to where the work is done."""
