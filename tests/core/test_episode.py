import numpy as np
import pytest
import torch

from metadist.core.episode import EpisodeBatch, Examples
from metadist.core.keys import TaskKey
from metadist.errors import EpisodeError
from tests.builders import classification, random_episodes, regression

KEYS = [TaskKey(1, "train", 4, task) for task in (7, 8)]
FEW_SHOT = classification((1, 4, 4), ways=3, shots=2, queries=1)
CURVES = regression(inputs=2, outputs=1, support_size=3, query_size=5)


class MySource:
    pass


def episodes(spec):
    return random_episodes(spec, len(KEYS), dtype=torch.float32)


def check(spec, batch):
    spec.check(batch, KEYS, MySource())


def replaced(batch, part, field, value):
    return batch._replace(**{part: getattr(batch, part)._replace(**{field: value})})


@pytest.mark.parametrize("spec", [FEW_SHOT, CURVES])
def test_episodes_of_the_specs_shape_pass(spec):
    check(spec, episodes(spec))


@pytest.mark.parametrize("part", ["support", "query"])
@pytest.mark.parametrize("spec", [FEW_SHOT, CURVES])
def test_arrays_that_are_no_tensors_are_refused(spec, part):
    batch = replaced(episodes(spec), part, "x", np.zeros(3))
    with pytest.raises(EpisodeError, match=rf"task source MySource: {part}\.x must be a torch tensor, got ndarray"):
        check(spec, batch)


@pytest.mark.parametrize(
    ("spec", "part", "field", "shape", "expected"),
    [
        (FEW_SHOT, "support", "x", (1, 6, 1, 4, 4), [2, 6, 1, 4, 4]),
        (FEW_SHOT, "support", "x", (2, 5, 1, 4, 4), [2, 6, 1, 4, 4]),
        (FEW_SHOT, "query", "x", (2, 3, 16), [2, 3, 1, 4, 4]),
        (FEW_SHOT, "query", "y", (2, 3, 1), [2, 3]),
        (CURVES, "support", "y", (2, 3), [2, 3, 1]),
        (CURVES, "query", "y", (2, 5, 2), [2, 5, 1]),
    ],
)
def test_another_shape_than_the_specs_is_refused_with_both_shapes(spec, part, field, shape, expected):
    kind = torch.int64 if spec is FEW_SHOT and field == "y" else torch.float32
    batch = replaced(episodes(spec), part, field, torch.zeros(shape, dtype=kind))
    with pytest.raises(EpisodeError) as caught:
        check(spec, batch)
    assert f"MySource: {part}.{field} must have the shape {expected}" in str(caught.value)
    assert f"got {list(shape)}" in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "field", "kind", "needed"),
    [
        (FEW_SHOT, "x", torch.float64, torch.float32),
        (FEW_SHOT, "x", torch.uint8, torch.float32),
        (FEW_SHOT, "y", torch.int32, torch.int64),
        (FEW_SHOT, "y", torch.float32, torch.int64),
        (CURVES, "y", torch.float64, torch.float32),
    ],
)
def test_another_type_of_numbers_is_refused(spec, field, kind, needed):
    batch = episodes(spec)
    batch = replaced(batch, "query", field, getattr(batch.query, field).to(kind))
    with pytest.raises(EpisodeError, match=rf"query\.{field} must be {needed}, got {kind}\. Convert it"):
        check(spec, batch)


@pytest.mark.parametrize(("label", "shown"), [(3, "0..3"), (-1, "-1..2")])
def test_labels_beyond_the_ways_are_refused_with_their_range(label, shown):
    batch = episodes(FEW_SHOT)
    batch.support.y[1] = torch.tensor([0, 1, 2, 0, 1, label])
    with pytest.raises(EpisodeError) as caught:
        check(FEW_SHOT, batch)
    assert f"support.y must lie in 0..2, got {shown}" in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("part", "field"), [("support", "x"), ("support", "y"), ("query", "x"), ("query", "y")])
def test_values_that_are_not_finite_are_refused_with_their_task(part, field, value):
    batch = episodes(CURVES)
    getattr(getattr(batch, part), field)[1, 2, 0] = value
    with pytest.raises(EpisodeError) as caught:
        check(CURVES, batch)
    assert f"{part} set of task train/seed=1/step=4/task=8 holds NaN or infinity" in str(caught.value)


def test_a_batch_for_other_keys_is_refused():
    x, y = torch.zeros(3, 3, 2), torch.zeros(3, 3, 1)
    batch = EpisodeBatch(Examples(x, y), Examples(torch.zeros(3, 5, 2), torch.zeros(3, 5, 1)))
    with pytest.raises(EpisodeError, match=r"shape \[2, 3, 2\]"):
        check(CURVES, batch)
