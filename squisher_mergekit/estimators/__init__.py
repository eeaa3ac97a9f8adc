"""From a model and data to a diagonal Fisher.

``labels`` turns a model's outputs into the gradients at its logits, one column for each draw or class; ``capture``
runs one forward and one backward pass that forms no weight gradient, and keeps each module's input and the gradient at
its output; ``rules`` makes of these, one rule a layer type, the squared gradient of every example; ``estimate`` adds
them up over the data.
"""
