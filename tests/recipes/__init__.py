"""Tests of the drafts and sweeps of merges."""
