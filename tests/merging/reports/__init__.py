"""Tests of the reports of a merge."""
