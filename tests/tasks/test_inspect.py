import hashlib
import io
import json

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from rich.console import Console

from metadist.commands.data import data
from metadist.errors import DataError
from metadist.tasks.class_pool import PoolRow, write_pool
from metadist.tasks.inspect import inspect_pool, render


def encode(value, shape=(2, 2), file_format="PNG"):
    file = io.BytesIO()
    Image.fromarray(np.full(shape, value, np.uint8)).save(file, file_format)
    return file.getvalue()


def pool_of(path, rows):
    write_pool(rows, path)
    return str(path)


ROWS = [
    *[PoolRow("ant", "insects", "train", image=encode(number)) for number in range(3)],
    *[PoolRow("bee", "insects", "train", image=encode(number)) for number in range(5)],
    *[PoolRow("cat", "mammals", "train", image=encode(number)) for number in range(4)],
    *[PoolRow("dog", "mammals", "test", image=encode(number)) for number in range(2)],
]


@pytest.fixture
def pool(tmp_path):
    return pool_of(tmp_path / "pool.parquet", ROWS)


def test_a_pool_is_described_by_what_can_be_drawn_from_it(pool):
    summary = inspect_pool(pool)
    digest = summary.pop("content_sha256")
    assert len(digest) == 64
    # train: ant 3, bee 5, cat 4 examples of insects and mammals; square images turn in 4 ways
    assert summary == {
        "pool": pool,
        "kind": "images",
        "shape": [1, 2, 2],
        "examples": 14,
        "classes": 4,
        "splits": {
            "train": {
                "classes": 3,
                "examples": 12,
                "superclasses": 2,
                "smallest_class": {"name": "ant", "examples": 3},
                "largest_class": {"name": "bee", "examples": 5},
                "max_ways": 3,
                "max_ways_with_rotations": 12,
                "max_shots_plus_queries": 3,
            },
            "val": {
                "classes": 0,
                "examples": 0,
                "superclasses": 0,
                "smallest_class": None,
                "largest_class": None,
                "max_ways": 0,
                "max_ways_with_rotations": 0,
                "max_shots_plus_queries": 0,
            },
            "test": {
                "classes": 1,
                "examples": 2,
                "superclasses": 1,
                "smallest_class": {"name": "dog", "examples": 2},
                "largest_class": {"name": "dog", "examples": 2},
                "max_ways": 1,
                "max_ways_with_rotations": 4,
                "max_shots_plus_queries": 2,
            },
        },
    }


@pytest.mark.parametrize(
    ("row", "kind", "shape"),
    [
        (PoolRow("a", None, "train", image=encode(1, (2, 3, 3))), "images", [3, 2, 3]),
        (PoolRow("a", None, "train", features=[1.0, 2.0]), "vectors", [2]),
    ],
)
def test_only_square_images_have_rotations(tmp_path, row, kind, shape):
    summary = inspect_pool(pool_of(tmp_path / "pool.parquet", [row]))
    assert (summary["kind"], summary["shape"]) == (kind, shape)
    assert summary["splits"]["train"]["max_ways_with_rotations"] == 1
    assert summary["splits"]["train"]["superclasses"] == 0


def test_the_content_digest_is_that_of_its_definition(tmp_path):
    rows = [PoolRow("b", "x", "val", features=[3.0]), PoolRow("a", None, "train", features=[1.0])]
    rows.append(PoolRow("b", "x", "val", features=[2.0]))
    # classes in order, each a line of JSON and the little-endian bytes of its values
    content = b'["a", "train", "<f4", [1, 1]]\n' + np.array([1], "<f4").tobytes()
    content += b'["b", "val", "<f4", [2, 1]]\n' + np.array([3, 2], "<f4").tobytes()
    found = inspect_pool(pool_of(tmp_path / "pool.parquet", rows))["content_sha256"]
    assert found == hashlib.sha256(content).hexdigest()


def changed(index, **values):
    return [row._replace(**values) if number == index else row for number, row in enumerate(ROWS)]


@pytest.mark.parametrize(
    ("rows", "same"),
    [
        pytest.param(changed(2, image=encode(99)), False, id="other pixels"),
        pytest.param([ROWS[1], ROWS[0], *ROWS[2:]], False, id="other order within a class"),
        pytest.param(ROWS[:-1], False, id="one example less"),
        pytest.param([row._replace(class_name=row.class_name.upper()) for row in ROWS], False, id="other names"),
        pytest.param([row._replace(split="val") for row in ROWS], False, id="other split"),
        pytest.param([row._replace(superclass=None) for row in ROWS], True, id="no superclasses"),
        pytest.param([*ROWS[8:], *ROWS[:8]], True, id="other order of classes"),
        pytest.param(changed(2, image=encode(2, file_format="BMP")), True, id="other encoding"),
    ],
)
def test_the_content_digest_changes_just_where_episodes_would(tmp_path, pool, rows, same):
    other = inspect_pool(pool_of(tmp_path / "other.parquet", rows))
    assert (other["content_sha256"] == inspect_pool(pool)["content_sha256"]) is same


def test_people_see_every_number_and_names_as_they_are(tmp_path):
    rows = [PoolRow("[bold]a", None, "train", image=encode(1)), PoolRow("b", None, "test", image=encode(2))]
    file = pool_of(tmp_path / "pool.parquet", rows * 1500)
    console = Console(width=100, record=True, file=io.StringIO())
    summary = inspect_pool(file)
    console.print(render(summary))
    text = console.export_text()
    for words in (
        "3,000 examples of 2 classes",
        "images, 1 x 2 x 2",
        "1,500 ([bold]a)",
        "none",
        summary["content_sha256"],
    ):
        assert words in text


def test_the_command_prints_one_json_object_or_a_table(pool):
    as_json = CliRunner().invoke(data, ["inspect", pool, "--json"], catch_exceptions=False)
    assert json.loads(as_json.stdout) == inspect_pool(pool)
    for_people = CliRunner().invoke(data, ["inspect", pool], catch_exceptions=False)
    assert "smallest class" in for_people.stdout
    assert "3 (ant)" in for_people.stdout


def test_the_command_raises_what_is_wrong_with_the_file(tmp_path):
    result = CliRunner().invoke(data, ["inspect", str(tmp_path / "none.parquet")])
    assert isinstance(result.exception, DataError)
