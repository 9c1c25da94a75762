"""Makes a class pool from Omniglot (Lake et al. 2015): 1,623 characters of 50 alphabets, 20 drawings each."""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from difflib import get_close_matches
from hashlib import md5
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from metadist.core.keys import SPLITS
from metadist.errors import DataError
from metadist.tasks.class_pool import PoolRow, decode_image, write_pool
from metadist.tasks.importers.download import Progress, download, no_progress
from metadist.tasks.importers.file_tree import FileTree, some
from metadist.tasks.importers.folder import ImportSummary, shuffled, summarise

RAW = "https://raw.githubusercontent.com"


@dataclass(frozen=True, kw_only=True)
class Archive:
    """One of the two parts of Omniglot: `NAME.zip`, or the directory NAME that it unpacks to."""

    name: str
    url: str
    md5: str
    """Of the official zip archive."""
    content_sha256: str
    """Of the images by name, however they are packed: see `FileTree.content_digest`."""


@dataclass(frozen=True, kw_only=True)
class Release:
    """What to expect of the data set; tests make a small one."""

    archives: tuple[Archive, ...] = (
        Archive(
            name="images_background",
            url=f"{RAW}/brendenlake/omniglot/master/python/images_background.zip",
            md5="68d2efa1b9178cc56df9314c21c6e718",
            content_sha256="7c563fb7d98dbd312c5e0ccb87230ca9d7e8a13d672e5de6186245e7905ed43e",
        ),
        Archive(
            name="images_evaluation",
            url=f"{RAW}/brendenlake/omniglot/master/python/images_evaluation.zip",
            md5="6b91aef0f799c5bb55b94e3f2daec811",
            content_sha256="e5a69b751aa33f555bdc92febd48220b69a811b2ff01de32bf4d1bca47bd1809",
        ),
    )
    finn: Mapping[str, int] = field(default_factory=lambda: {"train": 1100, "val": 100, "test": 423})
    """Characters in each split."""
    vinyals: Mapping[str, int] = field(default_factory=lambda: {"train": 1028, "val": 172, "test": 423})
    vinyals_url: str = f"{RAW}/jakesnell/prototypical-networks/master/data/omniglot/splits/vinyals/{{split}}.txt"


OFFICIAL = Release()


def import_omniglot(
    out: Path,
    *,
    source: Path | None = None,
    cache: Path | None = None,
    split: Literal["finn", "vinyals"] = "finn",
    size: int = 28,
    resample: Literal["lanczos", "nearest"] = "lanczos",
    seed: int = 1,
    hold_out: Sequence[str] = (),
    progress: Progress = no_progress,
    release: Release = OFFICIAL,
) -> ImportSummary:
    """Writes the class pool `out`: grey `size` x `size` PNG files, ink 255 on 0, classes `Alphabet/characterNN`.

    Images come from `source`, a directory with `images_background` and `images_evaluation` as zip archives
    or unpacked; where there is none, they are downloaded to the directory `cache`. The pool holds unrotated
    characters only: `task.rotate_classes` makes each of them four classes while episodes are drawn.

    `finn`: 1,100 train, 100 val and 423 test characters at random, as many as in the code of Finn et al.
    2017 (cbfinn/maml, data_generator.py, whose flag `test_set` picks the 100). Their shuffle depends on the
    order of a directory listing; ours is `shuffled(characters, seed)`. `vinyals`: the 1,028, 172 and 423 of
    Vinyals et al. 2016, from lists beside the images. Every character of the alphabets `hold_out` is moved to
    test, whatever the split says of it, so that nothing of them is seen in training.

    Images are turned from 1 bit to grey before they are resized. Finn et al. ask Pillow for Lanczos on
    1-bit images, for which it takes the nearest pixel without a word; `resample="nearest"` gives that.
    """
    if (source is None) == (cache is None):
        raise DataError("omniglot: needs either a source directory or a cache to download to. Give one of them.")
    with ExitStack() as stack:
        files: dict[str, tuple[FileTree, str]] = {}
        sources = []
        for archive in release.archives:
            path = _find(source, archive) if source else _download(cache, archive, progress)
            tree = stack.enter_context(FileTree(path))
            files |= {name: (tree, member) for name, member in _verified(tree, archive, progress).items()}
            sources.append(path)
        drawings = _by_character(files)
        if split == "finn":
            splits = _finn_split(list(drawings), release.finn, seed)
        else:
            splits = _vinyals_split(list(drawings), release, source, cache, progress)
        splits |= dict.fromkeys(_characters_of(hold_out, list(drawings)), "test")
        rows = _rows(drawings, splits, size, resample, progress)
        examples = write_pool(rows, out)
    return summarise(out, examples, (1, size, size), splits.values(), sources)


def _find(source: Path, archive: Archive) -> Path:
    """The archive or its directory, at most two levels below `source`."""
    if not source.is_dir():
        raise DataError(f"{source}: no such directory. Correct --source, or import with --download.")
    for depth in ("", "*/", "*/*/"):
        for path in sorted(source.glob(f"{depth}{archive.name}.zip")):
            return path
        for path in sorted(source.glob(f"{depth}{archive.name}")):
            while (path / archive.name).is_dir():
                path = path / archive.name
            if path.is_dir():
                return path
    raise DataError(
        f"{source}: holds neither {archive.name}.zip nor the directory {archive.name}."
        f" Get it from {archive.url}, or import with --download."
    )


