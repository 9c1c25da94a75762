import math

import numpy as np
import pytest
import torch
from torch import nn

from metadist.algorithms import R2D2
from metadist.algorithms.r2d2 import LOG_REGULARISATION, SCALE, ridge
from metadist.core.episode import EpisodeBatch, Examples
from metadist.errors import ModelError
from metadist.experiment import make_experiment
from metadist.tasks import Sinusoid
from tests.algorithms.contracts import check_algorithm, curves, images, points
from tests.algorithms.embedding_based import (
    check_compiled,
    check_that_order_and_grouping_do_not_matter,
    embedded,
    fit,
    predictions,
    unequal_ways,
)
from tests.builders import Problem, regression, tiny_config

VARIATIONS = {"regularisation": 0.2, "learn_regularisation": False, "scale": 3.0}


class Identity(nn.Module):
    """Embeds x as w * x with w = 1."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        return self.w * x


def with_ones(x):
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)


def one_hot(targets, ways):
    return torch.eye(ways, dtype=torch.float64)[targets]


def least_squares(x, y, strength):
    """Ridge regression as plain least squares: |X w - y|^2 + s |w|^2 = |[X; sqrt(s) I] w - [y; 0]|^2."""
    features = x.shape[1]
    x = torch.cat([x, math.sqrt(strength) * torch.eye(features, dtype=x.dtype)])
    y = torch.cat([y, torch.zeros(features, y.shape[1], dtype=y.dtype)])
    return torch.linalg.lstsq(x, y).solution


def test_r2d2_fulfils_the_contract():
    check_algorithm(R2D2, VARIATIONS, problems=(points, images, curves))


@pytest.mark.parametrize(("examples", "features"), [(3, 8), (8, 3), (5, 5)])
@pytest.mark.parametrize("strength", [1e-3, 2.0])
def test_ridge_regression_solves_the_augmented_least_squares_problem(examples, features, strength):
    random = torch.Generator().manual_seed(examples)
    x = torch.randn(examples, features, generator=random, dtype=torch.float64)
    y = torch.randn(examples, 2, generator=random, dtype=torch.float64)
    found = ridge(x, y, strength)
    torch.testing.assert_close(found, least_squares(x, y, strength), rtol=1e-8, atol=1e-10)
    # And the normal equations in NumPy, of which only one of the two regimes is made.
    normal = np.linalg.inv(x.numpy().T @ x.numpy() + strength * np.eye(features)) @ x.numpy().T @ y.numpy()
    np.testing.assert_allclose(found, normal, rtol=1e-6, atol=1e-8)


def test_a_known_line():
    # Support (1, 1) and (-1, 3), lambda = 2: columns x and 1 are orthogonal, so each coefficient stands alone:
    # slope = sum x y / (sum x^2 + 2) = (1 - 3) / 4 = -0.5, intercept = sum y / (2 + 2) = 1. At x = 4: 1 - 2 = -1.
    spec = regression(inputs=1, outputs=1, support_size=2, query_size=1)
    support = Examples(*(torch.tensor(values, dtype=torch.float64) for values in ([[[1.0], [-1]]], [[[1.0], [3]]])))
    query = Examples(torch.tensor([[[4.0]]], dtype=torch.float64), torch.tensor([[[0.0]]], dtype=torch.float64))
    problem = Problem(R2D2(regularisation=2.0, learn_regularisation=False), Identity(), spec)
    found = predictions(problem, EpisodeBatch(support, query))
    torch.testing.assert_close(found, torch.tensor([[-1.0]], dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("make_problem", [points, images])
def test_logits_are_scaled_ridge_regressions_of_the_classes(make_problem):
    problem, batch = make_problem(R2D2(regularisation=0.5, scale=3.0))
    for task in range(2):
        support, query = embedded(problem, batch, task)
        weights = least_squares(with_ones(support), one_hot(batch.support.y[task], 3), 0.5)
        # lambda is kept in float32, as its logarithm.
        torch.testing.assert_close(
            predictions(problem, batch, task), 3 * with_ones(query) @ weights, rtol=1e-5, atol=1e-5
        )


def test_regression_targets_are_predicted_as_they_are():
    problem, batch = curves(R2D2(regularisation=0.5))
    support, query = embedded(problem, batch)
    weights = least_squares(with_ones(support), batch.support.y[0], 0.5)
    torch.testing.assert_close(predictions(problem, batch), with_ones(query) @ weights, rtol=1e-5, atol=1e-5)


@pytest.mark.long
def test_compiled_equals_eager():
    check_compiled(R2D2())


def test_order_of_the_support_set_does_not_matter():
    check_that_order_and_grouping_do_not_matter(R2D2())
    check_that_order_and_grouping_do_not_matter(R2D2(), curves)


def test_regularisation_and_scale_are_meta_parameters_with_a_gradient():
    in_classes, batch = points(R2D2(regularisation=0.3))
    meta = in_classes.layout.unflatten(in_classes.theta)
    assert float(meta[LOG_REGULARISATION].exp()) == pytest.approx(0.3)
    assert float(meta[SCALE]) == 10
    gradient = in_classes.layout.unflatten(torch.from_numpy(in_classes.sums(batch).gradient))
    assert abs(gradient[LOG_REGULARISATION]) > 1e-3
    assert abs(gradient[SCALE]) > 1e-3
    in_curves, _ = curves(R2D2())
    assert LOG_REGULARISATION in in_curves.layout.shapes
    assert SCALE not in in_curves.layout.shapes
    fixed, _ = points(R2D2(learn_regularisation=False))
    assert LOG_REGULARISATION not in fixed.layout.shapes


@pytest.mark.parametrize("policy", ["running", "support"])
def test_ways_may_differ_between_training_and_test(tmp_path, policy):
    assert fit(unequal_ways(tmp_path, R2D2(), policy)).step == 2


def test_a_scale_is_refused_in_regression():
    with pytest.raises(ModelError, match=r"algorithm\.scale is for logits, got 3\.0 with a task of regression"):
        make_experiment(tiny_config(algorithm=R2D2(scale=3.0), task=Sinusoid()))
