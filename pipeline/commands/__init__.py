"""Commands of `sail`, by what they are for: their options alone. The work is done elsewhere."""
