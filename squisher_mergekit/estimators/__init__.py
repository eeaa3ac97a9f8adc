"""Diagonal Fishers from a model and data.

One call of :func:`~squisher_mergekit.estimate_fisher` walks through the modules in this order:

1. ``estimate``: the public function; a loop over the batches.
2. ``accumulator``: the running sums of squared gradients, over batches and processes.
3. ``tasks``: the forward pass of a batch; its outputs and targets.
4. ``output_gradients``: the gradients of the log-likelihood at the outputs, one for each label.
5. ``per_example.tape``: the calls of every layer in that forward pass, and the gradient at the output of each.
6. ``per_example.accumulate``: the squared per-example gradients of a batch, by the rule of each layer. ``layer_kinds``
   names the rule; ``linear_embedding``, ``convolution`` and ``rules`` have the rules; ``t5_bias`` adapts T5.
7. ``per_example.verify``: the comparison with a loop over single examples, at the first batches.
8. ``accumulator`` again: a :class:`~squisher_mergekit.Fisher` under the names on disk, from ``models.parameters`` and
   ``models.convert``.

``dataset`` is the command ``squisher estimate``: ``rows`` reads a file, ``batches`` tokenizes, ``load_model`` loads,
``resume`` checkpoints, ``run`` calls them.
"""
