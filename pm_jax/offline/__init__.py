"""Merging of model files without a training run."""
