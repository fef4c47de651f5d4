"""Stores made of stores: of another type, merged, chosen from, cut in other chunks."""
