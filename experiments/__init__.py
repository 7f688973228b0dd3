"""What a user runs; from a checkout, as `python -m experiments.NAME`."""
