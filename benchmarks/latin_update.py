"""Feeds tasks of the Latin alphabet back to a run that never saw it, and scores letters that no task held.

    python -m benchmarks.latin_update runs/omniglot_without_latin data/omniglot_without_latin.parquet

Half of the letters are learned from: 5, 20 and 50 tasks, each of ten of them by twelve people. Scored are the other
letters, from one drawing each, before and after, on the same support sets; and old tasks, by `metadist update` itself.
The run is copied, and stays as it was.
"""

import argparse
import io
import json
import math
import shutil
import string
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

import metadist
from benchmarks.latin_letters import at_random, drawings_of
from metadist.scores import mean_and_interval
from metadist.updating import roll_back

LEARNED = np.random.default_rng(0).permutation(26)[:13]
OTHERS = np.setdiff1d(np.arange(26), LEARNED)
WAYS, DRAWINGS = 10, 12


def write_tasks(drawings: np.ndarray, place: Path, number: int) -> str:
    """One Parquet file a task."""
    place.mkdir()
    for task in range(number):
        random = np.random.default_rng([1, task])
        rows = [
            {"class": string.ascii_uppercase[letter], "image": _png(drawings[letter, drawer, 0])}
            for letter in random.choice(LEARNED, WAYS, replace=False)
            for drawer in random.choice(drawings.shape[1], DRAWINGS, replace=False)
        ]
        pq.write_table(pa.Table.from_pylist(rows), place / f"task_{task:02d}.parquet")
    return str(place)


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def accuracies(run_dir: str, drawings: np.ndarray, supports: int) -> np.ndarray:
    """float64 `[supports]`: on all other drawings of letters that no task held, from one drawing of each."""
    run, scores = metadist.load(run_dir), []
    for seed in range(supports):
        chosen = at_random(1, seed)[OTHERS]
        labels = np.broadcast_to(OTHERS[:, None], chosen.shape)
        model = run.adapt(drawings[OTHERS][chosen], labels[chosen], cross_validation=False)
        scores.append(model.score(drawings[OTHERS][~chosen], labels[~chosen]))
    return np.array(scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("pool")
    parser.add_argument("--tasks", type=int, nargs="+", default=[5, 20, 50])
    parser.add_argument("--supports", type=int, default=40)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--rounds", type=int, help="times that each new task is drawn")
    asked = parser.parse_args()
    drawings = drawings_of(asked.pool)
    with tempfile.TemporaryDirectory() as directory:
        run = str(shutil.copytree(asked.run, f"{directory}/run"))
        theta, before = metadist.load(run).theta, accuracies(run, drawings, asked.supports)
        _print({"tasks": 0, "other_letters": mean_and_interval(before)})
        for number in asked.tasks:
            tasks = write_tasks(drawings, Path(directory) / f"tasks_{number}", number)
            steps = math.ceil(asked.rounds * number / 4) if asked.rounds else None
            found = metadist.update(run, tasks, lr=asked.lr, steps=steps)
            row = {"tasks": number, "steps": found.steps, "lr": found.lr, "accepted": found.accepted}
            row |= {"old_tasks": found.old_after, "old_change": found.old_change}
            if found.accepted:
                after = accuracies(run, drawings, asked.supports)
                row |= {"other_letters": mean_and_interval(after), "gain": mean_and_interval(after - before)}
                roll_back(run)
            row["rolled_back_to_the_same_bits"] = bool((metadist.load(run).theta == theta).all())
            _print(row)


def _print(row: dict) -> None:
    sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
