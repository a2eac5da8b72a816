"""A whole data set: one row a sample, on disk as Parquet, resumable, shared over processes."""
