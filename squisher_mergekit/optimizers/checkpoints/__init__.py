"""Readers of optimizer states on disk: one module per layout, safe unpickling, checksums.

``layouts`` lists the layouts. The module of a layout has two functions: ``find(folder)`` returns the file or folder of
the state, and ``read(location, verify)`` returns it as a :class:`~.raw_state.RawState`.
"""
