"""Rows and files as vectors in the space that both sides share, and search among them."""
