import numpy as np
import pytest

from metadist.core.keys import TaskKey
from metadist.tasks import FunctionShapes
from tests.tasks.contracts import check_task_source

TASKS = 500
EXACT = 1e-5
"""What float32 leaves of a residual."""


def points(source, tasks=TASKS):
    """x and y of support and query together, float64 `[tasks, points]`."""
    batch = source.sample([TaskKey(0, "train", 0, task) for task in range(tasks)])
    x, y = (np.concatenate([part[i][..., 0].numpy() for part in batch], axis=1) for i in range(2))
    return x.astype(np.float64), y.astype(np.float64)


def least_squares(columns, y):
    columns = np.stack([*columns, np.ones_like(y)], axis=1)
    found, *_ = np.linalg.lstsq(columns, y, rcond=None)
    return np.abs(columns @ found - y).max(), found


def with_best_centre(curve, x, y):
    """Fits `scale * curve(x - centre) + offset`, the centre by ever finer grids around the best so far."""
    centre, width = 0.0, 3.0
    for _ in range(12):
        centres = centre + width * np.linspace(-1, 1, 61)
        columns = curve(x - centres[:, None])
        columns -= columns.mean(1, keepdims=True)
        scales = columns @ y / (columns**2).sum(1)
        residuals = np.abs(scales[:, None] * columns - (y - y.mean())).max(1)
        centre, width = centres[residuals.argmin()], width / 10
    residual, (scale, offset) = least_squares([curve(x - centre)], y)
    return residual, scale, centre, offset


def recognise(x, y):
    """The family of one task's points with its amplitude (signed), centre (None for a line) and offset."""
    residual, (slope, offset) = least_squares([x], y)
    if residual < EXACT:
        return "line", 3 * slope, None, offset
    residual, (square, slope, constant) = least_squares([x**2, x], y)
    if residual < EXACT:
        # q (x - c)^2 + b = q x^2 - 2 q c x + (q c^2 + b) with q = s a / 10.
        centre = -slope / (2 * square)
        return "parabola", 10 * square, centre, constant - square * centre**2
    residual, (sine, cosine, offset) = least_squares([np.sin(x), np.cos(x)], y)
    if residual < EXACT:
        # a sin(x - c) = a cos(c) sin(x) - a sin(c) cos(x).
        return "sinusoid", np.hypot(sine, cosine), np.arctan2(-cosine, sine), offset
    for name, curve, factor in (("absolute", np.abs, 3), ("tanh", np.tanh, 1)):
        residual, scale, centre, offset = with_best_centre(curve, x, y)
        if residual < EXACT:
            return name, factor * scale, centre, offset
    raise AssertionError("none of the five families")


@pytest.fixture(scope="module")
def recognised():
    return [recognise(*task) for task in zip(*points(FunctionShapes(shots=20, queries=20)), strict=True)]


@pytest.mark.parametrize("source", [FunctionShapes(), FunctionShapes(shots=1, queries=7, noise=0.5)])
def test_function_shapes_fulfil_the_contract(source):
    check_task_source(source, splits_have_classes=False)


def test_all_five_shapes_occur_equally_often(recognised):
    # Binomial: 500 / 5 = 100 with the standard deviation sqrt(500 * 0.2 * 0.8) = 9.
    names = [name for name, *_ in recognised]
    assert set(names) == {"sinusoid", "line", "parabola", "absolute", "tanh"}
    assert all(abs(names.count(name) - 100) < 4 * 9 for name in set(names))


@pytest.mark.parametrize("shape", ["sinusoid", "line", "parabola", "absolute", "tanh"])
def test_each_shape_has_the_documented_ranges(recognised, shape):
    # About 100 uniform draws come within a tenth of each end, except once in 100,000 times (0.9^100).
    _, amplitudes, centres, offsets = zip(*(task for task in recognised if task[0] == shape), strict=True)
    slack = 1e-3  # Of fitted centres and amplitudes.
    sizes = np.abs(amplitudes)
    assert 0.5 - slack <= sizes.min() < 0.75
    assert 2.75 < sizes.max() <= 3 + slack
    assert -1 - slack <= min(offsets) < -0.8
    assert 0.8 < max(offsets) <= 1 + slack
    if shape != "line":
        assert -3 - slack <= min(centres) < -2.4
        assert 2.4 < max(centres) <= 3 + slack
    if shape != "sinusoid":
        # Half of them fall: 50 of 100 with the standard deviation 5.
        assert abs(np.mean(np.array(amplitudes) < 0) - 0.5) < 4 * 0.5 / len(amplitudes) ** 0.5


def test_noise_is_normal_of_the_given_deviation_on_y_of_both_sets_alone():
    exact, noisy = (FunctionShapes(shots=20, queries=20, noise=noise) for noise in (0.0, 0.3))
    (x, y), (noisy_x, noisy_y) = points(exact), points(noisy)
    assert (x == noisy_x).all()
    noise = (noisy_y - y) / 0.3
    # n = 10,000 a set: mean and deviation of normal numbers err by 1 / sqrt(n) and 1 / sqrt(2 n).
    for part in (noise[:, :20], noise[:, 20:]):
        assert abs(part.mean()) < 4 / part.size**0.5
        assert abs(part.std() - 1) < 4 / (2 * part.size) ** 0.5
        # 68.27 % lie within one deviation.
        assert abs((np.abs(part) < 1).mean() - 0.6827) < 4 * 0.4655 / part.size**0.5


def test_inputs_fill_the_interval():
    x, _ = points(FunctionShapes(shots=20, queries=20))
    assert -5 <= x.min() < -4.99
    assert 4.99 < x.max() <= 5


def test_the_family_of_a_task_is_the_shape_that_its_points_have(recognised):
    told = [FunctionShapes().family_of(TaskKey(0, "train", 0, task)) for task in range(TASKS)]
    assert told == [name for name, *_ in recognised]
