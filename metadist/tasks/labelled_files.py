"""A person's own examples from one file or directory, in the shape that a run's model takes.

| source                     | inputs                                | targets                                        |
|----------------------------|---------------------------------------|------------------------------------------------|
| directory of images        | each image, scaled to the run's size  | the name of the image's directory              |
| Parquet file               | column `image` (files) or `features`  | column `class`, in regression `target`         |
| CSV file                   | all other columns, in their order     | column `class`, in regression `target`         |

Images that lie in the directory itself, and files without the column of targets, are examples without
targets.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from PIL import Image

from metadist.core.episode import EpisodeSpec
from metadist.errors import DataError, first_line
from metadist.tasks.class_pool import decode_image
from metadist.tasks.importers.folder import IMAGE_SUFFIXES


@dataclass(frozen=True)
class LabelledExamples:
    """`x: [examples, *input_shape]`, uint8 for images and float32 for vectors."""

    x: np.ndarray
    y: np.ndarray | None
    """Labels or values, one an example; None where the source has none."""
    names: list[str]
    """What each example is called: a file's path, or `row 12`, counted from 1 without the header."""


def read_labelled(path: str, spec: EpisodeSpec, *, invert: bool = False) -> LabelledExamples:
    """Reads examples for a task like `spec`, with `invert` the negatives of its images. Raises DataError."""
    is_images = len(spec.input_shape) == 3
    if invert and not is_images:
        raise DataError(f"{path}: this run's task has vectors, and only images have negatives. Leave --invert out.")
    found = _read(Path(path), path, spec)
    return replace(found, x=255 - found.x) if invert else found


def _read(place: Path, path: str, spec: EpisodeSpec) -> LabelledExamples:
    if place.is_dir():
        return _from_directory(place, spec)
    if not place.exists():
        raise DataError(f"{path}: no such file or directory. Correct the path.")
    suffix = place.suffix.lower()
    if suffix not in (".parquet", ".csv"):
        raise DataError(f"{path}: must be a .parquet or .csv file or a directory of images. Rename or convert it.")
    try:
        table = pyarrow.parquet.read_table(place) if suffix == ".parquet" else pyarrow.csv.read_csv(place)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable {suffix[1:]} file ({first_line(error)}). Write it again.") from error
    if not table.num_rows:
        raise DataError(f"{path}: holds no rows. Add one for each example.")
    target = "class" if spec.kind == "classification" else "target"
    x = _table_images(table, path, spec) if len(spec.input_shape) == 3 else _table_features(table, path, spec, target)
    y = np.array(table[target].to_pylist()) if target in table.column_names else None
    if y is not None and table[target].null_count:
        raise DataError(f"{path}: column {target!r} has {table[target].null_count} empty cells. Fill them.")
    return LabelledExamples(x, y, [f"row {row + 1}" for row in range(len(x))])


def _from_directory(place: Path, spec: EpisodeSpec) -> LabelledExamples:
    if len(spec.input_shape) != 3:
        raise DataError(f"{place}: this run's task has vectors, not images. Give a CSV or Parquet file.")
    labelled = sorted(file for file in place.glob("*/*") if _is_image(file))
    plain = sorted(file for file in place.glob("*") if _is_image(file))
    if bool(labelled) == bool(plain):
        raise DataError(
            f"{place}: must hold one directory of images a class, or images without classes, and holds"
            f" {'both' if plain else 'neither'}. Sort them."
        )
    files = labelled or plain
    images = np.stack([fitted(file.read_bytes(), str(file), spec) for file in files])
    y = np.array([file.parent.name for file in labelled]) if labelled else None
    return LabelledExamples(images, y, [str(file.relative_to(place)) for file in files])


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".") and file.is_file()


def _table_images(table: pa.Table, path: str, spec: EpisodeSpec) -> np.ndarray:
    if "image" not in table.column_names:
        raise DataError(
            f"{path}: this run's task has images, and the file has no column 'image', found"
            f" {', '.join(map(repr, table.column_names))}. Give a directory of images, or store their files there."
        )
    rows: Iterator[Any] = iter(table["image"].to_pylist())
    return np.stack([fitted(data, f"{path}: row {row + 1}", spec) for row, data in enumerate(rows)])


def _table_features(table: pa.Table, path: str, spec: EpisodeSpec, target: str) -> np.ndarray:
    width = spec.input_shape[0]
    names = [name for name in table.column_names if name not in (target, "split", "superclass")]
    if names == ["features"]:
        rows = table["features"].to_pylist()
    else:
        for name in names:
            kind = table[name].type
            if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
                raise DataError(f"{path}: column {name!r} must hold numbers, got {kind}. Encode or remove it.")
        rows = list(zip(*(table[name].to_pylist() for name in names), strict=True))
    for row, values in enumerate(rows):
        if values is None or len(values) != width or None in values:
            found = "an empty cell" if values is not None and len(values) == width else f"{len(values or ())} numbers"
            raise DataError(
                f"{path}: row {row + 1} has {found}, and this run's task has {width} features an example."
                f" Give them in their order, beside the column {target!r}."
            )
    return np.array(rows, dtype=np.float32)


def fitted(data: bytes | None, where: str, spec: EpisodeSpec) -> np.ndarray:
    """uint8 `[channels, height, width]` of the spec, whatever size and colours the image has."""
    pixels = decode_image(data, where)
    channels, height, width = spec.input_shape
    if pixels.shape == spec.input_shape:
        return pixels
    image = Image.fromarray(pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, 2))
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    scaled = np.asarray(image)
    return scaled[None] if channels == 1 else np.moveaxis(scaled, 2, 0)
