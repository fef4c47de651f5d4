"""Measures over cached features, and the report that shows them."""
