"""Commands of `sail`, by what they are for: their options alone. `pipeline.cli` has the rest."""
