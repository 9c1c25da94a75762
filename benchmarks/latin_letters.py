"""Adapts a run that never saw the Latin alphabet to its 26 letters, from one drawing and from five of each.

    metadist data import omniglot --download --hold-out Latin --out data/omniglot_without_latin.parquet
    metadist train configs/omniglot_without_latin.yaml
    python benchmarks/latin_letters.py runs/omniglot_without_latin data/omniglot_without_latin.parquet

Prints the accuracy on all other drawings beside the estimate that cross-validation gives from the support set alone
(from one drawing of each there can be none: then what tasks of held-out classes let expect), and draws
docs/latin_letters.png.
"""

import json
import string
import sys
from pathlib import Path

import matplotlib
import numpy as np

import metadist
from metadist.cross_validation import wilson
from metadist.held_out import Expectation, expected_accuracy
from metadist.tasks.class_pool import read_pool

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def drawings_of(pool_path: str) -> np.ndarray:
    """uint8 `[26, 20, 1, 28, 28]`: letters in the alphabet's order, drawers in one order throughout."""
    pool = read_pool(pool_path)
    letters = [number for number, name in enumerate(pool.superclasses) if name == "Latin"]
    assert {pool.splits[letter] for letter in letters} == {"test"}, "Latin was not held out"
    return np.stack([pool.examples[pool.starts[letter] : pool.starts[letter + 1]] for letter in letters])


def score(
    run: metadist.LoadedRun, drawings: np.ndarray, chosen: np.ndarray, expected: Expectation | None
) -> tuple[dict, metadist.AdaptedModel]:
    """Adapts to the drawings `chosen: bool [26, 20]`, and scores all others."""
    letters = np.array(list(string.ascii_uppercase))
    number = np.broadcast_to(np.arange(26)[:, None], chosen.shape)
    model = run.adapt(drawings[chosen], letters[number[chosen]])
    predicted = model.predict(drawings[~chosen])
    right = int((predicted == letters[number[~chosen]]).sum())
    found = model.cross_validation
    return {
        "shots": int(chosen[0].sum()),
        "accuracy": right / len(predicted),
        "ci95": wilson(right, len(predicted)),
        "estimate": found.score if found else None,
        "estimate_ci95": found.interval if found else None,
        "expected": expected.mean if expected else None,
        "expected_range": expected.range if expected else None,
    }, model


def at_random(shots: int, seed: int) -> np.ndarray:
    """So many drawings of each letter, bool `[26, 20]`."""
    random = np.random.default_rng([shots, seed])
    return random.permuted(np.arange(20) < np.full((26, 1), shots), axis=1)


def inside(value: float, interval: tuple[float, float]) -> bool:
    return interval[0] <= value <= interval[1]


def summary(results: list[dict], estimate: str, interval: str) -> str:
    """How the estimates of many support sets compare with the truth."""
    truths, estimates = (np.array([row[name] for row in results]) for name in ("accuracy", estimate))
    covered = sum(inside(row["accuracy"], row[interval]) for row in results)
    back = sum(inside(row[estimate], row["ci95"]) for row in results)
    low, high = np.mean([row[interval] for row in results], axis=0)
    return (
        f"{results[0]['shots']} drawings a letter, {len(results)} random support sets: accuracy {truths.mean():.1%},"
        f" {estimate} {estimates.mean():.1%} ({low:.1%} to {high:.1%} on average); the accuracy lies in that interval"
        f" {covered} times, the {estimate} in the accuracy's own {back} times\n"
    )


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


def main(run_dir: str, pool_path: str, supports: int = 40) -> None:
    run, drawings = metadist.load(run_dir), drawings_of(pool_path)
    for shots in (1, 5):
        expected = expected_accuracy(run, (shots,) * 26, run.config.inner_steps_at_test)
        # One person's hand (five people's), and then drawings of any.
        for first in (0, 5, 10):
            people = np.isin(np.arange(20), range(first, first + shots))
            result, model = score(run, drawings, np.broadcast_to(people, (26, 20)), expected)
            sys.stdout.write(json.dumps({"people from": first} | result) + "\n")
            if (shots, first) == (1, 0):
                draw(model, drawings, Path("docs/latin_letters.png"))
        results = [score(run, drawings, at_random(shots, seed), expected)[0] for seed in range(supports)]
        if shots > 1:
            sys.stdout.write(summary(results, "estimate", "estimate_ci95"))
        sys.stdout.write(summary(results, "expected", "expected_range"))


if __name__ == "__main__":
    main(*sys.argv[1:3])
