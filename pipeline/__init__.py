"""The command line, the run file, and what runs when."""
