"""Recipes of merges: drafts of configurations, and sweeps over a grid of parameters."""
