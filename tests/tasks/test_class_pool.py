import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from metadist.errors import DataError
from metadist.tasks.class_pool import PoolRow, decode_image, read_pool, write_pool


def encode(pixels, file_format="PNG"):
    file = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(file, file_format)
    return file.getvalue()


def grey(value=7, height=2, width=2):
    return encode(np.full((height, width), value))


def colour(value=7):
    return encode(np.full((2, 2, 3), value))


def png_header(width, height):
    """A PNG file that promises so many grey pixels and holds none."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    ihdr = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", ihdr) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def sixteen_bits():
    file = io.BytesIO()
    Image.new("I;16", (2, 2), 40000).save(file, "PNG")
    return file.getvalue()


def parquet(columns, **types):
    """A Parquet file whose text stands in it as it is."""
    table = pa.table({name: pa.array(values, types.get(name)) for name, values in columns.items()})
    file = io.BytesIO()
    pq.write_table(table, file, compression="none", use_dictionary=False, write_statistics=False)
    return file.getvalue()


def images(*cells, classes=None, splits=None):
    text = pa.string() if not cells else None
    return parquet(
        {
            "class": classes or [f"c{number}" for number in range(len(cells))],
            "split": splits or ["train"] * len(cells),
            "image": list(cells),
        },
        image=pa.binary(),
        **{"class": text, "split": text},
    )


def vectors(*cells, kind=None):
    kind = kind or pa.list_(pa.float32())
    return parquet(
        {"class": ["a"] * len(cells), "split": ["train"] * len(cells), "features": list(cells)}, features=kind
    )


GOOD = images(grey(1), grey(2))


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        pytest.param(parquet({"split": ["train"]}), "needs the column 'class', found 'split'", id="no class"),
        pytest.param(parquet({"class": ["a"]}), "needs the column 'split', found 'class'", id="no split"),
        pytest.param(parquet({"class": ["a"], "split": ["train"]}), "one of the columns 'image'", id="no inputs"),
        pytest.param(
            parquet({"class": ["a"], "split": ["train"], "image": [grey()], "features": [[1.0]]}),
            "one of the columns 'image'",
            id="images and vectors",
        ),
        pytest.param(b"", "not a readable Parquet file", id="empty file"),
        pytest.param(b"class,split\na,train\n" * 9, "not a readable Parquet file", id="CSV"),
        pytest.param(GOOD[: len(GOOD) // 2], "not a readable Parquet file", id="truncated"),
        pytest.param(GOOD[:20] + GOOD[60:], "not a readable Parquet file", id="cut out"),
        pytest.param(GOOD.replace(b"c1", b"c\xff"), "not a readable Parquet file", id="class is not UTF-8"),
        pytest.param(GOOD.replace(b"class", b"cl\xffss"), "not a readable Parquet file", id="column is not UTF-8"),
        pytest.param(
            parquet({"class": [3], "split": ["train"], "image": [grey()]}),
            "'class' must hold text, got int64",
            id="number",
        ),
        pytest.param(images(), "the pool is empty", id="no rows"),
        pytest.param(images(grey(), grey(), classes=["a", None]), "'class' has 1 empty cells", id="class is null"),
        pytest.param(images(grey(), splits=[None]), "'split' must hold text, got null", id="all splits are null"),
        pytest.param(images(grey(), grey(), splits=["val", None]), "'split' has 1 empty cells", id="split is null"),
        pytest.param(images(grey(), splits=["training"]), "train, val or test, got 'training'", id="unknown split"),
        pytest.param(
            images(grey(), grey(), classes=["a", "a"], splits=["train", "test"]),
            r"class 'a' lies in more than one split \(test, train\)",
            id="class in two splits",
        ),
        pytest.param(images(grey(), None), "class 'c1', row 1 of the file: the image is missing", id="image is null"),
        pytest.param(
            images(grey(), b""), "class 'c1', row 1 of the file: not a readable image", id="image of no bytes"
        ),
        pytest.param(
            images(grey(), b"\x89PNG\r\n\x1a\n" + bytes(40)), "'c1', row 1 of the file: not a readable", id="no image"
        ),
        pytest.param(
            images(grey(9, 64, 64)[:-30]), "'c0', row 0 of the file: not a readable image", id="truncated image"
        ),
        pytest.param(images(png_header(4097, 4096)), "4097 x 4096 pixels, more than 16777216", id="huge image"),
        pytest.param(
            images(png_header(60000, 60000)), "'c0', row 0 of the file: not a readable image", id="image bomb"
        ),
        pytest.param(images(sixteen_bits()), r"16 or 32 bits a channel \(mode I;16\)", id="16-bit image"),
        pytest.param(
            images(grey(), grey(1, 2, 3)),
            "'c1', row 1 of the file: the image is 3 x 2 with 1 channel, while class 'c0' has 2 x 2",
            id="image sizes differ",
        ),
        pytest.param(
            images(grey(), colour()), "2 x 2 with 3 channels, while class 'c0' has 2 x 2 with 1", id="grey and colour"
        ),
        pytest.param(
            parquet({"class": ["a"], "split": ["train"], "image": ["a.png"]}), "as binary, got string", id="image names"
        ),
        pytest.param(vectors([1.0, 2.0], [1.0, float("nan")]), "row 1 of the file: features hold NaN", id="NaN"),
        pytest.param(
            vectors([1.0], [float("-inf")]), "row 1 of the file: features hold NaN or infinity", id="infinity"
        ),
        pytest.param(vectors([1.0], [None]), "row 1 of the file: features hold NaN or infinity", id="null in a vector"),
        pytest.param(vectors([1.0, 2.0], [1.0]), "has 1 numbers, the first one has 2", id="vector lengths differ"),
        pytest.param(vectors([1.0], None), "row 1 of the file: the vector is missing or empty", id="vector is null"),
        pytest.param(
            vectors(None, [1.0]), "row 0 of the file: the vector is missing or empty", id="first vector is null"
        ),
        pytest.param(vectors([], []), "row 0 of the file: the vector is missing or empty", id="vectors of length 0"),
        pytest.param(vectors(["1"], kind=pa.list_(pa.string())), "lists of numbers, got list<", id="vector of text"),
        pytest.param(vectors(1.0, kind=pa.float32()), "lists of numbers, got float", id="a number a row"),
    ],
)
def test_a_bad_pool_is_refused_by_name_and_place(tmp_path, data, fault):
    file = tmp_path / "bad.parquet"
    file.write_bytes(data)
    with pytest.raises(DataError, match=fault) as caught:
        read_pool(str(file))
    assert str(caught.value).startswith(str(file))


def test_a_bad_example_is_named_by_its_row_in_the_file(tmp_path):
    # in sorted order the broken image of class b is the last of three; in the file it is the first
    (tmp_path / "bad.parquet").write_bytes(images(b"broken", grey(), grey(), classes=["b", "a", "a"]))
    with pytest.raises(DataError, match="class 'b', row 0 of the file: not a readable image"):
        read_pool(str(tmp_path / "bad.parquet"))


def test_a_missing_pool_is_refused_with_the_command_that_makes_one(tmp_path):
    with pytest.raises(DataError, match=r"no such class pool\. Make one with `metadist data import`"):
        read_pool(str(tmp_path / "none.parquet"))


def test_the_good_file_that_bad_ones_are_made_from_is_read(tmp_path):
    (tmp_path / "good.parquet").write_bytes(GOOD)
    assert read_pool(str(tmp_path / "good.parquet")).examples[:, 0, 0, 0].tolist() == [1, 2]


def test_images_come_back_grouped_by_class_in_the_order_they_were_written(tmp_path):
    # rows b0 a0 b1 a1 b2: sorted classes are a (2 examples) and b (3), so starts are 0, 2, 5
    rows = [
        PoolRow("b", "letters", "test", image=grey(10)),
        PoolRow("a", None, "train", image=grey(20)),
        PoolRow("b", "letters", "test", image=grey(11)),
        PoolRow("a", None, "train", image=grey(21)),
        PoolRow("b", "letters", "test", image=grey(12)),
    ]
    assert write_pool(iter(rows), tmp_path / "new" / "pool.parquet") == 5
    pool = read_pool(str(tmp_path / "new" / "pool.parquet"))
    assert (pool.classes, pool.splits, pool.superclasses) == (["a", "b"], ["train", "test"], [None, "letters"])
    assert pool.starts.tolist() == [0, 2, 5]
    assert pool.sizes().tolist() == [2, 3]
    assert pool.examples.shape == (5, 1, 2, 2)
    assert pool.examples[:, 0, 1, 1].tolist() == [20, 21, 10, 11, 12]
    assert {split: ids.tolist() for split, ids in pool.class_ids.items()} == {"train": [0], "val": [], "test": [1]}


def test_colours_and_axes_come_back_as_channels_height_width(tmp_path):
    pixels = np.arange(2 * 3 * 3).reshape(2, 3, 3)
    write_pool([PoolRow("a", None, "val", image=encode(pixels))], tmp_path / "pool.parquet")
    pool = read_pool(str(tmp_path / "pool.parquet"))
    assert pool.is_images
    np.testing.assert_array_equal(pool.examples, pixels.transpose(2, 0, 1)[None])


def test_vectors_come_back_as_float32(tmp_path):
    rows = [PoolRow("a", None, "val", features=[0.1, -2.0, 3e30]), PoolRow("a", None, "val", features=[4.0, 5.0, 6.0])]
    write_pool(rows, tmp_path / "pool.parquet")
    pool = read_pool(str(tmp_path / "pool.parquet"))
    assert not pool.is_images
    np.testing.assert_array_equal(pool.examples, np.array([[0.1, -2.0, 3e30], [4.0, 5.0, 6.0]], np.float32))


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.float64(), 2), pa.large_list(pa.int16()), pa.list_(pa.float16())], ids=["fixed", "int", "half"]
)
def test_any_list_of_numbers_is_read_as_vectors(tmp_path, kind):
    values = [[np.float16(1), np.float16(2)]] if kind.value_type == pa.float16() else [[1, 2]]
    (tmp_path / "pool.parquet").write_bytes(vectors(*values, kind=kind))
    assert read_pool(str(tmp_path / "pool.parquet")).examples.tolist() == [[1.0, 2.0]]


def test_a_pool_may_encode_its_text_as_dictionaries(tmp_path):
    table = pa.table(
        {
            "class": pa.array(["a", "b"]).dictionary_encode(),
            "split": pa.array(["train", "val"]).dictionary_encode(),
            "features": [[1.0], [2.0]],
        }
    )
    pq.write_table(table, tmp_path / "pool.parquet")
    assert read_pool(str(tmp_path / "pool.parquet")).splits == ["train", "val"]


def test_a_pool_that_fails_while_it_is_written_leaves_the_old_one(tmp_path):
    file = tmp_path / "pool.parquet"
    write_pool([PoolRow("old", None, "train", features=[1.0])], file)

    def rows():
        yield PoolRow("new", None, "train", features=[1.0])
        raise DataError("the second image is broken")

    with pytest.raises(DataError, match="second image"):
        write_pool(rows(), file)
    assert read_pool(str(file)).classes == ["old"]
    assert list(tmp_path.iterdir()) == [file]


def test_a_pool_that_cannot_be_written_is_an_error_that_names_it(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"pool\.parquet: cannot be written \(.*\)\. .* choose another --out"):
        write_pool([PoolRow("a", None, "train", features=[1.0])], Path(tmp_path / "file" / "pool.parquet"))


@pytest.mark.parametrize(("mode", "channels"), [("1", 1), ("L", 1), ("P", 3), ("RGBA", 3), ("CMYK", 3)])
def test_an_image_has_one_channel_where_its_file_is_grey_and_three_otherwise(mode, channels):
    file = io.BytesIO()
    Image.new("L", (3, 2), 255).convert(mode).save(file, "TIFF")
    pixels = decode_image(file.getvalue(), "here")
    np.testing.assert_array_equal(pixels, np.full((channels, 2, 3), 255))


def test_a_flipped_byte_never_changes_a_pool_in_silence(tmp_path):
    random = np.random.default_rng(0)
    path = tmp_path / "pool.parquet"
    vectors = random.standard_normal((40, 8)).astype(np.float32)
    write_pool((PoolRow(f"c{row % 4}", None, "train", features=list(v)) for row, v in enumerate(vectors)), path)
    intact, content = read_pool(str(path)), path.read_bytes()
    refused = 0
    for position in random.integers(0, len(content), 150):
        altered = bytearray(content)
        altered[position] ^= 0x10
        path.write_bytes(altered)
        try:
            pool = read_pool(str(path))
        except DataError:
            refused += 1
            continue
        # What no checksum covers (statistics, the writer's name) may differ; what is read may not.
        assert (pool.classes, pool.splits) == (intact.classes, intact.splits)
        assert pool.examples.tobytes() == intact.examples.tobytes()
    assert refused > 75
