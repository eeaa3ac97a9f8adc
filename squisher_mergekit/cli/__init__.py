"""The program ``squisher``: one module for each command, shared options and tables, no logic."""
