"""Studies behind the figures of experiments/README.md: restartable, one command each."""
