"""The run file, the run folder, and the stages: what runs when."""
