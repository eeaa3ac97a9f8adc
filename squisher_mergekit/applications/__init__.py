"""What else a diagonal Fisher is good for: pruning, FISH masks, task embeddings, and not forgetting.

``weights`` reads and rewrites a model on disk tensor by tensor, ``scores`` says how much each weight matters,
``choosing`` takes the largest of a whole model, ``roles`` tells embeddings, norms, biases and the output layer,
``masks`` keeps what was chosen.
"""
