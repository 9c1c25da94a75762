import dataclasses
import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from metadist.core.keys import SPLITS, TaskKey
from metadist.core.task_source import spec_of
from metadist.errors import DataError
from metadist.tasks import FewShot
from metadist.tasks.class_pool import PoolRow, write_pool
from tests.tasks.contracts import check_task_source

CLASSES = {"train": 7, "val": 6, "test": 5}
EXAMPLES = 6
SIZE = 5


def random_images(channels, seed=0):
    """uint8 `[classes, examples, channels, height, width]`, each class noise: no two turns of any two are equal."""
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (sum(CLASSES.values()), EXAMPLES, channels, SIZE, SIZE), dtype=np.uint8)


def splits():
    return [split for split, number in CLASSES.items() for _ in range(number)]


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, -1)).save(file, "PNG")
    return file.getvalue()


def image_pool(tmp_path, channels=1):
    """A pool's path, and which (class, turn, example) each image is, by its pixels; turns are counter-clockwise."""
    images = random_images(channels)
    rows = [
        PoolRow(f"class {number}", None, split, image=png(images[number, example]))
        for number, split in enumerate(splits())
        for example in range(EXAMPLES)
    ]
    # Rows of a class need not lie together.
    np.random.default_rng(1).shuffle(rows)
    write_pool(rows, tmp_path / "pool.parquet")
    names = {
        np.rot90(images[number, example], turn, axes=(-2, -1)).tobytes(): (number, turn, example)
        for number in range(len(images))
        for example in range(EXAMPLES)
        for turn in range(4)
    }
    return str(tmp_path / "pool.parquet"), names


def vector_pool(tmp_path):
    random = np.random.default_rng(2)
    vectors = random.standard_normal((sum(CLASSES.values()), EXAMPLES, 3)).astype(np.float32)
    rows = [
        PoolRow(f"class {number}", None, split, features=vectors[number, example].tolist())
        for number, split in enumerate(splits())
        for example in range(EXAMPLES)
    ]
    write_pool(rows, tmp_path / "pool.parquet")
    names = {vectors[c, e].tobytes(): (c, 0, e) for c in range(len(vectors)) for e in range(EXAMPLES)}
    return str(tmp_path / "pool.parquet"), names


def keys(split, count):
    return [TaskKey(0, split, 0, task) for task in range(count)]


def recognised(source, names, split, count):
    """For each episode: (label, class, turn, example) of all its support and query examples."""
    batch = source.sample(keys(split, count))
    images = source.pool.is_images

    def read(x, y):
        # Images are value / 255, so that times 255 they are whole numbers again.
        pixels = (x * 255).round().numpy().astype(np.uint8) if images else x.numpy()
        if images:
            np.testing.assert_array_equal(x.numpy(), pixels.astype(np.float32) / np.float32(255))
        return [(int(label), *names[example.tobytes()]) for example, label in zip(pixels, y, strict=True)]

    return [tuple(read(part.x[task], part.y[task]) for part in batch) for task in range(count)]


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (image_pool, {"ways": 3, "shots": 2, "queries": 3}),
        (image_pool, {"ways": 5, "shots": 1, "queries": 5, "rotate_classes": True}),
        (lambda path: image_pool(path, channels=3), {"ways": 3, "shots": 2, "queries": 1, "rotate_classes": True}),
        (vector_pool, {"ways": 4, "shots": 1, "queries": 2}),
        (image_pool, {"ways": 3, "shots": 2, "queries": 3, "train_ways": 7, "train_shots": 1, "train_queries": 4}),
        (vector_pool, {"ways": 4, "shots": 1, "queries": 2, "train_shots": 3}),
    ],
)
def test_few_shot_episodes_fulfil_the_contract(tmp_path, make, settings):
    path, _ = make(tmp_path)
    check_task_source(FewShot(pool=path, **settings).open(), splits_have_classes=True)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("rotate", [False, True])
def test_labels_number_the_classes_of_an_episode(tmp_path, channels, rotate):
    path, names = image_pool(tmp_path, channels)
    source = FewShot(pool=path, ways=5, shots=2, queries=3, rotate_classes=rotate).open()
    assert source.spec.input_shape == (channels, SIZE, SIZE)
    for support, query in recognised(source, names, "train", 40):
        assert Counter(label for label, *_ in support) == dict.fromkeys(range(5), 2)
        assert Counter(label for label, *_ in query) == dict.fromkeys(range(5), 3)
        # A label stands for one (class, turn) and no other has it; no example of it is drawn twice.
        named = {(label, (number, turn)) for label, number, turn, _ in support + query}
        assert len(named) == len({name for _, name in named}) == 5
        assert len(set(support + query)) == 25


def test_every_class_gets_every_label(tmp_path):
    path, names = image_pool(tmp_path)
    source = FewShot(pool=path, ways=3, shots=1, queries=1).open()
    episodes = recognised(source, names, "train", 210)
    drawn = Counter((label, number) for support, _ in episodes for label, number, *_ in support)
    # 7 classes, 210 episodes: each (label, class) 30 times with the standard deviation sqrt(210 * 6 / 49) = 5.1.
    assert len(drawn) == 3 * 7
    assert all(abs(times - 30) < 4 * 5.1 for times in drawn.values())


