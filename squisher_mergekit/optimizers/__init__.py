"""From a training run's optimizer state to a Fisher with names.

``load`` finds the state, ``checkpoints`` reads any layout into a ``RawState``, and ``build`` makes the Fisher of it:
``slots`` and ``second_moments`` find the accumulators, ``encodings`` decode them, ``assign_names`` gives each its
parameter, ``swap_check`` tries whether two were exchanged, ``metadata`` records what is known. ``live`` starts from an
optimizer in memory instead.
"""
