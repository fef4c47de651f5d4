"""Stage one: encoders fill the columns of the stores, here or on a Dask cluster."""
