"""`sail explore`: a page over a run, served on this machine."""
