"""Class pools: labelled examples in one Parquet file, from which few-shot classification draws its episodes.

One row an example:

| column     | type                    |                                                              |
|------------|-------------------------|--------------------------------------------------------------|
| class      | string                  | the class's name, unique in the pool                         |
| split      | string                  | train, val or test; the same for every example of a class    |
| superclass | string, may be left out | an alphabet, a family: for reports and splits                |
| image      | binary                  | a PNG, JPEG or other file that Pillow opens; or, instead:    |
| features   | list of float           | a vector; all of one length                                  |

All images of a pool have one size and one number of channels (1 grey, 3 colour).
"""

import io
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from metadist.core.keys import SPLITS
from metadist.errors import DataError, first_line
from metadist.files import open_file_system

MAX_IMAGE_PIXELS = 4096 * 4096
"""Larger images are refused: few-shot episodes hold hundreds of them."""

UNREADABLE_IMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    LookupError,
    ArithmeticError,
    struct.error,
    Image.DecompressionBombError,
)
"""What Pillow raises for files that are no images, or broken ones."""


class PoolRow(NamedTuple):
    """One example on its way into a pool; `image` holds an encoded file."""

    class_name: str
    superclass: str | None
    split: str
    image: bytes | None = None
    features: list[float] | None = None


@dataclass(frozen=True)
class ClassPool:
    """A pool in memory: examples of one class lie together."""

    path: str
    classes: list[str]
    superclasses: list[str | None]
    splits: list[str]
    """Each class's split."""
    starts: np.ndarray
    """int64 `[classes + 1]`: class c owns the examples `starts[c] .. starts[c + 1] - 1`."""
    examples: np.ndarray
    """uint8 `[examples, channels, height, width]` or float32 `[examples, features]`."""
    class_ids: dict[str, np.ndarray] = field(init=False)
    """The classes of each split, as indices."""

    def __post_init__(self) -> None:
        of_split = {split: np.flatnonzero(np.array(self.splits) == split) for split in SPLITS}
        object.__setattr__(self, "class_ids", of_split)

    @property
    def is_images(self) -> bool:
        return self.examples.dtype == np.uint8

    def sizes(self) -> np.ndarray:
        """int64 `[classes]`: examples in each class."""
        return np.diff(self.starts)


def write_pool(rows: Iterable[PoolRow], path: Path) -> int:
    """Writes a pool; gives the number of examples. Nothing is left at `path` where it fails."""
    table = pa.Table.from_pylist(
        [
            {"class": row.class_name, "superclass": row.superclass, "split": row.split}
            | ({"image": row.image} if row.image is not None else {"features": row.features})
            for row in rows
        ]
    )
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            pq.write_table(table, partial, compression="zstd", row_group_size=4096, write_page_checksum=True)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error}). Make room or permit it, or choose another --out."
        ) from error
    return table.num_rows


def read_pool(path: str) -> ClassPool:
    """Reads and checks a pool from a local path or a URI. Raises DataError, naming file and place."""
    table = _read_table(path)
    classes, order, starts = _group_by_class(table, path)
    first = table.take(pa.array(order[starts[:-1]]))
    table = table.take(pa.array(order))
    kind = "image" if "image" in table.column_names else "features"
    examples = (_decode_images if kind == "image" else _decode_features)(table, order, path)
    has_superclass = "superclass" in table.column_names
    return ClassPool(
        path=path,
        classes=classes,
        superclasses=first["superclass"].to_pylist() if has_superclass else [None] * len(classes),
        splits=first["split"].to_pylist(),
        starts=starts,
        examples=examples,
    )


def _read_table(path: str) -> pa.Table:
    file_system, inner = open_file_system(path)
    try:
        with file_system.open_input_file(inner) as stream:
            table = pq.read_table(stream, page_checksum_verification=True)
            table.validate(full=True)
            names = table.column_names
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: no such class pool. Make one with `metadist data import`, or correct task.pool."
        ) from error
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: not a readable Parquet file ({first_line(error)}). Import or copy it again."
        ) from error
    for column in ("class", "split"):
        if column not in names:
            raise DataError(
                f"{path}: a class pool needs the column {column!r}, found {', '.join(map(repr, names)) or 'none'}."
                " Add it: one row an example."
            )
        kind = table.schema.field(column).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise DataError(f"{path}: column {column!r} must hold text, got {kind}. Write it as strings.")
        if table[column].null_count:
            raise DataError(f"{path}: column {column!r} has {table[column].null_count} empty cells. Fill them.")
    if ("image" in names) == ("features" in names):
        raise DataError(
            f"{path}: a class pool needs one of the columns 'image' (encoded files) and 'features' (vectors),"
            f" found {', '.join(map(repr, names))}. Name the one that holds the inputs so."
        )
    if table.num_rows == 0:
        raise DataError(f"{path}: the pool is empty. Import it again.")
    for column in ("class", "split", "superclass"):
        if column in names:
            table = table.set_column(names.index(column), column, pc.cast(table[column], pa.string()))
    return table


