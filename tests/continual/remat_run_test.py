"""Runs whose blocks are computed twice have the numbers of those whose blocks are not."""

import dataclasses

import numpy as np
import pytest

from pm_jax.continual import Learner
from pm_jax.continual.merging.programs import Programs, StreamShape
from pm_jax.integrations.wrap import as_model
from tests.small_runs import QUIET, VIT


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"rule": "perturb_and_merge", "curvature": "fisher_exact"},
        # This rule reads the inputs of layers, which cannot leave a block that is computed twice.
        {"rule": "null_space"},
    ],
)
def test_blocks_that_are_computed_twice_give_the_same_run(options):
    def matrix(remat):
        config = dataclasses.replace(VIT, remat=remat, **options)
        return Learner(config, 0, options=QUIET).run()["accuracy_matrix"]

    once, twice = (np.asarray(matrix(remat), float) for remat in ("none", "blocks"))
    # An example on the border between two classes may change sides.
    np.testing.assert_allclose(twice, once, atol=0.005)


@pytest.mark.parametrize(
    ("options", "plain"),
    [
        ({"curvature": "fisher_exact"}, False),
        # Leaves beside those of dense layers have gradients example by example.
        ({"curvature": "fisher_exact", "adapter": "full"}, True),
        ({"curvature": "kronecker"}, True),
        ({"curvature": "exact_current"}, True),
        # This rule takes second moments of inputs whatever curvature is named.
        ({"rule": "regmean"}, True),
    ],
)
def test_measures_by_more_than_backward_passes_of_batches_get_the_plain_model(options, plain):
    config = dataclasses.replace(VIT, remat="blocks", **options)
    programs = Programs(config, StreamShape(10, (8, 8, 1), 64, 5), as_model(config.network(10)))
    assert programs.training.model.module.remat
    assert programs.evidence_pass._model.module.remat is not plain
