"""Feeds tasks of an alphabet back to a run that never saw it, and scores characters that no task held.

    metadist data import omniglot --download --hold-out Braille --out data/omniglot_without_braille.parquet
    metadist train configs/omniglot_without_latin.yaml --set task.pool=data/omniglot_without_braille.parquet ...
    python -m benchmarks.updating RUN data/omniglot_without_braille.parquet --alphabet Braille

Half of the characters are learned from: 5, 20 and 50 tasks, each of ten of them by twelve people. Scored are the
others, from one drawing each, before and after, on the same support sets; and old tasks, by `metadist update` itself.
The run is copied, and stays as it was. Several alphabets are fed back one after another, each to the run as it was;
their means come last.
"""

import argparse
import io
import json
import math
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

import metadist
from metadist.scores import mean_and_interval
from metadist.tasks.class_pool import read_pool
from metadist.updating import roll_back

WAYS, DRAWINGS = 10, 12


def drawings_of(pool_path: str, alphabet: str) -> np.ndarray:
    """uint8 `[characters, drawers, 1, height, width]` of an alphabet that was held out."""
    pool = read_pool(pool_path)
    characters = [number for number, name in enumerate(pool.superclasses) if name == alphabet]
    if not characters or {pool.splits[character] for character in characters} != {"test"}:
        sys.exit(f"{pool_path}: {alphabet} was not held out. Import it so: --hold-out {alphabet}.")
    return np.stack([pool.examples[pool.starts[each] : pool.starts[each + 1]] for each in characters])


def write_tasks(drawings: np.ndarray, learned: np.ndarray, place: Path, number: int) -> str:
    """One Parquet file a task."""
    place.mkdir()
    for task in range(number):
        random = np.random.default_rng([1, task])
        rows = [
            {"class": f"character {character}", "image": _png(drawings[character, drawer, 0])}
            for character in random.choice(learned, WAYS, replace=False)
            for drawer in random.choice(drawings.shape[1], DRAWINGS, replace=False)
        ]
        pq.write_table(pa.Table.from_pylist(rows), place / f"task_{task:02d}.parquet")
    return str(place)


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def accuracies(run_dir: str, drawings: np.ndarray, supports: int) -> np.ndarray:
    """float64 `[supports]`: on all other drawings, from one drawing of each character."""
    run, scores = metadist.load(run_dir), []
    characters, drawers = drawings.shape[:2]
    labels = np.broadcast_to(np.arange(characters)[:, None], (characters, drawers))
    for seed in range(supports):
        chosen = np.random.default_rng([2, seed]).integers(drawers, size=characters)[:, None] == np.arange(drawers)
        model = run.adapt(drawings[chosen], labels[chosen], cross_validation=False)
        scores.append(model.score(drawings[~chosen], labels[~chosen]))
    return np.array(scores)


def updates(asked: argparse.Namespace, alphabet: str) -> list[dict]:
    """A row for no task and for each number of them."""
    drawings = drawings_of(asked.pool, alphabet)
    order = np.random.default_rng(0).permutation(len(drawings))
    learned, others = order[: len(order) // 2], np.sort(order[len(order) // 2 :])
    with tempfile.TemporaryDirectory() as directory:
        run = str(shutil.copytree(asked.run, f"{directory}/run"))
        theta, before = metadist.load(run).theta, accuracies(run, drawings[others], asked.supports)
        rows = [{"alphabet": alphabet, "tasks": 0, "other_characters": mean_and_interval(before)}]
        _print(rows[0])
        for number in asked.tasks:
            tasks = write_tasks(drawings, learned, Path(directory) / f"tasks_{number}", number)
            steps = math.ceil(asked.rounds * number / 4) if asked.rounds else None
            found = metadist.update(run, tasks, lr=asked.lr, steps=steps)
            row = {"alphabet": alphabet, "tasks": number, "steps": found.steps, "lr": found.lr}
            row |= {"accepted": found.accepted, "old_tasks": found.old_after, "old_change": found.old_change}
            if found.accepted:
                after = accuracies(run, drawings[others], asked.supports)
                row |= {"other_characters": mean_and_interval(after), "gain": mean_and_interval(after - before)}
                roll_back(run)
            row["rolled_back_to_the_same_bits"] = bool((metadist.load(run).theta == theta).all())
            rows.append(row)
            _print(row)
    return rows


def over_alphabets(rows: list[dict]) -> dict:
    """Means of what the alphabets of one number of tasks gained; intervals of independent means."""

    def mean(name: str) -> dict[str, float]:
        found = [row[name] for row in rows]
        half = math.sqrt(sum(each["ci95"] ** 2 for each in found)) / len(found)
        return {"mean": float(np.mean([each["mean"] for each in found])), "ci95": half}

    names = [name for name in ("other_characters", "gain", "old_change") if all(name in row for row in rows)]
    return {"alphabets": len(rows), "tasks": rows[0]["tasks"]} | {name: mean(name) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("pool")
    parser.add_argument("--alphabet", nargs="+", required=True)
    parser.add_argument("--tasks", type=int, nargs="+", default=[5, 20, 50])
    parser.add_argument("--supports", type=int, default=40)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--rounds", type=int, help="times that each new task is drawn")
    asked = parser.parse_args()
    alphabets = [updates(asked, alphabet) for alphabet in asked.alphabet]
    for rows in zip(*alphabets, strict=True):
        _print(over_alphabets(list(rows)))


def _print(row: dict) -> None:
    sys.stdout.write(json.dumps(row) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
