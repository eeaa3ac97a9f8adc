"""Factors over rows and columns of matrices, beside the diagonal of a portable Fisher."""
