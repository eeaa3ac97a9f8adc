"""Experiments on real data, small enough for a CPU: results of the README and runs of slow tests."""
