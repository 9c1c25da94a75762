from collections import Counter

import numpy as np
import pytest
from pydantic import ValidationError

from metadist.core.keys import TaskKey
from metadist.core.task_source import spec_of
from metadist.errors import DataError
from metadist.tasks import FewShot, PooledClasses
from metadist.tasks.class_pool import PoolRow, write_pool
from tests.tasks.contracts import bits, check_task_source
from tests.tasks.test_few_shot import CLASSES, EXAMPLES, image_pool, keys, vector_pool

TRAIN = CLASSES["train"]


def drawn(source, names, count):
    """(label, class, turn, example) of all examples of each training mini-batch."""
    batch = source.sample(keys("train", count))
    x = batch.query.x.numpy()
    if source.few_shot.pool.is_images:
        pixels = (x * 255).round().astype(np.uint8)
        np.testing.assert_array_equal(x, pixels.astype(np.float32) / np.float32(255))
        x = pixels
    return [
        [(int(label), *names[example.tobytes()]) for example, label in zip(*task, strict=True)]
        for task in zip(x, batch.query.y, strict=True)
    ]


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (image_pool, {"ways": 3, "shots": 2, "queries": 3}),
        (lambda path: image_pool(path, channels=3), {"ways": 3, "rotate_classes": True}),
        (vector_pool, {"ways": 4, "shots": 1, "queries": 2}),
    ],
)
def test_pooled_classes_fulfil_the_contract(tmp_path, make, settings):
    path, _ = make(tmp_path)
    check_task_source(PooledClasses(pool=path, batch_size=11, **settings).open(), splits_have_classes=True)


@pytest.mark.parametrize(("rotate", "turns"), [(False, 1), (True, 4)])
def test_training_episodes_are_mini_batches_over_all_training_classes(tmp_path, rotate, turns):
    path, _ = image_pool(tmp_path)
    source = PooledClasses(pool=path, batch_size=9, ways=3, shots=2, queries=1, rotate_classes=rotate).open()
    train, test = spec_of(source, "train"), spec_of(source, "test")
    assert (train.output_size, train.support_size, train.query_size) == (turns * TRAIN, 0, 9)
    assert (test.output_size, test.support_size, test.query_size) == (3, 6, 3)
    batch = source.sample(keys("train", 4))
    assert batch.support.x.shape == (4, 0, *train.input_shape)
    assert batch.query.x.shape == (4, 9, *train.input_shape)


@pytest.mark.parametrize(("make", "rotate"), [(image_pool, False), (image_pool, True), (vector_pool, False)])
def test_a_label_stands_for_one_class_and_turn_and_every_example_is_drawn_equally_often(tmp_path, make, rotate):
    path, names = make(tmp_path)
    turns = 4 if rotate else 1
    batches = drawn(PooledClasses(pool=path, batch_size=20, rotate_classes=rotate).open(), names, 600)
    assert all(len(set(batch)) == 20 for batch in batches), "an example is twice in a mini-batch"
    examples = [example for batch in batches for example in batch]
    labels = {(label, (number, turn)) for label, number, turn, _ in examples}
    assert sorted(label for label, _ in labels) == list(range(turns * TRAIN))
    assert len({name for _, name in labels}) == turns * TRAIN
    # 600 mini-batches hold a given one of n examples with probability p = 20 / n each; the largest of
    # n <= 168 binomial deviations stays below 5 sigma.
    counts = Counter(example[1:] for example in examples)
    assert len(counts) == turns * TRAIN * EXAMPLES
    p = 20 / len(counts)
    assert max(abs(n - 600 * p) for n in counts.values()) < 5 * (600 * p * (1 - p)) ** 0.5


@pytest.mark.parametrize("rotate", [False, True])
def test_val_and_test_episodes_are_those_of_few_shot_to_the_bit(tmp_path, rotate):
    path, _ = image_pool(tmp_path)
    sizes = {"pool": path, "ways": 4, "shots": 2, "queries": 3, "rotate_classes": rotate}
    pooled, few_shot = PooledClasses(**sizes, batch_size=5).open(), FewShot(**sizes).open()
    assert pooled.spec == few_shot.spec
    for split in ("val", "test"):
        asked = [TaskKey(9, split, 0, task) for task in range(5)]
        found, expected = pooled.sample(asked), few_shot.sample(asked)
        assert [bits(found, task) for task in range(5)] == [bits(expected, task) for task in range(5)]


def test_read_only_arrays_serve_and_stay_as_they_are(tmp_path):
    path, _ = image_pool(tmp_path)
    source = PooledClasses(pool=path, batch_size=12, rotate_classes=True).open()
    expected = source.sample(keys("train", 3))
    for array in (source.few_shot.pool.examples, source.labels, source.rows):
        array.flags.writeable = False
    before = source.few_shot.pool.examples.tobytes()
    found = source.sample(keys("train", 3))
    assert [bits(found, task) for task in range(3)] == [bits(expected, task) for task in range(3)]
    found.query.x.zero_()
    assert source.few_shot.pool.examples.tobytes() == before


@pytest.mark.parametrize(("rotate", "examples"), [(False, TRAIN * EXAMPLES), (True, 4 * TRAIN * EXAMPLES)])
def test_a_mini_batch_larger_than_the_training_split_is_refused(tmp_path, rotate, examples):
    path, _ = image_pool(tmp_path)
    PooledClasses(pool=path, batch_size=examples, rotate_classes=rotate).open().sample(keys("train", 1))
    with pytest.raises(DataError, match=rf"batch_size = {examples + 1} is more than the {examples} examples of split"):
        PooledClasses(pool=path, batch_size=examples + 1, rotate_classes=rotate).open()
    with pytest.raises(ValidationError):
        PooledClasses(pool=path, batch_size=0)


def test_a_pool_without_training_classes_is_refused(tmp_path):
    rows = [PoolRow(f"{c}", None, "test", features=[float(n)]) for c in range(5) for n in range(2)]
    write_pool(rows, tmp_path / "pool.parquet")
    with pytest.raises(DataError, match="is more than the 0 examples of split 'train'"):
        PooledClasses(pool=str(tmp_path / "pool.parquet")).open()
