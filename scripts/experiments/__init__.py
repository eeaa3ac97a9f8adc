"""Experiments on real data, small enough for a CPU: what the README reports and what slow tests run."""
