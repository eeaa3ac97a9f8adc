"""Demo of ``scripts/demo``: fine-tune a real encoder on real texts, merge with stock mergekit, score."""
