"""Recorder of the Fisher of a LoRA's merged weights: equations, probes in the backward pass, averages, files."""
