"""What follows the training of a task: evidence, the merge, and its evaluation."""