def _group_by_class(table: pa.Table, path: str) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Class names in sorted order, the order of rows that groups them, and where each class starts."""
    names = table["class"].to_numpy(zero_copy_only=False).astype(str)
    classes, ids = np.unique(names, return_inverse=True)
    order = np.argsort(ids, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(ids))])
    splits = table["split"].to_numpy(zero_copy_only=False).astype(str)
    unknown = sorted(set(splits) - set(SPLITS))
    if unknown:
        raise DataError(f"{path}: column 'split' must hold train, val or test, got {str(unknown[0])!r}. Rename it.")
    for index, name in enumerate(classes):
        found = set(splits[order[starts[index] : starts[index + 1]]])
        if len(found) > 1:
            raise DataError(
                f"{path}: class {str(name)!r} lies in more than one split ({', '.join(sorted(found))})."
                " Few-shot splits divide classes, not examples: give each class one split."
            )
    return [str(name) for name in classes], order, starts


def _decode_images(table: pa.Table, order: np.ndarray, path: str) -> np.ndarray:
    if not (pa.types.is_binary(table.schema.field("image").type) or pa.types.is_large_binary(table["image"].type)):
        raise DataError(
            f"{path}: column 'image' must hold encoded files as binary, got {table['image'].type}."
            " Store the bytes of the PNG or JPEG files."
        )
    images: np.ndarray | None = None
    for row, (name, data) in enumerate(_cells(table, "image")):
        where = f"{path}: class {name!r}, row {order[row]} of the file"
        pixels = decode_image(data, where)
        if images is None:
            images = np.empty((table.num_rows, *pixels.shape), np.uint8)
            first = name
        if pixels.shape != images.shape[1:]:
            channels, height, width = images.shape[1:]
            raise DataError(
                f"{where}: the image is {_describe(pixels.shape)}, while class {first!r} has"
                f" {_describe((channels, height, width))}. A pool's images have one size:"
                " `metadist data import folder --size` makes them so."
            )
        images[row] = pixels
    assert images is not None
    return images


def decode_image(data: bytes | None, where: str) -> np.ndarray:
    """uint8 `[channels, height, width]`, one channel for grey images and three for others."""
    if data is None:
        raise DataError(f"{where}: the image is missing. Remove the row or fill it.")
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise DataError(
                    f"{where}: the image has {image.width} x {image.height} pixels, more than {MAX_IMAGE_PIXELS}."
                    " Scale it down before importing."
                )
            if image.mode.startswith(("I", "F")):
                raise DataError(
                    f"{where}: the image has 16 or 32 bits a channel (mode {image.mode}), and 8 are needed."
                    " Convert it, choosing how its values are scaled."
                )
            grey = image.mode in ("1", "L")
            pixels = np.asarray(image.convert("L" if grey else "RGB"))
    except UNREADABLE_IMAGE as error:
        raise DataError(f"{where}: not a readable image ({first_line(error)}). Replace or remove it.") from error
    return pixels[None] if grey else np.moveaxis(pixels, 2, 0)


def _decode_features(table: pa.Table, order: np.ndarray, path: str) -> np.ndarray:
    kind = table["features"].type
    is_list = pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind) or pa.types.is_large_list(kind)
    if not is_list or not (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)):
        raise DataError(f"{path}: column 'features' must hold lists of numbers, got {kind}. Write one list a row.")
    width: int | None = None
    rows = []
    for row, (name, vector) in enumerate(_cells(table, "features")):
        where = f"{path}: class {name!r}, row {order[row]} of the file"
        if not vector:
            raise DataError(f"{where}: the vector is missing or empty. Remove the row or fill it.")
        width = len(vector) if width is None else width
        if len(vector) != width:
            raise DataError(
                f"{where}: the vector has {len(vector)} numbers, the first one has {width}."
                " All vectors of a pool have one length: pad or remove that row."
            )
        values = np.array(vector, dtype=np.float32)
        if not np.isfinite(values).all():
            raise DataError(f"{where}: features hold NaN or infinity. Impute or remove that row.")
        rows.append(values)
    return np.stack(rows)


def _cells(table: pa.Table, column: str) -> Iterator[tuple[str, Any]]:
    for batch in table.select(["class", column]).to_batches(max_chunksize=1024):
        yield from zip(batch.column(0).to_pylist(), batch.column(1).to_pylist(), strict=True)


def _describe(shape: tuple[int, ...]) -> str:
    channels, height, width = shape
    return f"{width} x {height} with {channels} channel{'s' if channels > 1 else ''}"
