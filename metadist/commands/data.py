"""`metadist data`: makes class pools, and looks at them."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, TypeVar

import click
from rich.console import Console
from rich.progress import Progress as ProgressBars
from rich.progress import TaskID
from rich.table import Table
from rich.text import Text

from metadist.core.keys import SPLITS
from metadist.tasks.importers.download import Progress
from metadist.tasks.importers.folder import (
    ImportSummary,
    Split,
    SplitFile,
    SplitFractions,
    SplitLists,
    import_folder,
)
from metadist.tasks.importers.omniglot import import_omniglot
from metadist.tasks.inspect import inspect_pool, render

Command = TypeVar("Command", bound=Callable[..., Any])

DEFAULT_SEED = 1


def out_option(default: str) -> Callable[[Command], Command]:
    return click.option(
        "--out",
        type=click.Path(path_type=Path, dir_okay=False),
        default=Path(default),
        show_default=True,
        help="Class pool to write; a file of that name is replaced.",
    )


seed_option = click.option(
    "--seed", type=click.IntRange(min=0), help=f"Seed of a random split.  [default: {DEFAULT_SEED}]"
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")


@click.group()
def data() -> None:
    """Make class pools for few-shot tasks, and look at them."""


@data.group("import")
def import_group() -> None:
    """Make a class pool: one Parquet file, to be named in task.pool."""


@import_group.command()
@click.option(
    "--source",
    type=click.Path(path_type=Path),
    help="Directory with images_background and images_evaluation, as .zip or unpacked.",
)
@click.option("--download", is_flag=True, help="Get the official archives instead.")
@click.option(
    "--cache",
    type=click.Path(path_type=Path, file_okay=False),
    help="Directory for downloaded archives.  [default: the user's cache directory]",
)
@out_option("data/omniglot.parquet")
@click.option(
    "--split",
    type=click.Choice(["finn", "vinyals"]),
    default="finn",
    show_default=True,
    help="finn: 1,100/100/423 characters at random. vinyals: the 1,028/172/423 of Vinyals et al., from lists.",
)
@click.option("--size", type=click.IntRange(min=1), default=28, show_default=True, help="Width and height in pixels.")
@click.option(
    "--resample",
    type=click.Choice(["lanczos", "nearest"]),
    default="lanczos",
    show_default=True,
    help="How images are scaled; Finn et al. asked for lanczos and, from 1-bit images, got nearest.",
)
@click.option(
    "--hold-out",
    multiple=True,
    metavar="ALPHABET",
    help="An alphabet whose characters all go to test, such as Latin; may be given more than once.",
)
@seed_option
@json_option
def omniglot(
    source: Path | None,
    download: bool,
    cache: Path | None,
    out: Path,
    split: Literal["finn", "vinyals"],
    size: int,
    resample: Literal["lanczos", "nearest"],
    hold_out: tuple[str, ...],
    seed: int | None,
    as_json: bool,
) -> None:
    """Omniglot: 1,623 handwritten characters, 20 drawings each."""
    if (source is not None) == download:
        raise click.UsageError(
            "Give either --source DIR, where the Omniglot archives lie, or --download to get the official ones."
        )
    if cache is not None and not download:
        raise click.UsageError("--cache is where --download puts archives. Give --download, or leave --cache out.")
    if seed is not None and split == "vinyals":
        raise click.UsageError("--seed changes nothing with --split vinyals, which is fixed. Leave it out.")
    with _progress_bars() as progress:
        summary = import_omniglot(
            out,
            source=source,
            cache=(cache or _default_cache() / "omniglot") if download else None,
            split=split,
            size=size,
            resample=resample,
            seed=DEFAULT_SEED if seed is None else seed,
            hold_out=hold_out,
            progress=progress,
        )
    _print_summary(summary, as_json)


@import_group.command()
@click.option(
    "--source",
    required=True,
    type=click.Path(path_type=Path),
    help="Directory or zip archive with one directory of images a class.",
)
@click.option("--prefix", help="Directory within the source that holds the class directories.  [default: found]")
@out_option("data/folder.parquet")
@click.option(
    "--size", type=click.IntRange(min=1), help="Scale images to this width and height.  [default: as they are]"
)
@click.option(
    "--color",
    type=click.Choice(["auto", "rgb", "grey"]),
    default="auto",
    show_default=True,
    help="auto: grey where every image is grey, else rgb.",
)
@click.option(
    "--split-fractions",
    metavar="TRAIN,VAL,TEST",
    help="Split classes at random by these fractions.  [default: 0.64,0.16,0.2]",
)
@click.option(
    "--split-file",
    type=click.Path(path_type=Path),
    help="CSV file with the columns class (or wnid) and split, and perhaps superclass.",
)
@click.option(
    "--split-list",
    "split_lists",
    multiple=True,
    metavar="DIR | SPLIT=FILE",
    help="Text files with one class a line: a directory with train.txt, val.txt and test.txt,"
    " or one file for each use of this option, as train=FILE.",
)
@click.option("--only-listed", is_flag=True, help="Leave out classes that the split file or lists do not name.")
@seed_option
@json_option
def folder(
    source: Path,
    prefix: str | None,
    out: Path,
    size: int | None,
    color: Literal["auto", "rgb", "grey"],
    split_fractions: str | None,
    split_file: Path | None,
    split_lists: Sequence[str],
    only_listed: bool,
    seed: int | None,
    as_json: bool,
) -> None:
    """Your own images: one directory a class, or a zip archive of that."""
    split = _choose_split(split_fractions, split_file, split_lists, only_listed, seed)
    with _progress_bars() as progress:
        summary = import_folder(
            out, source=source, split=split, size=size, color=color, prefix=prefix, progress=progress
        )
    _print_summary(summary, as_json)


@data.command("inspect")
@click.argument("file")
@json_option
def inspect_command(file: str, as_json: bool) -> None:
    """Check the class pool FILE, a path or a URI, and say what can be drawn from it."""
    summary = inspect_pool(file)
    if as_json:
        click.echo(json.dumps(summary))
    else:
        Console().print(render(summary))


def _choose_split(
    fractions: str | None, file: Path | None, lists: Sequence[str], only_listed: bool, seed: int | None
) -> Split:
    if sum([fractions is not None, file is not None, bool(lists)]) > 1:
        raise click.UsageError("Give only one of --split-fractions, --split-file and --split-list.")
    if (file is not None or lists) and seed is not None:
        raise click.UsageError("--seed changes nothing where classes are listed. Leave it out.")
    if only_listed and file is None and not lists:
        raise click.UsageError("--only-listed needs --split-file or --split-list.")
    if file is not None:
        return SplitFile(path=file, only_listed=only_listed)
    if lists:
        return SplitLists(paths=_list_paths(lists), only_listed=only_listed)
    train, val, test = _three_numbers(fractions or "0.64,0.16,0.2")
    return SplitFractions(train=train, val=val, test=test, seed=DEFAULT_SEED if seed is None else seed)


def _three_numbers(text: str) -> tuple[float, float, float]:
    try:
        train, val, test = (float(number) for number in text.split(","))
    except ValueError as error:
        raise click.UsageError(
            f"--split-fractions must be three numbers with commas between them, got {text!r}. Try 0.64,0.16,0.2."
        ) from error
    return train, val, test


def _list_paths(values: Sequence[str]) -> dict[str, Path]:
    if len(values) == 1 and values[0].partition("=")[0] not in SPLITS:
        directory = Path(values[0])
        return {split: directory / f"{split}.txt" for split in SPLITS}
    paths: dict[str, Path] = {}
    for value in values:
        split, equals, name = value.partition("=")
        if split not in SPLITS or not equals or not name or split in paths:
            raise click.UsageError(
                f"--split-list must be one directory, or train=FILE, val=FILE and test=FILE once each, got {value!r}."
            )
        paths[split] = Path(name)
    return paths


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metadist"


@contextmanager
def _progress_bars() -> Iterator[Progress]:
    """Bars on a terminal's standard error; nothing where it is a file."""
    console = Console(stderr=True)
    bars = ProgressBars(console=console, disable=not console.is_terminal, transient=True)
    tasks: dict[str, TaskID] = {}

    def show(what: str, done: int, total: int | None) -> None:
        if what not in tasks:
            tasks[what] = bars.add_task(what, total=total)
        bars.update(tasks[what], completed=done, total=total)

    with bars:
        yield show


def _print_summary(summary: ImportSummary, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(asdict(summary)))
        return
    table = Table("split", "classes", *(["with task.rotate_classes"] if summary.classes_with_rotations else []))
    for split, classes in summary.classes.items():
        rotated = [f"{count:,}" for name, count in summary.classes_with_rotations.items() if name == split]
        table.add_row(split, f"{classes:,}", *rotated)
    console = Console()
    console.print(Text(f"{summary.pool}: {summary.examples:,} images, {' x '.join(map(str, summary.shape))}"))
    console.print(table)
    for count, words in (
        (summary.ignored_files, "other files ignored"),
        (summary.left_out_classes, "classes left out"),
    ):
        if count:
            console.print(f"{count:,} {words}")
