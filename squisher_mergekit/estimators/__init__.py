"""Diagonal Fishers from a model and data.

The model of :func:`~squisher_mergekit.estimate_fisher` passes through these functions, in this order:

1. ``estimate.estimate_fisher``: the public function; a loop over the batches.
2. ``accumulator.FisherAccumulator``: zero accumulators; ``models.parameters`` removes wrappers and returns names.
3. ``accumulator.FisherAccumulator.add``, for each batch; ``tasks.infer_task`` decides on the task.
4. ``per_example.verify.verify``, at the first batch: steps 5 to 7, compared with a loop over single examples.
5. ``per_example.verify.TapedModel.run``: ``per_example.tape.taped`` records the calls of every layer while
   ``tasks.run_model`` runs the model.
6. ``output_gradients``: the gradients of the log-likelihood at the outputs, one for each label.
7. ``per_example.accumulate.accumulate_batch``: a backward pass to the layer outputs, and the rule of each layer.
   ``layer_kinds`` names the rule; ``linear_embedding``, ``convolution`` and ``rules`` have them; ``t5_bias`` adapts T5.
8. ``accumulator.FisherAccumulator.fisher``: the accumulators under the names on disk, by ``models.parameters`` and
   ``models.convert``.

``dataset`` is the command ``squisher estimate``: ``rows`` reads a file, ``batches`` tokenizes, ``load_model`` loads,
``resume`` writes checkpoints, and ``run`` calls them.
"""
