"""What else a diagonal Fisher is good for: pruning, FISH masks, task embeddings, and not forgetting."""
