"""Tests of LoRA over a base model."""
