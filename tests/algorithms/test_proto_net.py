import dataclasses
import math

import pytest
import torch
from torch import nn

from metadist import load_config
from metadist.algorithms import MAML, ProtoNet
from metadist.core.episode import EpisodeBatch, Examples
from metadist.errors import ConfigError, ModelError
from metadist.evaluation import evaluate
from metadist.experiment import make_experiment
from metadist.sections import EvaluationSettings
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
from tests.builders import Problem, classification, random_episodes, tiny_config


class Plain(nn.Module):
    """Embeds x as w * x, elementwise, with w = 1."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.w * x


def plain_episode():
    """Means of class 0: (1, 0) and (3, 0) -> (2, 0); of class 1: (0, 2) and (0, 4) -> (0, 3). Query: the origin."""
    spec = classification((2,), ways=2, shots=2, queries=1)
    support = Examples(
        torch.tensor([[[1.0, 0], [0, 2], [3, 0], [0, 4]]], dtype=torch.float64), torch.tensor([[0, 1, 0, 1]])
    )
    query = Examples(torch.tensor([[[0.0, 0], [0, 1]]], dtype=torch.float64), torch.tensor([[0, 1]]))
    return Problem(ProtoNet(), Plain(), spec), EpisodeBatch(support, query)


def test_proto_net_fulfils_the_contract():
    check_algorithm(ProtoNet, {}, problems=(points, images))


def test_logits_of_a_known_case_are_negative_squared_distances():
    problem, batch = plain_episode()
    # From (0, 0): |(2, 0)|^2 = 4, |(0, 3)|^2 = 9; from (0, 1): 4 + 1 = 5 and 4.
    expected = torch.tensor([[-4.0, -9.0], [-5.0, -4.0]], dtype=torch.float64)
    torch.testing.assert_close(predictions(problem, batch), expected, rtol=1e-12, atol=1e-12)
    sums = problem.sums(batch)
    # Query targets 0 and 1, margins 5 and 1: cross entropy log(1 + e^-5) and log(1 + e^-1); both are right.
    assert sums.metrics == pytest.approx([(math.log1p(math.exp(-5)) + math.log1p(math.exp(-1))) / 2, 1.0])


@pytest.mark.parametrize("make_problem", [points, images])
def test_it_is_the_nearest_class_mean_of_the_embeddings(make_problem):
    problem, batch = make_problem(ProtoNet())
    for task in range(2):
        support, query = embedded(problem, batch, task)
        targets = batch.support.y[task]
        expected = torch.empty(len(query), 3, dtype=torch.float64)
        for way in range(3):
            mean = sum(support[i] for i in range(len(support)) if targets[i] == way) / 2
            for number, example in enumerate(query):
                expected[number, way] = -sum((a - b) ** 2 for a, b in zip(example, mean, strict=True))
        found = predictions(problem, batch, task)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
        nearest = torch.cdist(query, torch.stack([support[targets == way].mean(0) for way in range(3)])).argmin(1)
        assert torch.equal(found.argmax(1), nearest)


def test_compiled_equals_eager():
    check_compiled(ProtoNet())


def test_order_of_the_support_set_does_not_matter():
    check_that_order_and_grouping_do_not_matter(ProtoNet())


def test_queries_are_embedded_under_the_support_sets_statistics_where_the_policy_says_so():
    # One query alone: by its own statistics it would be all bias, since a set of one has no variance.
    spec = classification((4,), ways=2, shots=2, queries=1)
    module = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    problem = Problem(ProtoNet(), module, spec, policy="support")
    batch = random_episodes(spec, 1)
    support, query = batch.support.x[0], batch.query.x[0]
    linear, _, last = module.double()
    hidden = linear(support)
    mean, deviation = hidden.mean(0), torch.sqrt(hidden.var(0, unbiased=False) + 1e-5)
    embed = [last((linear(x) - mean) / deviation) for x in (support, query)]
    means = torch.stack([embed[0][batch.support.y[0] == way].mean(0) for way in range(2)])
    expected = -((embed[1][:, None] - means) ** 2).sum(2)
    torch.testing.assert_close(predictions(problem, batch), expected.detach(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("policy", ["transductive", "running", "support", "per_step"])
def test_ways_may_differ_between_training_and_test(tmp_path, policy):
    config = unequal_ways(tmp_path, ProtoNet(), policy)
    result = fit(config)
    assert result.step == 2
    assert result.evaluation.inner_steps == 0
    # The validation after each step has 3 ways, of 2 shots; scored on the training split, episodes have 5 ways.
    on_train = evaluate(result.run_dir, split="train", num_workers=0)
    assert on_train.split == "train"


def test_the_ways_of_an_episode_follow_the_split(tmp_path):
    experiment = make_experiment(unequal_ways(tmp_path, ProtoNet()))
    network = experiment.network
    assert network.ways == 5
    assert network.bind(torch.zeros(0), training=False).ways == 3
    assert network.bind(torch.zeros(0), training=False, test_ways=5).ways == 5


def test_episodes_of_other_ways_are_told_apart_where_their_support_sets_have_equal_sizes(tmp_path):
    # 6 ways of 1 shot in training, 3 ways of 2 shots at test: with 3 outputs, classes 3 to 5 could not be scored.
    config = unequal_ways(tmp_path, ProtoNet())
    config = dataclasses.replace(config, task=dataclasses.replace(config.task, train_ways=6))
    result = fit(config)
    on_train = evaluate(result.run_dir, split="train", num_workers=0)
    assert math.isfinite(on_train.policies[0].loss[-1]["mean"])


def test_unequal_ways_are_refused_for_algorithms_with_one_output_a_way(tmp_path):
    config = unequal_ways(tmp_path, MAML())
    with pytest.raises(ConfigError, match=r"5 ways and test episodes 3, but MAML trains one output a way.*proto_net"):
        make_experiment(config)


def test_regression_is_refused():
    with pytest.raises(ModelError, match=r"ProtoNet compares .* task is one of regression\. Use algorithm\.name: r2d2"):
        make_experiment(tiny_config(algorithm=ProtoNet(), task=Sinusoid()))
    with pytest.raises(ModelError, match="regression"):
        curves(ProtoNet())


def test_inner_steps_at_test_are_refused():
    assert tiny_config(algorithm=ProtoNet(), evaluation=EvaluationSettings(inner_steps=0)).inner_steps_at_test == 0
    with pytest.raises(
        ConfigError, match=r"evaluation\.inner_steps is for algorithms with inner steps, got 3 with ProtoNet, .* out"
    ):
        tiny_config(algorithm=ProtoNet(), evaluation=EvaluationSettings(inner_steps=3))


def test_inner_steps_are_no_setting(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("task: {name: sinusoid}\nmodel: {name: mlp}\nalgorithm: {name: proto_net, inner_steps: 1}\n")
    with pytest.raises(ConfigError, match=r"algorithm\.inner_steps is not a known key"):
        load_config(config)
