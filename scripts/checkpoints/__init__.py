"""Checkpoints of other trainers: ``make`` writes them, ``check`` reads them, ``fuzz`` damages and reads them."""
