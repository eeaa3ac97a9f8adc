"""Fisher of a saved model from a dataset: rows, batches, model loading, resume."""
