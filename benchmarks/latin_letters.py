"""Adapts a run that never saw the Latin alphabet to its 26 letters, from one drawing and from five of each.

    metadist data import omniglot --download --hold-out Latin --out data/omniglot_without_latin.parquet
    metadist train configs/omniglot_without_latin.yaml
    python benchmarks/latin_letters.py runs/omniglot_without_latin data/omniglot_without_latin.parquet

Prints, for support sets of several people, the accuracy on all other drawings beside the estimate that cross-validation
gives from the support set alone, and draws docs/latin_letters.png.
"""

import json
import string
import sys
from pathlib import Path

import matplotlib
import numpy as np

import metadist
from metadist.cross_validation import wilson
from metadist.tasks.class_pool import read_pool

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def drawings_of(pool_path: str) -> np.ndarray:
    """uint8 `[26, 20, 1, 28, 28]`: letters in the alphabet's order, drawers in one order throughout."""
    pool = read_pool(pool_path)
    letters = [number for number, name in enumerate(pool.superclasses) if name == "Latin"]
    assert {pool.splits[letter] for letter in letters} == {"test"}, "Latin was not held out"
    return np.stack([pool.examples[pool.starts[letter] : pool.starts[letter + 1]] for letter in letters])


def score(run: metadist.LoadedRun, drawings: np.ndarray, drawers: list[int]) -> tuple[dict, metadist.AdaptedModel]:
    """Adapts to the drawings of some people and scores those of all others."""
    letters = np.array(list(string.ascii_uppercase))
    others = [drawer for drawer in range(drawings.shape[1]) if drawer not in drawers]
    model = run.adapt(drawings[:, drawers].reshape(-1, 1, 28, 28), np.repeat(letters, len(drawers)))
    predicted = model.predict(drawings[:, others].reshape(-1, 1, 28, 28))
    right = int((predicted == np.repeat(letters, len(others))).sum())
    found = model.cross_validation
    return {
        "shots": len(drawers),
        "drawers": drawers,
        "accuracy": right / len(predicted),
        "ci95": wilson(right, len(predicted)),
        "estimate": found.score if found else None,
        "estimate_ci95": found.interval if found else None,
    }, model


def draw(model: metadist.AdaptedModel, drawings: np.ndarray, path: Path) -> None:
    """One row of the drawings adapted to, and three rows of others' with what each was taken for."""
    letters = string.ascii_uppercase
    figure, axes = plt.subplots(4, 26, figsize=(13, 2.7))
    for row, drawer in enumerate((0, 5, 10, 15)):
        predicted = model.predict(drawings[:, drawer])
        for column, axis in enumerate(axes[row]):
            axis.imshow(255 - drawings[column, drawer, 0], cmap="gray", vmin=0, vmax=255)
            axis.set(xticks=[], yticks=[])
            right = predicted[column] == letters[column]
            title = letters[column] if row == 0 else predicted[column]
            axis.set_title(title, fontsize=9, pad=2, color="black" if row == 0 or right else "tab:red")
            axis.spines[:].set_visible(row == 0)
    axes[0, 0].set_ylabel("adapted to", fontsize=8, rotation=0, ha="right", va="center")
    axes[2, 0].set_ylabel("predicted", fontsize=8, rotation=0, ha="right", va="center")
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=120)


def main(run_dir: str, pool_path: str) -> None:
    run, drawings = metadist.load(run_dir), drawings_of(pool_path)
    results = []
    for drawers in ([0], [5], [10], [0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12, 13, 14]):
        result, model = score(run, drawings, drawers)
        results.append(result)
        sys.stdout.write(json.dumps(result) + "\n")
        if drawers == [0]:
            draw(model, drawings, Path("docs/latin_letters.png"))


if __name__ == "__main__":
    main(*sys.argv[1:])
