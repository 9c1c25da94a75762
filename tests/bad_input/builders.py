"""What a user gets wrong: small configs, class pools and run directories, and ways to spoil them."""

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from click.testing import CliRunner
from PIL import Image

import metadist
from metadist.cli import cli

GOOD = """\
task:
  name: sinusoid
  shots: 3
  queries: 3
model:
  name: mlp
  hidden: [4]
algorithm:
  name: maml
  inner_lr: 0.01
outer:
  lr: 0.001
training:
  steps: 2
  meta_batch_size: 2
  chunk_size: 1
evaluation:
  episodes: 2
scaling:
  num_workers: 0
run:
  name: x
  checkpoint_config:
    checkpoint_frequency: 1
"""

FEW_SHOT = GOOD.replace("sinusoid\n  shots: 3\n  queries: 3", "few_shot\n  pool: pool.parquet\n  ways: 2")
CONV = FEW_SHOT.replace("mlp\n  hidden: [4]", "conv4\n  filters: 2").replace(
    "  steps: 2", "  steps: 2\n  batch_norm: support\n  compile: false"
)

CLASSES = {"a": "train", "b": "train", "c": "train", "d": "val", "e": "val", "f": "test", "g": "test"}

RUN = "runs/x [red]"
"""A name that rich would take for markup."""


@dataclass
class Outcome:
    """What a command line gave."""

    status: int
    stdout: str
    said: str
    """stderr, and the exception that was not caught."""


@dataclass
class Place:
    """A user's working directory."""

    path: Path
    trained: Path
    """A run directory elsewhere: the good config's, with checkpoints of steps 1 and 2."""

    def write(self, text: str | bytes, name: str = "bad.yaml") -> None:
        (self.path / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    def pool(self, rows: list[dict] | None = None, without: tuple[str, ...] = ()) -> None:
        """Writes pool.parquet."""
        table = pa.Table.from_pylist(vectors() if rows is None else rows).drop_columns(list(without))
        pq.write_table(table, self.path / "pool.parquet")

    def files(self) -> dict[str, bytes]:
        """The files of every checkpoint here."""
        found = sorted(self.path.glob("runs/*/checkpoints/step_*/*"))
        return {str(file.relative_to(self.path)): file.read_bytes() for file in found if file.is_file()}


Prepare = Callable[[Place], list[str]]
"""Spoils something in a place, and gives the command line that meets it."""


def run(arguments: list[str]) -> Outcome:
    """The command line in this process."""
    result = CliRunner().invoke(cli, arguments, catch_exceptions=True)
    crashed = result.exception is not None and not isinstance(result.exception, SystemExit)
    return Outcome(result.exit_code, result.stdout, result.stderr + (f"Traceback: {result.exception!r}" * crashed))


def run_limited(limits: str, arguments: list[str], place: Place) -> Outcome:
    """The command line in a process of its own, after the Python statements `limits` have taken something from it."""
    program = f"import os, sys; {limits}; os.execv(sys.executable, [sys.executable, '-m', 'metadist', *sys.argv[1:]])"
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=place.path,
        env=os.environ | {"PYTHONPATH": str(Path(metadist.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return Outcome(result.returncode, result.stdout, result.stderr)


def train(*more: str) -> list[str]:
    return ["train", "bad.yaml", "--workers", "0", "--no-evaluate", *more]


def evaluate(*more: str) -> list[str]:
    return ["evaluate", RUN, "--workers", "0", *more]


def sets(assignments: tuple[str, ...]) -> list[str]:
    return [part for assignment in assignments for part in ("--set", assignment)]


def command(*arguments: str, config: str | bytes = GOOD) -> Prepare:
    """A command line beside a config, bad.yaml."""

    def prepare(place: Place) -> list[str]:
        place.write(config)
        return list(arguments)

    return prepare


def config(text: str | bytes) -> Prepare:
    return command(*train(), config=text)


def edited(old: str, new: str) -> Prepare:
    """The good config with one mistake in it."""
    assert GOOD.count(old) == 1, old
    return config(GOOD.replace(old, new))


def setting(*assignments: str, config: str = GOOD) -> Prepare:
    return command(*train(*sets(assignments)), config=config)


def pool(
    rows: list[dict] | None = None,
    *assignments: str,
    without: tuple[str, ...] = (),
    config: str = FEW_SHOT,
    then: tuple[str, ...] = ("--no-evaluate",),
) -> Prepare:
    """Training on a class pool of these rows, without some columns."""

    def prepare(place: Place) -> list[str]:
        place.pool(rows, without)
        return command("train", "bad.yaml", "--workers", "0", *sets(assignments), *then, config=config)(place)

    return prepare


def pool_file(spoil: Callable[[bytes], bytes]) -> Prepare:
    """Training on a class pool whose file is no longer what it was."""

    def prepare(place: Place) -> list[str]:
        place.pool()
        file = place.path / "pool.parquet"
        file.write_bytes(spoil(file.read_bytes()))
        return config(FEW_SHOT)(place)

    return prepare


def vectors(count: int = 3, spoil: dict[int, list[float]] | None = None) -> list[dict]:
    """`count` vectors in each of seven classes; `spoil` replaces those of some rows."""
    names = [name for name in CLASSES for _ in range(count)]
    return [
        {"class": name, "split": CLASSES[name], "features": (spoil or {}).get(row, [float(row), 0.5, -1.0])}
        for row, name in enumerate(names)
    ]


def images(height: int, width: int, spoil: dict[int, bytes] | None = None) -> list[dict]:
    """Three grey images in each of seven classes."""
    rows = [{key: row[key] for key in ("class", "split")} for row in vectors()]
    return [row | {"image": (spoil or {}).get(n, png(height, width, n))} for n, row in enumerate(rows)]


def png(height: int, width: int, seed: int = 0) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width), np.uint8)).save(file, "PNG")
    return file.getvalue()


Damage = Callable[[Path], None]


def used_run(*damages: Damage, then: list[str]) -> Prepare:
    """A run of bad.yaml with checkpoints of steps 1 and 2, damaged; and what is done with it then."""

    def prepare(place: Place) -> list[str]:
        place.write(GOOD)
        shutil.copytree(place.trained, place.path / RUN)
        assert len(place.files()) == 10
        for damage in damages:
            damage(place.path / RUN)
        return then

    return prepare


def resume(*more: str) -> list[str]:
    return train("--run-dir", RUN, *more)


def flip(name: str, step: int = 2) -> Damage:
    """Changes one bit in the middle of a checkpoint's file."""

    def damage(directory: Path) -> None:
        file = checkpoint(directory, step) / name
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)

    return damage


def cut(name: str, length: int) -> Damage:
    """Leaves the first bytes of a file of the newest checkpoint, as a kill or a full disk does."""

    def damage(directory: Path) -> None:
        file = checkpoint(directory, 2) / name
        file.write_bytes(file.read_bytes()[:length])

    return damage


def remove(name: str) -> Damage:
    def damage(directory: Path) -> None:
        path = directory / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()

    return damage


def replace(name: str, content: bytes) -> Damage:
    """Puts a file where another file or a directory was."""

    def damage(directory: Path) -> None:
        remove(name)(directory)
        (directory / name).write_bytes(content)

    return damage


def checkpoint(directory: Path, step: int) -> Path:
    return directory / "checkpoints" / f"step_{step:08d}"


def one_checkpoint(directory: Path) -> None:
    """Leaves only that of step 2."""
    shutil.rmtree(checkpoint(directory, 1))


def other_fingerprint(directory: Path) -> None:
    file = directory / "fingerprint.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"torch": "1.0.0"}))
