"""Makes a class pool from anybody's images: one directory a class, on disk or in a zip archive."""

import csv
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from metadist.core.keys import SPLITS
from metadist.errors import DataError
from metadist.tasks.class_pool import UNREADABLE_IMAGE, PoolRow, decode_image, write_pool
from metadist.tasks.importers.download import Progress, no_progress
from metadist.tasks.importers.file_tree import FileTree, some

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm")
KEPT_FORMATS = ("PNG", "JPEG")
GREY_MODES = ("1", "L", "LA")
EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True, kw_only=True)
class ImportSummary:
    """What an import wrote."""

    pool: str
    examples: int
    shape: tuple[int, int, int]
    """Channels, height, width."""
    classes: dict[str, int]
    """Classes in each split."""
    classes_with_rotations: dict[str, int]
    """Classes in each split under `task.rotate_classes`; empty where images are not square."""
    ignored_files: int = 0
    left_out_classes: int = 0
    sources: list[str] = field(default_factory=list)
    """Files and directories that the images came from."""


def summarise(
    out: Path, examples: int, shape: tuple[int, int, int], splits: Iterable[str], sources: Iterable[Path]
) -> ImportSummary:
    """`splits` holds the split of each class."""
    counts = Counter(splits)
    classes = {split: counts[split] for split in SPLITS}
    return ImportSummary(
        pool=str(out),
        examples=examples,
        shape=shape,
        classes=classes,
        classes_with_rotations={split: 4 * count for split, count in classes.items()} if shape[1] == shape[2] else {},
        sources=[str(path) for path in sources],
    )


class ClassSplit(NamedTuple):
    split: str
    superclass: str | None = None


