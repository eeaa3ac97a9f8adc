"""Applications of a diagonal Fisher: pruning, FISH masks, task embeddings, and elastic weight consolidation.

``scores`` rates weights, ``selection`` keeps the largest scores of a whole model, ``masks`` stores the result.
"""
