import jax
import pytest

from experiments.benchmarks.merge_rules import measure, without_training
from pm_jax import rules

pytestmark = pytest.mark.slow

LEAVES, ENTRIES = 16, 1 << 16
MEASURED = [name for name in rules.REGISTRY if without_training(rules.make(name, max_tasks=3))]


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="bounds are of XLA's CPU code")
@pytest.mark.parametrize("name", MEASURED)
def test_a_merge_needs_twice_the_model_beyond_what_it_is_given(name):
    """The merged model included; a copy of the state, or all differences, would be one more."""
    rule = rules.make(name, max_tasks=3)
    # Rules that decompose matrices are given some; the others do not care.
    side = int(ENTRIES**0.5)
    shape = (side, side) if rule.needs.parts else (ENTRIES,)
    shapes = {str(i): jax.ShapeDtypeStruct(shape, "float32") for i in range(LEAVES)}
    found = measure(rule, shapes)
    model = LEAVES * 4 * ENTRIES
    assert found.memory <= 2.4 * model  # CoFiMA's, for the working copy of a leaf and its mask
    assert found.state <= 4.1 * model
