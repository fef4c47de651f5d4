"""Stage three: a trained head is measured, reported, checked and compared."""
