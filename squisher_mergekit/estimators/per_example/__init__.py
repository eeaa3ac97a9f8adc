"""Squared per-example gradients: one rule for each layer type, and their verification."""
