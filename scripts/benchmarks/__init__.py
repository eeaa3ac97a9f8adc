"""Benchmarks of time and memory; each module that has a ``main`` is a command."""
