import numpy as np
import pytest
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

from castbench.evaluation import metrics


@pytest.mark.parametrize("n", [2, 7, 1000])
def test_metrics_agree_with_scikit_learn(n):
    rng = np.random.default_rng(n)
    truth, predicted = rng.normal(-9, 7, n), rng.normal(-9, 7, n)
    assert metrics.mae(truth, predicted) == pytest.approx(mean_absolute_error(truth, predicted), rel=1e-12)
    assert metrics.rmse(truth, predicted) == pytest.approx(
        root_mean_squared_error(truth, predicted), rel=1e-12
    )
    assert metrics.r2(truth, predicted) == pytest.approx(r2_score(truth, predicted), rel=1e-12)


def test_scores_of_known_values_are_in_the_unit_of_the_target():
    assert metrics.scores([1.0, 2.0, 3.0], [1.0, 2.0, 6.0]) == {
        "mae": 1.0,
        "rmse": pytest.approx(np.sqrt(3.0)),
        "r2": pytest.approx(1 - 9 / 2),
    }


def test_r2_is_missing_where_the_truth_does_not_vary():
    assert metrics.r2([2.0, 2.0], [1.0, 3.0]) is None
    assert metrics.r2([2.0], [1.0]) is None


@pytest.mark.parametrize(("truth", "predicted"), [([], []), ([1.0], [1.0, 2.0]), ([[1.0]], [[1.0]])])
def test_vectors_that_do_not_pair_up_are_refused(truth, predicted):
    with pytest.raises(ValueError, match="two vectors of one length"):
        metrics.mae(truth, predicted)


def test_float32_predictions_are_summed_in_double_precision():
    truth = np.full(1_000_000, 1e4, np.float32)
    assert metrics.mae(truth, truth + np.float32(1.0)) == pytest.approx(1.0, rel=1e-12)
