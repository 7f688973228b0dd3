"""The work after the training of a task: evidence, the merge, and its evaluation."""
