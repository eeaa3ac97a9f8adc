"""Models of a merge that are a base with a LoRA: their files, and F of the weights that the LoRA left alone."""
