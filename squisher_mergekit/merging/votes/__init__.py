"""Votes of the models on an entry: the options of a merge that decide who votes, with which weight, and how far."""
