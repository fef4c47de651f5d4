"""Stores in other forms: a module for each format, all of them read and written in one way.

`rows.Rows` is a store to be: a `Layout`, and blocks of rows. Stores (`store`) are such, and files
that `sail convert` wrote; `taken` makes them of the arrays of anyone else's files. One writer
(`store.write_store`) makes a store of them. What is not yet whole is kept by `unfinished`.
"""
