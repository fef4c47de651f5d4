"""Stores in other forms: a module for each format, all of them read and written in one way.

`blocks.Rows` describes a store before it is written: a `Layout`, and blocks of rows. A store
(`writer`) is read as one, and so is a file that `sail convert` wrote; `mapping` makes one of the
arrays of other programs' files. `writer.write_store` writes the store. `resumable` keeps what is
not yet whole.
"""
