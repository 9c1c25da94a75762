import numpy as np
import pytest

from metadist.core.keys import TaskKey
from metadist.tasks import Sinusoid
from tests.tasks.contracts import check_task_source

TASKS = 2000


def points(source, tasks):
    """x and y of support and query together, float64 `[tasks, points]`."""
    batch = source.sample([TaskKey(0, "train", 0, task) for task in range(tasks)])
    x, y = (np.concatenate([part[i][..., 0].numpy() for part in batch], axis=1) for i in range(2))
    return x.astype(np.float64), y.astype(np.float64)


def amplitudes_and_phases(x, y):
    """A sin(x - phase) = A cos(phase) sin(x) - A sin(phase) cos(x): least squares in sin(x) and cos(x)."""
    found = []
    for inputs, targets in zip(x, y, strict=True):
        columns = np.stack([np.sin(inputs), -np.cos(inputs)], axis=1)
        (cosine, sine), *_ = np.linalg.lstsq(columns, targets, rcond=None)
        assert np.abs(columns @ [cosine, sine] - targets).max() < 1e-5, "not a sinusoid"
        found.append((np.hypot(cosine, sine), np.arctan2(sine, cosine)))
    return np.array(found).T


def distance_from_uniform(values, low, high):
    """Kolmogorov's: the largest difference between the empirical and the uniform distribution function."""
    share = (np.sort(values) - low) / (high - low)
    ranks = np.arange(1, len(share) + 1) / len(share)
    return max(np.abs(ranks - share).max(), np.abs(ranks - 1 / len(share) - share).max())


@pytest.mark.parametrize("source", [Sinusoid(), Sinusoid(shots=1, queries=7)])
def test_sinusoids_fulfil_the_contract(source):
    check_task_source(source, splits_have_classes=False)


def test_amplitude_phase_and_inputs_are_uniform_in_the_papers_ranges():
    # Kolmogorov-Smirnov at the level 0.001: the distance stays below 1.95 / sqrt(n).
    x, y = points(Sinusoid(shots=5, queries=5), TASKS)
    amplitude, phase = amplitudes_and_phases(x, y)
    slack = 1e-5  # float32 targets
    assert 0.1 - slack <= amplitude.min() < 0.11
    assert 4.99 < amplitude.max() <= 5 + slack
    # The phase of the smallest sinusoids is the least exact: 1e-7 / 0.1.
    assert -slack <= phase.min() < 0.01
    assert np.pi - 0.01 < phase.max() <= np.pi + slack
    assert -5 <= x.min() < -4.99
    assert 4.99 < x.max() <= 5
    assert distance_from_uniform(amplitude, 0.1, 5) < 1.95 / TASKS**0.5
    assert distance_from_uniform(phase, 0, np.pi) < 1.95 / TASKS**0.5
    assert distance_from_uniform(x.ravel(), -5, 5) < 1.95 / x.size**0.5


def test_amplitude_and_phase_are_drawn_independently():
    # The correlation of n independent pairs has the standard deviation 1 / sqrt(n).
    amplitude, phase = amplitudes_and_phases(*points(Sinusoid(shots=5, queries=5), TASKS))
    assert abs(np.corrcoef(amplitude, phase)[0, 1]) < 4 / TASKS**0.5


def test_more_points_are_of_the_same_functions():
    few = amplitudes_and_phases(*points(Sinusoid(shots=3, queries=3), 20))
    many = amplitudes_and_phases(*points(Sinusoid(shots=9, queries=2), 20))
    np.testing.assert_allclose(few, many, atol=1e-4)
