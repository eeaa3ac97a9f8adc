"""Diagonal Fishers: mapping, metadata, files, compact forms, comparison, Hub. The manual is README.md."""
