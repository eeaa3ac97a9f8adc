"""LoRA over a base model: its pairs and merged weights, and a LoRA of given ranks from changed weights."""
