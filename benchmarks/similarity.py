"""Does the verdict "far" foretell that meta-learning hurts? `python -m benchmarks.similarity RUN --other POOL`.

Tasks of several families are adapted to, and scored with query labels beside predictors that do without
meta-learning. It hurts where the adapted model is no better than the best of these; `foretold` has the definitions.
"""

import time
from collections import defaultdict
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.results import write_results
from metadist.adaptation import LoadedRun, load
from metadist.baselines import BASELINES, accuracy
from metadist.core.episode import Examples
from metadist.core.keys import TaskKey, generator
from metadist.similarity import FAR, Neighbourhood, distance, make_neighbourhood
from metadist.tasks.class_pool import read_pool
from metadist.tasks.few_shot import FewShot, FewShotSource

FAMILIES = ("held-out characters", "other images", "shuffled labels", "inverted", "turned by 45 degrees")
WAYS, SHOTS, QUERIES = 5, 5, 15
Z95_ONE_SIDED = 1.64
WITHOUT = [name for name in BASELINES if name != "transfer"]
"""Predictors that have nothing from the run."""


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Probability that a positive has a higher score than a negative, ties counting half; NaN without both."""
    above, below = scores[positive], scores[~positive]
    if not len(above) or not len(below):
        return float("nan")
    return float(np.mean((above[:, None] > below) + 0.5 * (above[:, None] == below)))


def drawn(family: str, own: FewShotSource, other: FewShotSource, seed: int, task: int) -> tuple[Examples, Examples]:
    """Support and query set of one task."""
    key = TaskKey(seed, "test", 0, task)
    episode = (other if family == "other images" else own).sample([key])
    parts = [Examples(part.x[0], part.y[0]) for part in (episode.support, episode.query)]
    if family == "shuffled labels":
        random = generator(TaskKey(seed, "test", 1, task))
        parts = [Examples(part.x, part.y[torch.from_numpy(random.permutation(len(part.y)))]) for part in parts]
    elif family == "inverted":
        parts = [Examples(1 - part.x, part.y) for part in parts]
    elif family == "turned by 45 degrees":
        parts = [Examples(_turned(part.x), part.y) for part in parts]
    return parts[0], parts[1]


def _turned(x: torch.Tensor) -> torch.Tensor:
    half = 0.5**0.5
    turn = torch.tensor([[half, -half, 0.0], [half, half, 0.0]]).expand(len(x), 2, 3)
    grid = torch.nn.functional.affine_grid(turn, list(x.shape), align_corners=False)
    return torch.nn.functional.grid_sample(x, grid, padding_mode="border", align_corners=False)


def measure(run: LoadedRun, around: Neighbourhood, family: str, support: Examples, query: Examples) -> dict[str, Any]:
    """One task's distance and p-value, and accuracy on its query set by predictor."""
    far = distance(around.deviations(support))
    model = run.adapt(
        support.x.numpy(), support.y.numpy(), steps=run.config.inner_steps_at_test, cross_validation=False
    )
    adapted = model.score(query.x.numpy(), query.y.numpy())
    others = {name: accuracy(predictor, run, support, WAYS, query) for name, predictor in BASELINES.items()}
    return {"family": family, "distance": far, "p_value": around.p_value(far), "adapted": adapted} | others


@click.command()
@click.argument("run_dir", metavar="RUN")
@click.option("--other", required=True, metavar="POOL", help="A class pool of other images, of the run's size.")
@click.option("--tasks", default=200, show_default=True, type=click.IntRange(min=len(FAMILIES)))
@click.option("--seed", default=1, show_default=True)
def main(run_dir: str, other: str, tasks: int, seed: int) -> None:
    """Prints a row a family and the AUROC, and writes benchmarks/results/similarity.json."""
    torch.set_num_threads(1)
    run = load(run_dir)
    source: Any = run.experiment.source
    asked = FewShot(pool=source.pool.path, ways=WAYS, shots=SHOTS, queries=QUERIES)
    own = FewShotSource(asked, source.pool)
    others = FewShotSource(asked, read_pool(other))
    begun = time.monotonic()
    around = make_neighbourhood(run, (SHOTS,) * WAYS)
    console, progress = Console(), Console(stderr=True)
    progress.print(f"compared with its own tasks after {time.monotonic() - begun:.0f} s")
    rows = []
    for task in range(tasks):
        family = FAMILIES[task % len(FAMILIES)]
        rows.append(measure(run, around, family, *drawn(family, own, others, seed, task)))
        if task % 10 == 9:
            progress.print(f"{task + 1} of {tasks} tasks, {time.monotonic() - begun:.0f} s")
    console.print(table(rows))
    found = foretold(rows)
    for definition, (tasks_hurt, area) in found.items():
        console.print(f"{definition}: {tasks_hurt} tasks; AUROC {area:.3f}")
    result = {"run": run_dir, "step": run.step, "seed": seed, "tasks": tasks, "rows": rows, "auroc": found}
    write_results("benchmarks/results/similarity.json", result)


def foretold(rows: list[dict[str, Any]]) -> dict[str, tuple[int, float]]:
    """By definition of "hurts": how many tasks it hurts, and the AUROC of the distance for these.

    The strict one calls every lost query example a hurt, so that where nobody can do better than chance (shuffled
    labels) it is a toss of a coin, which no distance foretells. The other one asks what the verdict's advice turns on:
    is there any gain that 75 query examples can show?
    """
    scores = np.array([row["distance"] for row in rows])
    adapted = np.array([row["adapted"] for row in rows])
    found = {}
    for name, names in {"without meta-learning": WITHOUT, "with transfer": list(BASELINES)}.items():
        best = np.array([max(row[other] for other in names) for row in rows])
        error = np.sqrt((adapted * (1 - adapted) + best * (1 - best)) / (WAYS * QUERIES))
        hurts = {
            "below": adapted < best,
            f"not above by {Z95_ONE_SIDED} standard errors": ~(adapted - best > Z95_ONE_SIDED * error),
        }
        for definition, positive in hurts.items():
            found[f"{definition} the best {name}"] = (int(positive.sum()), auroc(scores, positive))
    return found


def table(rows: list[dict[str, Any]]) -> Table:
    """A row a family, means over its tasks."""
    families = defaultdict(list)
    for row in rows:
        families[row["family"]].append(row)
    shown = ["adapted", *BASELINES]
    found = Table("family", "tasks", "median p", "far", *shown)
    for family, members in families.items():
        found.add_row(
            family,
            str(len(members)),
            f"{np.median([row['p_value'] for row in members]):.3f}",
            f"{np.mean([row['p_value'] <= FAR for row in members]):.0%}",
            *(f"{np.mean([row[name] for row in members]):.1%}" for name in shown),
        )
    return found


if __name__ == "__main__":
    main()
