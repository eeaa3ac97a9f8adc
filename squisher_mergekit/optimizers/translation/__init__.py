"""Translation of the parameter names of other trainers to those of Hugging Face models.

``families`` is the table: own names, Hugging Face names, and the moves of rows between them. ``translate`` applies it to
an optimizer's slots, ``moves`` does the moves when a tensor is read, and ``flat_units`` cuts the flat parameters of FSDP1.
"""
