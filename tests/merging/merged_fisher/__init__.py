"""Tests of the Fisher of a merged model."""
