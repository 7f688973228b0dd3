import dataclasses

import jax
import numpy as np
import pytest

from pm_jax.continual import Config, Learner
from pm_jax.continual.placement.data import HostData
from pm_jax.data import own, random_access
from pm_jax.data.stream import LabelledArrays
from pm_jax.types import InvalidInput
from tests import own_models
from tests.small_runs import QUIET, SMALL, comparable, leaves_equal

BY_DOMAIN = {"scenario": "domain_incremental", "num_tasks": 2}
BY_CLASS = {"scenario": "class_incremental", "num_tasks": 2}
RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 3)).astype(np.float32)
Y = np.arange(40) // 2 % 4


def split(x, y):
    return (x[::2], y[::2]), (x[1::2], y[1::2])


def test_arrays_and_sources_make_the_same_stream():
    arrays = [split(X, Y), split(-X, Y)]
    sources = [
        {
            "train": own_models.Source(*train),
            "test": own_models.Source(*test, as_mapping=True),
        }
        for train, test in arrays
    ]
    given, wanted = (
        own.stream_of_data(data, 3, name="mine", **BY_DOMAIN) for data in (sources, arrays)
    )
    assert np.array_equal(given.inputs, wanted.inputs) and given.inputs.dtype == np.float32
    assert given.manifest() == wanted.manifest()
    assert wanted.class_masks.all() and wanted.num_classes == 4
    rows = wanted.test.rows()[1]
    assert np.array_equal(wanted.inputs[rows], -X[1::2])
    assert np.array_equal(wanted.labels[rows], Y[1::2])


def test_listed_tasks_have_the_classes_of_their_labels_in_their_order():
    late = np.arange(40) // 2 % 2 + 2
    data = [split(X, late), split(X, late - 2)]
    stream = own.stream_of_data(data, 0, name="mine", **BY_CLASS)
    assert stream.class_masks.tolist() == [[False, False, True, True], [True, True, False, False]]
    assert stream.class_order == (2, 3, 0, 1)
    for task, rows in enumerate(stream.train.rows()):
        assert set(stream.labels[rows].tolist()) == ({2, 3}, {0, 1})[task]


def test_one_data_set_is_divided_by_its_classes():
    arrays = LabelledArrays(X, Y, X, Y, "toy")
    stream = own.stream_of_data(arrays, 0, name="mine", **BY_CLASS)
    assert stream.class_masks.sum(axis=1).tolist() == [2, 2]
    assert stream.example_ids[0] == "toy/train/0"


@pytest.mark.parametrize(
    "given,stored",
    [
        ("float64", "float32"), ("int64", "int32"), ("uint8", "uint8"), ("bool", "float32"),
        ("float16", "float16"), ("uint16", "int32"),
    ],
)  # fmt: skip
def test_inputs_have_types_that_devices_have(given, stored):
    x = np.abs(X * 3).astype(given)
    stream = own.stream_of_data([split(x, Y)] * 2, 0, name="mine", **BY_DOMAIN)
    assert stream.inputs.dtype == stored


def test_large_sources_are_read_when_their_examples_are_needed(monkeypatch):
    monkeypatch.setattr(own, "IN_MEMORY", 0)
    source = own_models.Source(list(X), Y)
    inputs, labels = own._read_source(source, "mine")
    assert isinstance(inputs, random_access.SourceInputs) and labels.tolist() == Y.tolist()
    assert inputs.nbytes == X.nbytes and len(inputs) == 40 and inputs.shape == X.shape
    both = random_access.joined_inputs([inputs, X[:5], inputs])
    rows = np.asarray([[0, 39, 40], [44, 45, 84]])
    assert np.array_equal(both[rows], np.concatenate([X, X[:5], X])[rows])
    assert np.array_equal(np.asarray(both)[3:50], both[3:50])


@pytest.mark.slow
def test_a_factory_of_data_and_a_list_of_tasks_give_the_numbers_of_the_built_in_stream():
    config = dataclasses.replace(SMALL, num_tasks=2, rotation_step=60.0)
    wanted = Learner(config, 0, options=QUIET)
    results = wanted.run()
    named = dataclasses.replace(
        config, dataset="tests.own_models:sources", dataset_settings="turn=60"
    )
    by_name = Learner(named, 0, options=QUIET)
    listed = Learner(config, 0, options=QUIET, stream=own_models.sources())
    whole = Learner(config, 0, options=QUIET, stream=config.task_stream(0))
    for learner in (by_name, listed, whole):
        assert comparable(learner.run()) == comparable(results)
        assert leaves_equal(learner.params, wanted.params)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["plain", "network"])
def test_streamed_sources_have_the_numbers_of_resident_ones(model, monkeypatch):
    pytest.importorskip("grain", reason="needs the extra 'streaming'")
    config = dataclasses.replace(
        SMALL, num_tasks=2, first_task_epochs=1, hidden_sizes=Config.hidden_sizes,
        model=f"tests.own_models:{model}", model_state="measured",
        # Adam would make steps of the noise in gradients that batch norm makes 0.
        optimizer="sgd", learning_rate=0.1,
    )  # fmt: skip
    resident = Learner(config, 0, options=QUIET, stream=own_models.digits())
    wanted = resident.run()
    monkeypatch.setattr(own, "IN_MEMORY", 0)
    tasks = [tuple(own_models.Source(*part) for part in task) for task in own_models.digits()]
    small = dataclasses.replace(config, resident_mb=0.1)
    streamed = Learner(small, 0, options=QUIET, stream=tasks)
    assert isinstance(streamed.training_data, HostData)
    assert isinstance(streamed.stream.inputs, random_access.SourceInputs)
    found = streamed.run()
    assert found["accuracy_matrix"] == wanted["accuracy_matrix"]
    assert bool(streamed.model_state) == (model == "network")
    for part in ("params", "model_state"):
        one, other = (jax.tree.leaves(getattr(learner, part)) for learner in (streamed, resident))
        for a, b in zip(one, other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    if model == "plain":  # compiled to the same last bit
        assert comparable(found) == comparable(wanted)


def test_a_stream_must_agree_with_the_settings():
    stream = own.stream_of_data([split(X, Y)] * 2, 0, name="mine", **BY_DOMAIN)
    config = dataclasses.replace(SMALL, num_tasks=3)
    with pytest.raises(InvalidInput, match="^num_tasks=3: the stream has 2 tasks; use that number"):
        Learner(config, 0, stream=stream)
    with pytest.raises(InvalidInput, match="^num_tasks=3: stream has 2 tasks; use that number"):
        Learner(config, 0, stream=[split(X, Y)] * 2)
    config = dataclasses.replace(SMALL, num_tasks=2, scenario="class_incremental")
    with pytest.raises(InvalidInput, match="^scenario=class_incremental: the stream is domain_inc"):
        Learner(config, 0, stream=stream)
    config = dataclasses.replace(config, class_subset=2)
    with pytest.raises(InvalidInput, match="^class_subset=2: has no effect on a stream that is"):
        Learner(config, 0, stream=stream)