def test_every_example_of_a_class_is_drawn_into_support_and_query(tmp_path):
    path, names = image_pool(tmp_path)
    source = FewShot(pool=path, ways=5, shots=2, queries=3).open()
    for part in range(2):
        drawn = {
            (number, example) for task in recognised(source, names, "val", 80) for _, number, _, example in task[part]
        }
        assert len(drawn) == CLASSES["val"] * EXAMPLES


def test_no_class_is_in_two_splits_and_each_split_has_all_of_its_own(tmp_path):
    path, names = image_pool(tmp_path)
    source = FewShot(pool=path, ways=5, shots=1, queries=1, rotate_classes=True).open()
    found = {}
    for split in SPLITS:
        episodes = recognised(source, names, split, 80)
        found[split] = {number for support, _ in episodes for _, number, *_ in support}
    assert found == {"train": set(range(7)), "val": set(range(7, 13)), "test": set(range(13, 18))}


def test_training_episodes_may_have_other_sizes_than_those_at_test(tmp_path):
    path, names = image_pool(tmp_path)
    source = FewShot(pool=path, ways=5, shots=1, queries=2, train_ways=7, train_shots=3, train_queries=1).open()
    for split, (ways, shots, queries) in {"train": (7, 3, 1), "val": (5, 1, 2), "test": (5, 1, 2)}.items():
        spec = spec_of(source, split)
        assert (spec.output_size, spec.support_size, spec.query_size) == (ways, ways * shots, ways * queries)
        for support, query in recognised(source, names, split, 10):
            assert Counter(label for label, *_ in support) == dict.fromkeys(range(ways), shots)
            assert Counter(label for label, *_ in query) == dict.fromkeys(range(ways), queries)


@pytest.mark.parametrize("name", ["ways", "shots", "queries"])
def test_a_size_of_training_episodes_that_is_left_out_is_as_at_test(tmp_path, name):
    path, _ = image_pool(tmp_path)
    settings = FewShot(pool=path, ways=5, shots=1, queries=2, **{f"train_{name}": 3})
    assert settings.sizes("test") == (5, 1, 2)
    assert settings.sizes("train") == settings.sizes("test")._replace(**{name: 3})


def test_sizes_of_training_episodes_leave_the_bits_of_all_others_alone(tmp_path):
    path, _ = image_pool(tmp_path)
    plain = FewShot(pool=path, ways=4, shots=2, queries=3)
    sources = plain.open(), dataclasses.replace(plain, train_ways=6, train_queries=1).open()
    alike = plain.open(), dataclasses.replace(plain, train_ways=4, train_shots=2, train_queries=3).open()
    for split, pair in [("train", alike), ("val", sources), ("test", sources), ("test", alike)]:
        one, other = ([t.numpy().tobytes() for p in s.sample(keys(split, 4)) for t in p] for s in pair)
        assert one == other


def test_turned_classes_are_three_more_classes_each(tmp_path):
    path, names = image_pool(tmp_path)
    source = FewShot(pool=path, ways=20, shots=1, queries=1, rotate_classes=True).open()
    # 5 test classes in 4 turns: every episode of 20 ways holds each of them once, as another way.
    for support, _ in recognised(source, names, "test", 5):
        assert {(number, turn) for _, number, turn, _ in support} == {(c, t) for c in range(13, 18) for t in range(4)}


def test_without_rotation_every_image_stands_upright(tmp_path):
    path, names = image_pool(tmp_path)
    source = FewShot(pool=path, ways=5, shots=1, queries=1).open()
    turns = {turn for task in recognised(source, names, "train", 40) for part in task for _, _, turn, _ in part}
    assert turns == {0}


def test_vectors_are_given_as_they_are(tmp_path):
    path, names = vector_pool(tmp_path)
    source = FewShot(pool=path, ways=5, shots=2, queries=3).open()
    assert source.spec.input_shape == (3,)
    for support, query in recognised(source, names, "test", 10):
        assert len({(label, number) for label, number, *_ in support + query}) == 5


def test_arrays_that_are_read_only_serve_and_stay_as_they_are(tmp_path):
    # So they come from Ray's object store, shared by all adapters of a node.
    for make, rotate in ((image_pool, True), (vector_pool, False)):
        path, _ = make(tmp_path)
        source = FewShot(pool=path, ways=5, shots=1, queries=1, rotate_classes=rotate).open()
        expected = source.sample(keys("train", 4))
        for array in (source.pool.examples, source.pool.starts, *source.pool.class_ids.values()):
            array.flags.writeable = False
        before = source.pool.examples.tobytes()
        found = source.sample(keys("train", 4))
        assert [t.numpy().tobytes() for part in found for t in part] == [
            t.numpy().tobytes() for part in expected for t in part
        ]
        found.support.x.zero_()
        assert source.pool.examples.tobytes() == before


