"""Studies behind the figures of the README: restartable, one command each."""
