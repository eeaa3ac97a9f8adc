"""From a training run's optimizer state to a Fisher with names.

``source`` of ``load_fisher`` walks through these modules, each visited once:

1. ``load.load_fisher`` opens a portable Fisher, or asks for the layout of an optimizer's state.
2. ``checkpoints/layouts`` finds the layout; the layout's module (``torch_save`` for a Trainer) reads a ``RawState``.
3. ``build.build_fisher`` passes it through the stages below, in this order, and returns the Fisher.
4. ``slots`` parses the state into slots; ``second_moments`` and ``encodings`` find and decode the accumulators.
5. ``checkpoints/run_folder`` finds the folders of weights, config and base, one ``models.weights.Weights`` for each.
6. ``slot_names`` gives every slot its name; ``assign_names`` finds the assignment where the file has no names.
7. ``models/convert`` stores the second moments under their names on disk.
8. ``metadata`` writes the config and the coverage; ``fisher/fits`` and ``swap_check`` check the result.

``live`` starts from an optimizer in memory instead, and ``ivon`` cuts flat second moments.
"""
