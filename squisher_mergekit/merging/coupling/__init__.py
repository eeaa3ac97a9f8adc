"""Merges with curvature beyond the diagonal: factors over the rows and columns of matrices."""