def _download(cache: Path | None, archive: Archive, progress: Progress) -> Path:
    assert cache is not None
    return download(archive.url, cache / f"{archive.name}.zip", checksum=f"md5:{archive.md5}", progress=progress)


def _verified(tree: FileTree, archive: Archive, progress: Progress) -> dict[str, str]:
    """The images by their official names, once their content is known to be right."""
    top = f"{archive.name}/"
    names = {}
    for member in tree.names:
        if member.lower().endswith(".png"):
            inside = f"/{member}".rpartition(f"/{top}")[2] if tree.is_archive else member
            names[top + inside.lstrip("/")] = member
    progress(f"verify {archive.name}", 0, None)
    if tree.is_archive and md5(tree.path.read_bytes(), usedforsecurity=False).hexdigest() == archive.md5:
        return names
    found = tree.content_digest(names)
    if found != archive.content_sha256:
        raise DataError(
            f"{tree.path}: the images must have the content digest {archive.content_sha256}, got {found}"
            f" ({len(names)} PNG files). Get {archive.name}.zip again from {archive.url}, or import with --download."
        )
    return names


def _by_character(files: Mapping[str, tuple[FileTree, str]]) -> dict[str, list[tuple[FileTree, str]]]:
    """The drawings of each `Alphabet/characterNN`, characters and drawings in sorted order."""
    drawings: dict[str, list[tuple[FileTree, str]]] = {}
    for name in sorted(files, key=lambda name: name.split("/")[1:]):
        _, alphabet, character, _ = name.split("/")
        drawings.setdefault(f"{alphabet}/{character}", []).append(files[name])
    return drawings


def _finn_split(characters: Sequence[str], sizes: Mapping[str, int], seed: int) -> dict[str, str]:
    of_position = [split for split in SPLITS for _ in range(sizes[split])]
    return dict(zip(shuffled(characters, seed), of_position, strict=True))


def _characters_of(alphabets: Sequence[str], characters: Sequence[str]) -> list[str]:
    known = {character.split("/")[0] for character in characters}
    for alphabet in alphabets:
        if alphabet not in known:
            close = get_close_matches(alphabet, known, n=1, cutoff=0.0)
            raise DataError(
                f"omniglot: --hold-out must name an alphabet of the {len(known)}, got {alphabet!r}. Did you mean"
                f" {close[0]!r}?"
            )
    return [character for character in characters if character.split("/")[0] in alphabets]


def _vinyals_split(
    characters: Sequence[str], release: Release, source: Path | None, cache: Path | None, progress: Progress
) -> dict[str, str]:
    splits: dict[str, str] = {}
    for split, size in release.vinyals.items():
        path = _vinyals_list(split, release, source, cache, progress)
        listed = _read_list(path)
        unknown, twice = sorted(listed - set(characters)), sorted(listed & splits.keys())
        if len(listed) != size or unknown or twice:
            faults = [f"{some(unknown)} are no characters"] * bool(unknown)
            faults += [f"{some(twice)} are in another list too"] * bool(twice)
            raise DataError(
                f"{path}: must list the {size} {split} characters of Vinyals et al., got {len(listed)}"
                f"{''.join(f'; {fault}' for fault in faults)}."
                f" Get the list from {release.vinyals_url.format(split=split)}."
            )
        splits |= dict.fromkeys(listed, split)
    return splits


def _vinyals_list(split: str, release: Release, source: Path | None, cache: Path | None, progress: Progress) -> Path:
    url = release.vinyals_url.format(split=split)
    if source is None:
        assert cache is not None
        return download(url, cache / f"vinyals_split_{split}.txt", progress=progress)
    for path in (source / f"vinyals_split_{split}.txt", source / f"{split}.txt"):
        if path.is_file():
            return path
    raise DataError(
        f"{source}: --split vinyals needs the list vinyals_split_{split}.txt or {split}.txt there."
        f" Get it from {url}, or choose --split finn."
    )


def _read_list(path: Path) -> set[str]:
    """Lines `Alphabet/characterNN`, or `Alphabet/characterNN/rotNNN`, whose rotation is dropped."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable list ({error}). Copy it again.") from error
    return {"/".join(line.strip().split("/")[:2]) for line in lines if line.strip()}


def _rows(
    drawings: Mapping[str, list[tuple[FileTree, str]]],
    splits: Mapping[str, str],
    size: int,
    resample: str,
    progress: Progress,
) -> Iterator[PoolRow]:
    method = {"lanczos": Image.Resampling.LANCZOS, "nearest": Image.Resampling.NEAREST}[resample]
    for done, (character, images) in enumerate(drawings.items()):
        progress("characters", done, len(drawings))
        for tree, member in images:
            pixels = decode_image(tree.read(member), tree.where(member))[0]
            scaled = Image.fromarray(pixels).resize((size, size), method)
            file = io.BytesIO()
            Image.fromarray(255 - np.asarray(scaled)).save(file, "PNG")
            yield PoolRow(character, character.split("/")[0], splits[character], image=file.getvalue())
    progress("characters", len(drawings), len(drawings))
