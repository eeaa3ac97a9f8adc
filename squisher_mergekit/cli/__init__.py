"""The program ``squisher``: one module a verb or two, no logic."""
