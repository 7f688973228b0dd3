"""The commands for users; from a checkout, `python -m experiments.NAME`."""
