"""Calibration: sums by bin of confidence, the error of Guo et al. (2017), and that it is the same however computed."""

import numpy as np
import pytest
import torch

from metadist.algorithms import MAML
from metadist.core.calibration import BINS, Calibration, bin_sums
from metadist.core.meta_gradient import score_episodes
from metadist.core.plan import Range, plan_evaluation
from metadist.distributed.adapter import Adapter
from metadist.experiment import make_experiment
from tests.builders import Problem, classification, random_episodes, small_conv4, tiny_config

IMAGES = classification((1, 16, 16), ways=3, shots=2, queries=4)


def calibration_of(logits: torch.Tensor, targets: torch.Tensor) -> Calibration:
    return Calibration.of(bin_sums(logits, targets).numpy()[None])


def test_the_error_of_four_predictions_is_that_worked_out_by_hand() -> None:
    # Confidences .50, .52, .90, .90 lie in bins 7 (.467, .533] twice and 13 (.867, .933] twice, counted from 0.
    # Right are the first and the last two: |1 - 1.02| / 4 + |2 - 1.8| / 4 = .055.
    probabilities = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.52, 0.28], [0.05, 0.05, 0.9], [0.9, 0.05, 0.05]])
    found = calibration_of(probabilities.double().log(), torch.tensor([0, 0, 2, 0]))
    assert {number: count for number, count in enumerate(found.counts) if count} == {7: 2, 13: 2}
    assert found.ece == pytest.approx(0.055, abs=1e-7)
    shown = found.as_dict()
    assert shown["bins"][7] == {
        "lower": 7 / 15,
        "upper": 8 / 15,
        "count": 2,
        "confidence": pytest.approx(0.51),
        "accuracy": 0.5,
    }
    assert shown["bins"][8]["accuracy"] is None


def test_a_bin_holds_its_upper_edge_and_not_its_lower_one() -> None:
    # Equal logits over 3 and over 5 ways: confidences of exactly 1/3 = 5/15 and 1/5 = 3/15, which end bins 4 and 2.
    for ways, number in ((3, 4), (5, 2)):
        found = calibration_of(torch.zeros(1, ways, dtype=torch.float64), torch.tensor([0]))
        assert [n for n, count in enumerate(found.counts) if count] == [number]
    sure = calibration_of(torch.tensor([[200.0, 0.0]]), torch.tensor([0]))
    assert sure.counts == (0,) * (BINS - 1) + (1,)
    assert sure.ece == 0


def slow_ece(logits: np.ndarray, targets: np.ndarray) -> float:
    """Equation 3 as it stands, one prediction at a time."""
    members: list[list[tuple[float, bool]]] = [[] for _ in range(15)]
    for row, target in zip(logits, targets, strict=True):
        exponentials = [np.exp(value - max(row)) for value in row]
        probabilities = [value / sum(exponentials) for value in exponentials]
        confidence = max(probabilities)
        for m in range(1, 16):
            if (m - 1) / 15 < confidence <= m / 15:
                members[m - 1].append((confidence, probabilities.index(confidence) == target))
    error = 0.0
    for bin_members in members:
        if bin_members:
            accuracy = sum(right for _, right in bin_members) / len(bin_members)
            mean_confidence = sum(confidence for confidence, _ in bin_members) / len(bin_members)
            error += len(bin_members) / len(logits) * abs(accuracy - mean_confidence)
    return error


@pytest.mark.parametrize(("ways", "scale"), [(2, 1.0), (5, 3.0), (20, 1.0)])
def test_the_error_is_that_of_a_slow_loop_over_the_papers_equation(ways: int, scale: float) -> None:
    random = np.random.default_rng(ways)
    logits = scale * random.standard_normal((400, ways))
    targets = random.integers(0, ways, 400)
    # Summed over 8 episodes of 50, as an evaluation does.
    sums = [bin_sums(torch.tensor(part), torch.tensor(of)) for part, of in zip(*blocks(logits, targets), strict=True)]
    found = Calibration.of(torch.stack(sums).numpy())
    assert found.ece == pytest.approx(slow_ece(logits, targets), abs=1e-9)
    assert found.ece > 0.05


def blocks(*arrays: np.ndarray) -> list[list[np.ndarray]]:
    return [np.split(array, 8) for array in arrays]


def test_targets_drawn_from_the_predictions_are_well_calibrated() -> None:
    # Each bin's gap |correct - confidence| has a standard deviation of at most sqrt(count) / 2, so by Cauchy-Schwarz
    # the expected error is at most sqrt(15 n) / (2 n) = .0061 for n = 100,000. Sharper predictions are overconfident.
    random = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(100_000, 5, generator=random, dtype=torch.float64)
    targets = torch.multinomial(torch.softmax(logits, -1), 1, generator=random)[:, 0]
    bound = (15 / 100_000) ** 0.5 / 2
    assert calibration_of(logits, targets).ece < bound
    assert calibration_of(2 * logits, targets).ece > 10 * bound


def test_a_diverged_model_has_no_error_rather_than_a_wrong_one() -> None:
    logits = torch.tensor([[1.0, 0.0], [torch.nan, 0.0]])
    assert np.isnan(calibration_of(logits, torch.tensor([0, 0])).ece)


@pytest.mark.parametrize("strategy", ["loop", "vmap"])
def test_each_episode_policy_and_inner_step_has_the_sums_of_its_own_predictions(strategy: str) -> None:
    problem = Problem(MAML(inner_lr=0.4, inner_steps=2), small_conv4(IMAGES), IMAGES)
    batch = random_episodes(IMAGES, tasks=3)
    scores = score_episodes(
        problem.algorithm,
        problem.network,
        problem.layout,
        problem.theta,
        problem.statistics,
        batch,
        inner_steps=2,
        policies=["transductive", "support"],
        strategy=strategy,
    )
    assert scores.calibration.shape == (2, 3, 3, 3, BINS)
    counts, confidence, correct = np.moveaxis(scores.calibration, 3, 0).sum(-1)
    assert (counts == 12).all()
    np.testing.assert_allclose(correct / 12, scores.accuracy)
    for number, policy in enumerate(("transductive", "support")):
        network = problem.network.bind(problem.statistics, training=False, policy=policy)
        meta = problem.layout.unflatten(problem.theta)
        for task in range(3):
            support, query = (type(part)(part.x[task], part.y[task]) for part in batch)
            for step, phi in enumerate(problem.algorithm.adapt(network, meta, support, 2)):
                logits = network.outputs(phi, query.x, reference=support.x)
                expected = torch.softmax(logits, -1).amax(-1).sum().item()
                assert confidence[number, task, step] == pytest.approx(expected, rel=1e-9)
    assert len(np.unique(confidence)) == confidence.size, "policies, tasks and steps all differ"


def test_regression_has_no_calibration() -> None:
    experiment = make_experiment(tiny_config())
    plan = plan_evaluation(0, "test", 5, 3)
    published = np.concatenate([experiment.initial_theta, experiment.initial_statistics])
    scores = Adapter(experiment).score_range(plan, Range(0, 2), published, 2, ["transductive"])
    assert scores.calibration.shape == (1, 5, 3, 3, 0)
