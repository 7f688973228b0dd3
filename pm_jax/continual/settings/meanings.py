"""Values of settings whose names alone do not say what they do, in a sentence each."""

PERTURBATIONS = {
    "symmetric": "The paper's: 0, +epsilon or -epsilon times the task vector is added.",
    "gaussian": "Noise of that length in a random direction, as an ablation.",
    "one_sided": "0 or +epsilon times the task vector is added, as an ablation.",
    "antithetic": "The mean of the losses at +epsilon and -epsilon, in two passes a step.",
    "none": "The loss is taken at the model itself.",
}
CURVATURES = {
    "fisher_empirical": "Diagonal of the Fisher of the true labels, as in the paper.",
    "fisher_exact": "Diagonal of the Fisher of labels drawn from the model (curvature_samples).",
    "gauss_newton_diag": "Another name of fisher_exact: of a softmax the two are the same.",
    "kronecker": "Kronecker factors of the Fisher of dense kernels (curvature_slots).",
    "low_rank": "Gauss-Newton matrix of low rank, by Nystrom (curvature_rank).",
    "input_moment": "Second moments of the inputs of dense kernels: one forward pass, no labels. "
    "They are not of the loss, so they predict none; regmean takes them whatever is named here.",
    "identity": "The same for all parameters: merging is averaging.",
    "exact_current": "For analysis: the task's own, exact along its task vector by jvp, beside "
    "stored_curvature of earlier ones.",
    "exact_all": "For analysis: that of all tasks, by replay of merge_examples of each.",
}
"""The last two are made anew at every merge; the others are left behind by a task."""
