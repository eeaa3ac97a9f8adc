"""Merging by Fisher: equations (pure functions), how they are run, merge methods, plan; mergekit in integration.py."""
