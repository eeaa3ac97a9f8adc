"""The demo behind ``scripts/demo``: fine-tune a real encoder on real texts, merge it with stock mergekit, score it."""