def is_image_name(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def shuffled(names: Sequence[str], seed: int) -> list[str]:
    """The sorted names in an order that depends on the seed alone.

    They are ordered by raw words of Philox4x64-10, which, unlike `Generator.permutation`, NumPy promises
    never to change.
    """
    words = np.random.Philox(key=seed).random_raw(len(names))
    names = sorted(names)
    return [names[index] for index in np.argsort(words, kind="stable")]


# --- Which split a class belongs to -------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SplitFractions:
    """Classes at random, by fraction; every split whose fraction is not 0 gets at least one."""

    train: float = 0.64
    val: float = 0.16
    test: float = 0.2
    seed: int = 1

    def assign(self, classes: Sequence[str]) -> dict[str, ClassSplit]:
        fractions = {split: getattr(self, split) for split in SPLITS}
        if not (min(fractions.values()) >= 0 and self.train > 0 and abs(sum(fractions.values()) - 1) < 1e-6):
            raise DataError(
                "split fractions must be >= 0, with train > 0 and a sum of 1, got"
                f" {self.train:g},{self.val:g},{self.test:g}. Try 0.64,0.16,0.2."
            )
        counts = {
            split: max(1, round(fractions[split] * len(classes))) if fractions[split] else 0
            for split in ("val", "test")
        }
        counts["train"] = len(classes) - sum(counts.values())
        if counts["train"] < 1:
            raise DataError(
                f"split fractions {self.train}, {self.val}, {self.test} leave no training class of the {len(classes)}"
                " found. Add classes, or set the fraction of val or test to 0."
            )
        order = iter(shuffled(classes, self.seed))
        return {next(order): ClassSplit(split) for split in SPLITS for _ in range(counts[split])}


@dataclass(frozen=True, kw_only=True)
class SplitFile:
    """A CSV file with a header: the class in column `class`, `wnid` or else the first one, its split in
    `split`, and, where it is there, its `superclass`. A class may be repeated where its rows agree."""

    path: Path
    only_listed: bool = False
    """Leave out classes that the file does not list; otherwise they are an error."""

    def assign(self, classes: Sequence[str]) -> dict[str, ClassSplit]:
        return _only_known(self._read(), classes, str(self.path), self.only_listed)

    def _read(self) -> dict[str, ClassSplit]:
        listed: dict[str, ClassSplit] = {}
        reader = csv.DictReader(io.StringIO(_read_text(self.path), newline=""), strict=True)
        try:
            columns = list(reader.fieldnames or [])
            if "split" not in columns:
                raise DataError(
                    f"{self.path}: needs the column 'split', found {some(columns, 8) or 'none'}."
                    " Its first line must name the columns, separated by commas."
                )
            key = next((name for name in ("class", "wnid") if name in columns), columns[0])
            for row in reader:
                where = f"{self.path}, line {reader.line_num}"
                name, entry = row[key], ClassSplit(row["split"] or "", row.get("superclass") or None)
                if not name or entry.split not in SPLITS:
                    raise DataError(
                        f"{where}: needs a class and one of the splits train, val, test, got {name!r} and"
                        f" {entry.split!r}. Correct the line."
                    )
                if listed.setdefault(name, entry) != entry:
                    raise DataError(
                        f"{where}: class {name!r} is given {_words(entry)}, and {_words(listed[name])} before."
                        " Few-shot splits divide classes, not examples: give each class one split."
                    )
        except csv.Error as error:
            raise DataError(f"{self.path}, line {reader.line_num}: not valid CSV ({error}). Save it again.") from error
        return listed


@dataclass(frozen=True, kw_only=True)
class SplitLists:
    """Text files with one class a line; blank lines are skipped."""

    paths: Mapping[str, Path]
    """The file of each split; a split without one gets no class."""
    only_listed: bool = False
    """Leave out classes that no file lists; otherwise they are an error."""

    def assign(self, classes: Sequence[str]) -> dict[str, ClassSplit]:
        listed: dict[str, ClassSplit] = {}
        for split, path in self.paths.items():
            if split not in SPLITS:
                raise DataError(f"{path}: is given for the split {split!r}. A split is train, val or test.")
            names = [line.strip() for line in _read_text(path).splitlines()]
            for name in filter(None, names):
                if listed.setdefault(name, ClassSplit(split)).split != split:
                    raise DataError(
                        f"{path}: class {name!r} is listed for {split} and for {listed[name].split}."
                        " Give each class one split."
                    )
        where = ", ".join(str(path) for path in self.paths.values())
        return _only_known(listed, classes, where, self.only_listed)


Split = SplitFractions | SplitFile | SplitLists


def _only_known(
    listed: dict[str, ClassSplit], classes: Sequence[str], where: str, only_listed: bool
) -> dict[str, ClassSplit]:
    if not listed:
        raise DataError(f"{where}: lists no class. Give each class a line.")
    missing = sorted(listed.keys() - set(classes))
    if missing:
        raise DataError(
            f"{where}: {len(missing)} listed classes have no images ({some(missing)})."
            " Remove them from the list, or correct --source."
        )
    unlisted = sorted(set(classes) - listed.keys())
    if unlisted and not only_listed:
        raise DataError(
            f"{where}: {len(unlisted)} classes with images are not listed ({some(unlisted)})."
            " List them, or leave them out with --only-listed."
        )
    return listed


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not readable text ({error}). Correct the name, or save it as UTF-8.") from error


def _words(entry: ClassSplit) -> str:
    return f"{entry.split} with superclass {entry.superclass}" if entry.superclass else entry.split


# --- The import ---------------------------------------------------------------------------------


def import_folder(
    out: Path,
    *,
    source: Path,
    split: Split | None = None,
    size: int | None = None,
    color: Literal["auto", "rgb", "grey"] = "auto",
    prefix: str | None = None,
    progress: Progress = no_progress,
) -> ImportSummary:
    """Writes the class pool `out` from the images `source/<class>/**/*`, a directory or a zip archive.

    Directories that all images share are skipped, so that in `tiny-imagenet-200/train/<class>/images/*`
    the classes are found; `prefix` names that directory where they are not all below one. `size` scales
    images to `size` x `size` with Lanczos, whatever their proportions; without it they must be equal.
    `auto` colour is grey where every image is grey, and else rgb. PNG and JPEG files that already fit
    are kept byte for byte, the others become PNG; of an animation the first picture is taken,
    transparency is dropped, and a photograph is turned upright as its EXIF data say.

    The default split is `SplitFractions()`.
    """
    with FileTree(source) as tree:
        images = _by_class(tree, prefix)
        splits = (split or SplitFractions()).assign(list(images))
        chosen = {name: images[name] for name in sorted(splits)}
        target = _target(tree, chosen, size, color, progress)
        examples = write_pool(_rows(tree, chosen, splits, target, progress), out)
        shape = (1 if target.mode == "L" else 3, target.height, target.width)
        summary = summarise(out, examples, shape, (entry.split for entry in splits.values()), [source])
        return replace(
            summary,
            ignored_files=len(tree.names) - sum(map(len, images.values())),
            left_out_classes=len(images) - len(chosen),
        )


def _by_class(tree: FileTree, prefix: str | None) -> dict[str, list[str]]:
    """The image files of each class, in sorted order."""
    names = [name for name in tree.names if is_image_name(name)]
    if prefix is not None:
        top = prefix.strip("/") + "/"
        names = [name for name in names if name.startswith(top)]
    if not names:
        place = f"{tree.path}: {prefix}" if prefix else str(tree.path)
        raise DataError(
            f"{place} holds no image ({', '.join(IMAGE_SUFFIXES)}). Give a directory with one directory a class."
        )
    top = top if prefix is not None else "".join(f"{part}/" for part in _shared_directories(names))
    images: dict[str, list[str]] = {}
    for name in names:
        class_name, slash, _ = name[len(top) :].partition("/")
        if not slash:
            raise DataError(
                f"{tree.where(name)}: the image lies in no class directory below {top or tree.path.name!r}, where the"
                " images' directories part. Give each of several classes its directory, or correct --prefix."
            )
        images.setdefault(class_name, []).append(name)
    if set(images) <= {*SPLITS, "valid", "validation"}:
        raise DataError(
            f"{tree.path}: the directories {some(images)} look like splits, not like classes."
            " Name the one that holds the class directories with --prefix, for instance --prefix train."
        )
    return images


def _shared_directories(names: Sequence[str]) -> list[str]:
    """The directories above the classes: those that all names share, as long as two classes remain."""
    paths = [name.split("/")[:-1] for name in names]
    shared = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return shared


class _Target(NamedTuple):
    mode: str
    width: int
    height: int


def _target(
    tree: FileTree, images: Mapping[str, list[str]], size: int | None, color: str, progress: Progress
) -> _Target:
    """Mode and size of every image of the pool, from the headers of all files."""
    all_grey, width, height = True, 0, 0
    names = [name for members in images.values() for name in members]
    for done, name in enumerate(names):
        progress("look at images", done, len(names))
        header = _header(tree.read(name), tree.where(name))
        all_grey &= header.mode in GREY_MODES
        width, height = (header.width, header.height) if done == 0 else (width, height)
        if size is None and (header.width, header.height) != (width, height):
            raise DataError(
                f"{tree.where(name)}: the image has {header.width} x {header.height} pixels, while {names[0]} has"
                f" {width} x {height}. Give --size to scale all images to one size."
            )
    if size is not None:
        width, height = size, size
    return _Target("L" if color == "grey" or (color == "auto" and all_grey) else "RGB", width, height)


def _rows(
    tree: FileTree,
    images: Mapping[str, list[str]],
    splits: Mapping[str, ClassSplit],
    target: _Target,
    progress: Progress,
) -> Iterator[PoolRow]:
    for done, (class_name, names) in enumerate(images.items()):
        progress("import classes", done, len(images))
        entry = splits[class_name]
        for name in names:
            yield PoolRow(
                class_name, entry.superclass, entry.split, image=_fit(tree.read(name), tree.where(name), target)
            )
    progress("import classes", len(images), len(images))


def _fit(data: bytes, where: str, target: _Target) -> bytes:
    """The file as it is where it fits, or else made to fit, as PNG."""
    decode_image(data, where)
    header = _header(data, where)
    if header.format in KEPT_FORMATS and header == (header.format, target.mode, target.width, target.height, False):
        return data
    with Image.open(io.BytesIO(data)) as image:
        upright = (ImageOps.exif_transpose(image) if header.turned else image).convert(target.mode)
    file = io.BytesIO()
    upright.resize((target.width, target.height), Image.Resampling.LANCZOS).save(file, "PNG")
    return file.getvalue()


class _Header(NamedTuple):
    format: str | None
    mode: str
    width: int
    """Width and height of the upright picture."""
    height: int
    turned: bool
    """A photograph that its EXIF data turn or mirror."""


def _header(data: bytes, where: str) -> _Header:
    try:
        with Image.open(io.BytesIO(data)) as image:
            # Other formats seldom turn images, and some must be decoded to know.
            orientation = image.getexif().get(EXIF_ORIENTATION, 1) if image.format == "JPEG" else 1
            width, height = image.size[::-1] if orientation in (5, 6, 7, 8) else image.size
            return _Header(image.format, image.mode, width, height, orientation in range(2, 9))
    except UNREADABLE_IMAGE as error:
        raise DataError(f"{where}: not a readable image ({error}). Replace or remove it.") from error
