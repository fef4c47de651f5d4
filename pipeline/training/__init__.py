"""Stage two: a head is trained on the stores, or many (`sail sweep`), and handed on."""