@pytest.mark.parametrize(("rotate", "classes"), [(False, 5), (True, 20)])
def test_more_ways_than_the_split_has_classes_are_refused(tmp_path, rotate, classes):
    path, _ = image_pool(tmp_path)
    FewShot(pool=path, ways=classes, rotate_classes=rotate).open().sample(keys("test", 1))
    source = FewShot(pool=path, ways=classes + 1, rotate_classes=rotate).open()
    message = rf"task\.ways = {classes + 1} is more than the {classes} classes of split 'test'"
    with pytest.raises(DataError, match=message):
        source.sample(keys("test", 1))


def test_a_class_with_too_few_examples_is_refused_by_its_name(tmp_path):
    rows = [PoolRow("large", None, "train", features=[float(n)]) for n in range(4)]
    rows += [PoolRow("small", None, "train", features=[float(n)]) for n in range(3)]
    write_pool(rows, tmp_path / "pool.parquet")
    FewShot(pool=str(tmp_path / "pool.parquet"), ways=2, shots=2, queries=1).open()
    with pytest.raises(DataError, match=r"class 'small' \(train\) has 3 examples, .* 2 \+ 2 = 4 are needed"):
        FewShot(pool=str(tmp_path / "pool.parquet"), ways=2, shots=2, queries=2).open()


def test_each_split_needs_only_what_its_own_episodes_take(tmp_path):
    # 4 examples a training class, 3 a test class.
    rows = [
        PoolRow(f"{split} {number}", None, split, features=[float(n)])
        for split, size in (("train", 4), ("test", 3))
        for number in range(3)
        for n in range(size)
    ]
    write_pool(rows, tmp_path / "pool.parquet")
    path = str(tmp_path / "pool.parquet")
    fits = FewShot(pool=path, ways=2, shots=2, queries=1, train_ways=3, train_shots=3).open()
    fits.sample(keys("train", 1))
    with pytest.raises(
        DataError, match=r"\(train\) has 4 examples, and task\.train_shots \+ task\.queries = 4 \+ 1 = 5"
    ):
        FewShot(pool=path, ways=2, shots=2, queries=1, train_shots=4).open()
    with pytest.raises(DataError, match=r"\(test\) has 3 examples, and task\.shots \+ task\.queries = 2 \+ 2 = 4 are"):
        FewShot(pool=path, ways=2, shots=2, queries=2, train_queries=1).open()
    too_many = FewShot(pool=path, ways=2, shots=2, queries=1, train_ways=4).open()
    too_many.sample(keys("test", 1))
    with pytest.raises(DataError, match=r"task\.train_ways = 4 is more than the 3 classes of split 'train'"):
        too_many.sample(keys("train", 1))


def test_only_square_images_can_be_turned(tmp_path):
    path, _ = vector_pool(tmp_path)
    with pytest.raises(DataError, match=r"rotate_classes needs square images, got vectors"):
        FewShot(pool=path, rotate_classes=True).open()
    flat = [
        PoolRow(f"class {number}", None, "train", image=png(np.full((1, 4, 6), number + example, np.uint8)))
        for number in range(5)
        for example in range(2)
    ]
    write_pool(flat, tmp_path / "flat.parquet")
    with pytest.raises(DataError, match=r"rotate_classes needs square images, got 6 x 4 pixels"):
        FewShot(pool=str(tmp_path / "flat.parquet"), rotate_classes=True).open()


@pytest.mark.parametrize("rotate", [False, True])
def test_the_classes_of_an_episode_are_those_of_its_images_in_the_order_of_their_labels(tmp_path, rotate):
    path, names = image_pool(tmp_path)
    source = FewShot(pool=path, ways=4, shots=1, queries=2, rotate_classes=rotate).open()
    for task in range(10):
        key = TaskKey(0, "test", 0, task)
        pixels = (source.sample([key]).support.x[0].numpy() * 255).round().astype(np.uint8)
        drawn = [names[image.tobytes()][:2] for image in pixels]
        told = source.classes_of(key)
        assert [(each.name, each.turn) for each in told] == [(f"class {number}", turn) for number, turn in drawn]
        assert any(each.turn for each in told) == rotate


def test_the_family_of_an_episode_is_the_superclass_that_all_its_classes_share(tmp_path):
    rows = [
        PoolRow(f"{split}{number}", "odd" if number % 2 and split == "test" else "even", split, features=[float(row)])
        for split in ("train", "test")
        for number in range(4)
        for row in range(2)
    ]
    write_pool(rows, tmp_path / "pool.parquet")
    source = FewShot(pool=str(tmp_path / "pool.parquet"), ways=2).open()
    found = set()
    for task in range(30):
        key = TaskKey(0, "test", 0, task)
        superclasses = {each.superclass for each in source.classes_of(key)}
        family = superclasses.pop() if len(superclasses) == 1 else None
        assert source.family_of(key) == family
        found.add(family)
    assert found == {"odd", "even", None}
    assert source.family_of(TaskKey(0, "train", 0, 0)) == "even"
