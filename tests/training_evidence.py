"""What the training of a task leaves to a rule, made up from two models for the contract suite."""

import jax
import jax.numpy as jnp
import numpy as np

from pm_jax import trees
from pm_jax.curvature import DiagonalQuadratic, InputMomentQuadratic, dense_layers
from pm_jax.curvature.measures import Measurement
from pm_jax.rules import objectives
from pm_jax.types import Batch

WIDTH, CLASSES = 8, 16


def linear_logits(leaves, inputs):
    """Of a model with a scale [8], a kernel [8, 16] and a bias [16], whatever holds them."""
    by_name = {path.split("/")[-1]: leaf for path, leaf in trees.leaves_by_path(leaves).items()}
    scaled = inputs * by_name["scale" if "scale" in by_name else "0"].astype(jnp.float32)[None]
    product = jnp.matmul(scaled, by_name["kernel"].astype(jnp.float32))
    return product + by_name["bias"].astype(jnp.float32)[None]


def objective():
    rng = np.random.default_rng(3)
    labels = jnp.asarray(rng.integers(8, CLASSES, size=(2, 4)))
    batches = Batch(
        jnp.asarray(rng.normal(size=(2, 4, WIDTH)), jnp.float32), labels, jnp.ones((2, 4))
    )
    new = jnp.arange(CLASSES) >= 8
    return objectives.Objective(jax.tree_util.Partial(linear_logits), batches, new, ~new)


def of_training(rule, previous, trained):
    """The fields of `Evidence` that a learner takes from training, as far as the rule needs them.

    The trajectory is a curve from one model to the other, which rests where both are equal.
    """
    found = {}
    previous, trained = trees.floating(previous), trees.floating(trained)

    def snapshots(low, high):
        low, high = low.astype(jnp.float32), high.astype(jnp.float32)
        step = high - low
        points = [low + f * step + f * (1 - f) * step * jnp.sin(step) for f in rule.needs.snapshots]
        return jnp.stack(points)

    if "trajectory" in rule.needs.evidence:
        found["trajectory"] = jax.tree.map(snapshots, previous, trained)
    if "objective" in rule.needs.evidence:
        found["objective"] = objective()
    if "all_objectives" in rule.needs.evidence:
        found["all_objectives"] = objectives.stack([objective()] * 2, jnp.asarray([True, False]))
    if "onset_gradient_norm" in rule.needs.evidence:
        found["onset_gradient_norm"] = jnp.asarray(30.0)
    return found


def in_groups(evidence, groups):
    """Evidence as it might be without each group of examples."""
    each = [evidence.quadratic.scaled(1.0 + group) for group in range(groups)]
    nans = jnp.full(groups, jnp.nan)
    return Measurement(jax.tree.map(lambda *x: jnp.stack(x), *each), nans, nans, nans)


def of_input_moments(quadratic):
    """A quadratic of the kind that `regmean` takes, as different as the diagonal one is."""
    moments = {}
    for path, leaf in trees.leaves_by_path(quadratic.diagonal).items():
        if path.rpartition("/")[2] == "kernel":
            width = leaf.shape[0]
            mix = jnp.eye(width) + 0.3 * jnp.tri(width, k=-1)
            moments[path] = jnp.matmul(mix * leaf[:, 0][None], mix.T, precision="highest")
    return InputMomentQuadratic.at(quadratic.center, moments)


def as_in_training(rule):
    """The rule as a learner calls it: with the evidence of training, and absorbing its merges."""

    def update(state, *, previous, trained, evidence=None):
        if evidence is not None:
            evidence = evidence._replace(**of_training(rule, previous, trained))
            if rule.needs.curvatures == ("input_moment",):
                evidence = evidence._replace(quadratic=of_input_moments(evidence.quadratic))
            if rule.needs.example_groups:
                evidence = evidence._replace(
                    left_out=in_groups(evidence, rule.needs.example_groups)
                )
        merged, state, info = rule.update(
            state, previous=previous, trained=trained, evidence=evidence
        )
        if rule.needs.absorb:
            moments = {
                path: jnp.diag(jnp.arange(1.0, 1 + trees.leaves_by_path(merged)[path].shape[0]))
                for path in dense_layers.kernel_paths(merged)
            }
            quadratic = DiagonalQuadratic.at(merged, evidence.quadratic.diagonal)
            absorbed = evidence._replace(quadratic=quadratic, input_moments=moments)
            state = rule.needs.absorb(state, absorbed)
        return merged, state, info

    return rule._replace(update=update)
