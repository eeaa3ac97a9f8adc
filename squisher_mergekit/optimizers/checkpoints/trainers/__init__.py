"""Layouts of trainers outside of the Hugging Face world: one module each, or a helper of a more general layout."""
