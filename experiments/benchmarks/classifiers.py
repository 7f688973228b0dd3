"""Time and memory of the classifiers that are made from features, on features of random numbers.

python -m experiments.benchmarks.classifiers

The first table is of each classifier: the seconds in which it observes a task's features, batch by
batch in one program as in a run, and those of its fit. Below it stands what all of them take
together, where classifiers with the same statistics share them, and the same as a multiple of the
first one's; then the drift of features. Programs are compiled before the clock starts.

The second table is of ridge with as many random features as accelerators have by default, with the
memory of a process that does nothing else.
"""

import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

from pm_jax import classifiers, lapack
from pm_jax.classifiers import Classifier, Statistics, drift
from pm_jax.types import Array

flags.DEFINE_integer("benchmark_width", 768, "Features of an example.")
flags.DEFINE_integer("benchmark_examples", 6_000, "Examples of a task.")
flags.DEFINE_integer("benchmark_classes", 100, "Classes.")
flags.DEFINE_integer("benchmark_random_features", 10_000, "Random features of the second table.")
flags.DEFINE_bool("benchmark_only_ridge", False, "Print the second table's row and nothing else.")

BATCH_SIZE = 256
"""As a run's passes have them."""


def seconds(function: Callable[..., Any], *given: Any) -> tuple[float, Any]:
    """Measure a call of a compiled function, and return also its result."""
    compiled = jax.jit(function).lower(*given).compile()
    clock = time.perf_counter()
    result = jax.block_until_ready(compiled(*given))
    return time.perf_counter() - clock, result


def task(seed: int) -> tuple[Array, Array]:
    """Make features and labels of random numbers."""
    options = flags.FLAGS
    classes, examples = options.benchmark_classes, options.benchmark_examples
    keys = jax.random.split(jax.random.key(seed), 2)
    labels = jnp.arange(examples) % classes
    centers = jax.random.normal(keys[0], (classes, options.benchmark_width))
    noise = jax.random.normal(keys[1], (examples, options.benchmark_width))
    return 0.3 * centers[labels] + noise, labels


def observed(observe: Callable[..., Any], state: Any, features: Any, labels: Array) -> Any:
    """Observe all examples in batches."""
    count = labels.shape[0]

    def step(number: Array, state: Any) -> Any:
        places = number * BATCH_SIZE + jnp.arange(BATCH_SIZE)
        rows = jnp.minimum(places, count - 1)
        batch = jax.tree.map(lambda leaf: leaf[rows], features)
        return observe(state, batch, labels[rows], (places < count).astype(jnp.float32))

    return jax.lax.fori_loop(0, -(-count // BATCH_SIZE), step, state)


def observe_task(statistics: Statistics, features: Array, labels: Array) -> tuple[float, Any]:
    """Measure the statistics of a task."""
    options, key = flags.FLAGS, jax.random.key(0)
    state = statistics.init(options.benchmark_classes, options.benchmark_width, key)
    return seconds(
        lambda state, features, labels: observed(statistics.observe, state, features, labels),
        state,
        features,
        labels,
    )


def fit(classifier: Classifier, state: Any) -> float:
    """Measure a fit."""
    shape = (flags.FLAGS.benchmark_width, flags.FLAGS.benchmark_classes)
    columns = jnp.zeros(shape), jnp.zeros(shape[1:])
    return seconds(classifier.fit, state, columns, jax.random.key(1))[0]


def print_all() -> None:
    """Print the first table."""
    features, labels = task(0)
    print(f"{'classifier':20}  {'observe, s':>10}  {'fit, s':>10}")
    first = together = 0.0
    states: dict[str, Any] = {}
    for name in classifiers.REGISTRY:
        classifier = classifiers.make(name)
        statistics, state, passed = classifier.statistics, None, 0.0
        if statistics:
            # A row has the seconds of the classifier alone; the sum counts shared statistics once.
            passed, state = observe_task(statistics, features, labels)
            together += 0.0 if statistics.name in states else passed
            states[statistics.name] = state
        fitted = fit(classifier, state)
        together += fitted
        if statistics and not first:
            first = passed + fitted
        print(f"{name:20}  {passed:10.2f}  {fitted:10.2f}")
    print(f"all together, s       {together:10.2f}")
    print(f"  of the first, times {together / first:10.1f}")
    state = drift.init(flags.FLAGS.benchmark_width)
    after = features + 0.1 * jnp.roll(features, 1, axis=1)
    passed, state = seconds(
        lambda state, pairs, labels: observed(
            lambda state, pair, _, weights: drift.observe(state, pair[0], pair[1], weights),
            state,
            pairs,
            labels,
        ),
        state,
        (features, after),
        labels,
    )
    print(f"{'drift':20}  {passed:10.2f}  {seconds(drift.fit, state)[0]:10.2f}")


def print_ridge() -> None:
    """Print the second table's row."""
    classifier = classifiers.ridge(features=flags.FLAGS.benchmark_random_features)
    features, labels = task(0)
    assert classifier.statistics
    passed, state = observe_task(classifier.statistics, features, labels)
    fitted = fit(classifier, state)
    # Kilobytes on Linux.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    name = f"ridge, {flags.FLAGS.benchmark_random_features} features"
    print(f"{name:20}  {passed:10.2f}  {fitted:10.2f}  {peak:8.0f}")


def main(argv: Sequence[str]) -> None:
    """Print both tables."""
    del argv
    options = flags.FLAGS
    if options.benchmark_only_ridge:
        with lapack.one_thread():  # as a run has
            print_ridge()
        return
    print(
        f"{options.benchmark_examples} examples, {options.benchmark_width} features, "
        f"{options.benchmark_classes} classes, on {jax.devices()[0].device_kind}"
    )
    with lapack.one_thread():
        print_all()
    print(f"\n{'':20}  {'observe, s':>10}  {'fit, s':>10}  {'peak, MB':>8}", flush=True)
    command = [sys.executable, "-m", "experiments.benchmarks.classifiers", *sys.argv[1:]]
    subprocess.run([*command, "--benchmark_only_ridge"], check=True)


if __name__ == "__main__":
    app.run(main)
