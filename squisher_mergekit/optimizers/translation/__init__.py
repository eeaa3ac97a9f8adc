"""Translation of the parameter names of other trainers to those of Hugging Face models.

``families`` is the table: own names, Hugging Face names, and the moves of rows between them. ``translate`` applies it
to an optimizer's slots, and ``moves`` does the moves when a tensor is read. ``flat_units`` cuts those of FSDP1.
"""
