"""Copies between host memory and a GPU, and work on a second stream of it."""
