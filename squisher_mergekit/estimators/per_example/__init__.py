"""Squared gradients of single examples: one rule for each type of layer, and their verification."""
