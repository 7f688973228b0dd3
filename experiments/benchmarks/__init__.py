"""Benchmarks: each prints ratios of times or sizes that it measures in one run."""
