"""A Fisher from a dataset on disk: rows, batches, model loading, resume."""
