"""Fishers of merged weights, lifted from the second moments of a LoRA."""
