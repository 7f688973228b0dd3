"""Perturb-and-Merge in other people's Flax code."""
