import math

import pytest

from pm_jax import metrics

MATRIX = [
    [0.9, 0.2, 0.1, 0.3],
    [0.7, 0.8, 0.4, 0.2],
    [0.8, 0.6, 0.9, 0.5],
    [0.5, 0.7, 0.6, 1.0],
]


def test_golden_figures():
    assert metrics.final_average_accuracy(MATRIX) == pytest.approx(2.8 / 4)
    rows = (0.9, 1.5 / 2, 2.3 / 3, 2.8 / 4)
    assert metrics.average_incremental_accuracy(MATRIX) == pytest.approx(sum(rows) / 4)
    # Best earlier accuracy 0.9, 0.8, 0.9; final 0.5, 0.7, 0.6.
    assert metrics.forgetting(MATRIX) == pytest.approx((0.4 + 0.1 + 0.3) / 3)
    assert metrics.backward_transfer(MATRIX) == pytest.approx((-0.4 - 0.1 - 0.3) / 3)
    assert metrics.learning_accuracy(MATRIX) == pytest.approx((0.9 + 0.8 + 0.9 + 1.0) / 4)
    initial = [0.5, 0.1, 0.2, 0.3]
    assert metrics.forward_transfer(MATRIX, initial) == pytest.approx((0.1 + 0.2 + 0.2) / 3)


def test_forgetting_looks_at_the_best_not_at_the_first_accuracy():
    improved = [[0.5, 0.0, 0.0], [0.9, 0.5, 0.0], [0.6, 0.5, 0.5]]
    assert metrics.forgetting(improved) == pytest.approx((0.3 + 0.0) / 2)
    assert metrics.backward_transfer(improved) == pytest.approx((0.1 + 0.0) / 2)


def test_forgetting_is_negative_where_a_task_improved_to_the_end():
    assert metrics.forgetting([[0.5, 0.0], [0.7, 0.9]]) == pytest.approx(-0.2)


def test_figures_above_the_diagonal_count_only_in_the_forward_transfer():
    nan = float("nan")
    hidden = [[v if j <= i else nan for j, v in enumerate(row)] for i, row in enumerate(MATRIX)]
    summary = metrics.summarize(hidden)
    full = metrics.summarize(MATRIX)
    assert math.isnan(summary["forward_transfer"])
    for name in summary:
        if name != "forward_transfer":
            assert summary[name] == pytest.approx(full[name])


def test_a_single_task_has_nothing_to_forget():
    summary = metrics.summarize([[0.7]], [0.1])
    assert summary["final_average_accuracy"] == pytest.approx(0.7)
    for name in ("forgetting", "backward_transfer", "forward_transfer"):
        assert math.isnan(summary[name])


@pytest.mark.parametrize("matrix", [[], [[1.0, 2.0]], [1.0]])
def test_a_matrix_that_is_not_square_is_refused(matrix):
    with pytest.raises(ValueError, match="square"):
        metrics.final_average_accuracy(matrix)
