import math

import pytest
import torch
from torch import nn

from metadist.algorithms import MatchingNet
from metadist.core.episode import EpisodeBatch, Examples
from metadist.errors import ModelError
from metadist.experiment import make_experiment
from metadist.tasks import Sinusoid
from tests.algorithms.contracts import check_algorithm, images, points
from tests.algorithms.embedding_based import (
    check_compiled,
    check_that_order_and_grouping_do_not_matter,
    embedded,
    fit,
    predictions,
    unequal_ways,
)
from tests.builders import Problem, classification, tiny_config


class Scaled(nn.Module):
    """Embeds x as w * x for one number w = 3: cosines do not depend on it."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(3.0))

    def forward(self, x):
        return self.w * x


def in_the_plane(algorithm, support, targets, queries):
    """A task of 2 ways whose embeddings are its points themselves, times 3."""
    spec = classification((2,), ways=2, shots=len(support) // 2, queries=len(queries) // 2)
    x, query = (torch.tensor([part], dtype=torch.float64) for part in (support, queries))
    return Problem(algorithm, Scaled(), spec), EpisodeBatch(
        Examples(x, torch.tensor([targets])), Examples(query, torch.zeros(1, len(queries), dtype=torch.int64))
    )


def test_matching_nets_fulfil_the_contract():
    check_algorithm(MatchingNet, {"temperature": 0.3}, problems=(points, images))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_a_known_case(temperature):
    problem, batch = in_the_plane(
        MatchingNet(temperature=temperature), [[5.0, 0], [0, 2], [-1, 0], [0, 7]], [0, 1, 1, 0], [[2.0, 0], [0, 9]]
    )
    # Cosines of (2, 0) to the support set: 1, 0, -1, 0; of (0, 9): 0, 1, 0, 1. Classes: {0, 3} and {1, 2}.
    e = math.exp(1 / temperature)
    total = e + 2 + 1 / e
    first = [(e + 1) / total, (1 + 1 / e) / total]
    expected = torch.tensor([first, [0.5, 0.5]], dtype=torch.float64).log()
    torch.testing.assert_close(predictions(problem, batch), expected, rtol=1e-10, atol=1e-12)
    # Both queries have the target 0: the loss is the mean negative log-likelihood, the outputs being log P.
    assert problem.sums(batch).metrics[0] == pytest.approx(-(math.log(first[0]) + math.log(0.5)) / 2)


@pytest.mark.parametrize("make_problem", [points, images])
def test_attention_is_the_one_of_an_explicit_loop(make_problem):
    problem, batch = make_problem(MatchingNet(temperature=0.7))
    for task in range(2):
        support, query = embedded(problem, batch, task)
        targets = batch.support.y[task].tolist()
        expected = torch.zeros(len(query), 3, dtype=torch.float64)
        for number, x in enumerate(query):
            kernel = [math.exp(float(x @ s / x.norm() / s.norm()) / 0.7) for s in support]
            for weight, target in zip(kernel, targets, strict=True):
                expected[number, target] += weight / sum(kernel)
        found = predictions(problem, batch, task)
        torch.testing.assert_close(found, expected.log(), rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(found.exp().sum(1), torch.ones(len(query), dtype=torch.float64))


@pytest.mark.long
def test_compiled_equals_eager():
    check_compiled(MatchingNet())


def test_order_of_the_support_set_does_not_matter():
    check_that_order_and_grouping_do_not_matter(MatchingNet(temperature=0.5))


def test_improbable_classes_keep_a_finite_loss_and_gradient():
    # At temperature 1e-3 a class whose cosine is 2 lower has the probability e^-2000, which is 0 in any float.
    problem, batch = in_the_plane(
        MatchingNet(temperature=1e-3), [[1.0, 0], [-1, 0]], [1, 0], [[1.0, 1e-3], [1.0, -1e-3]]
    )
    sums = problem.sums(batch)
    assert sums.metrics[0] == pytest.approx(2000, rel=1e-3)
    assert math.isfinite(sums.gradient[0])


def test_a_class_without_examples_has_no_probability_and_the_others_all_of_it():
    problem, batch = in_the_plane(MatchingNet(), [[1.0, 0], [0, 1]], [1, 1], [[1.0, 0], [3.0, 1]])
    found = predictions(problem, batch)
    torch.testing.assert_close(found.exp(), torch.tensor([[0.0, 1.0]] * 2, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("policy", ["running", "support"])
def test_ways_may_differ_between_training_and_test(tmp_path, policy):
    assert fit(unequal_ways(tmp_path, MatchingNet(), policy)).step == 2


def test_regression_is_refused():
    with pytest.raises(ModelError, match=r"MatchingNet compares .* task is one of regression"):
        make_experiment(tiny_config(algorithm=MatchingNet(), task=Sinusoid()))
