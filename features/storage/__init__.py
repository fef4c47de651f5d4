"""Files on local disk and under URLs, behind a few operations.

`place` says what a path setting names, `files` reads and writes it, `patterns` finds files by name.
"""
