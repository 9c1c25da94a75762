"""Every algorithm at one same budget of outer steps, beside its paper's figure: `python -m benchmarks.accuracy`.

Each run is `metadist train` on the algorithm's own config with other `training.steps`, in a process of its own with
one thread; as many run side by side as `--parallel` says. All are evaluated on the same test episodes. Of a finished
run a record is kept in `benchmarks/accuracy/`, and what has one is not made again.
"""

import dataclasses
import hashlib
import json
import math
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from metadist import load_config
from metadist.config import Config
from metadist.distributed.learner import LearnerState
from metadist.evaluation import asked_of, experiment_to_score, load_state, score_state
from metadist.run_directory import RunDirectory
from metadist.scores import PolicyScores
from metadist.sections import EvaluationSettings
from metadist.training import VALIDATION_SEED

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Case:
    """One row: a config, what is changed in it, and what its paper reports after its own, larger budget."""

    config: str
    paper: str
    changes: tuple[str, ...] = ()
    evaluation_only: bool = False
    """The algorithm trains nothing: one step is as good as any number."""
    trained_as: str | None = None
    """A config with the same training to the bit, other ways at test alone: its run is evaluated here as well."""


OMNIGLOT_5W1S = {
    "maml": Case("omniglot_5w1s_maml", "98.7 ± 0.4"),
    "fomaml": Case("omniglot_5w1s_fomaml", "98.3 ± 0.5"),
    "reptile": Case("omniglot_5w1s_reptile", "97.68 ± 0.04 (transductive)"),
    "anil": Case("omniglot_5w1s_anil", "none for 5 ways"),
    "boil": Case("omniglot_5w1s_boil", "none"),
    "meta_sgd": Case("omniglot_5w1s_meta_sgd", "99.53 ± 0.26"),
    # Its loss weights are annealed over a tenth of training, as in the authors' files.
    "maml_plus_plus": Case(
        "omniglot_5w1s_maml_plus_plus", "99.47", ("algorithm.multi_step_loss_steps={a_tenth_of_the_steps}",)
    ),
    "cavia": Case("omniglot_5w1s_cavia", "none"),
    "imaml": Case("omniglot_5w1s_imaml", "99.16 ± 0.35"),
    "meta_curvature": Case("omniglot_5w1s_meta_curvature", "99.97 (MC2+, with MAML++)"),
    "proto_net": Case("omniglot_5w1s_proto_net", "98.8"),
    "matching_net": Case("omniglot_5w1s_matching_net", "98.1 (to be verified)"),
    "r2d2": Case("omniglot_5w1s_r2d2", "98.91 (to be verified)"),
    "transfer": Case("omniglot_5w1s_transfer", "none"),
    "nearest_centroid": Case("omniglot_5w1s_nearest_centroid", "none"),
    "scratch": Case("omniglot_5w1s_scratch", "none", evaluation_only=True),
}
OMNIGLOT_20W1S = {
    "maml": Case("omniglot_20w1s_maml", "95.8 ± 0.3"),
    "anil": Case("omniglot_20w1s_anil", "96.2 ± 0.5"),
    "proto_net": Case("omniglot_20w1s_proto_net", "96.0", trained_as="omniglot_5w1s_proto_net"),
    "r2d2": Case("omniglot_20w1s_r2d2", "96.24 (to be verified)", trained_as="omniglot_5w1s_r2d2"),
}
TINY_IMAGENET = {
    f"{name}, {shots} shot{'s' * (shots > 1)}": Case(f"tiny_imagenet_5w{shots}s_{name}", "none for this data set")
    for shots in (1, 5)
    for name in ("maml", "proto_net", "r2d2", "transfer")
}
SUITES = {"omniglot_5w1s": OMNIGLOT_5W1S, "omniglot_20w1s": OMNIGLOT_20W1S, "tiny_imagenet": TINY_IMAGENET}


def config_of(case: Case) -> Path:
    return ROOT / "configs" / f"{case.config}.yaml"


def record_of(case: Case, steps: int, seed: int, kept: Path) -> Path:
    return kept / f"{case.config}_{1 if case.evaluation_only else steps}_steps_seed_{seed}.json"


def run(case: Case, steps: int, seed: int, episodes: int, kept: Path, runs: Path) -> None:
    """Trains and evaluates one case, unless its record is kept already."""
    steps = 1 if case.evaluation_only else steps
    record = record_of(case, steps, seed, kept)
    settings = [f"training.steps={steps}", f"training.seed={seed}", f"evaluation.episodes={episodes}"]
    settings += [f"evaluation.every={max(1, steps // 2)}", "evaluation.val_episodes=200", *case.changes]
    settings = [setting.format(a_tenth_of_the_steps=max(1, steps // 10)) for setting in settings]
    if record.exists():
        made_with = json.loads(record.read_text())["settings"]
        if made_with != settings:
            raise click.ClickException(f"{record} was made with {made_with}, not with {settings}: move it away.")
        return
    began = time.perf_counter()
    if case.trained_as is None:
        found = trained(case.config, settings, runs / record.stem)
    else:
        run_dir = runs / record.stem.replace(case.config, case.trained_as)
        if not (run_dir / "evaluation.json").exists():
            trained(case.trained_as, settings, run_dir)
        found = evaluated(case.config, case.trained_as, settings, run_dir)
    values = {"config": case.config, "settings": settings, **found}
    record.write_text(json.dumps(values | {"minutes": round((time.perf_counter() - began) / 60, 1)}, indent=1) + "\n")


def trained(config: str, settings: list[str], run_dir: Path) -> dict[str, Any]:
    """What a record says of a training and its evaluation, which it makes in a process of their own."""
    place = ROOT / "configs" / f"{config}.yaml"
    command = [sys.executable, "-m", "metadist", "train", str(place), "--workers", "0", "--json"]
    half_way = load_config(place, settings).evaluation.every
    changes = [*settings, f"run.checkpoint_config.checkpoint_frequency={half_way}"]
    command += ["--run-dir", str(run_dir), *(part for change in changes for part in ("--set", change))]
    with run_dir.with_suffix(".log").open("w") as log:
        finished = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT, check=False)
    if finished.returncode:
        raise click.ClickException(f"{' '.join(command)} ended with status {finished.returncode}: see {log.name}")
    result = json.loads(finished.stdout)
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {
        "steps": result["step"],
        "tasks": result["step"] * load_config(place, settings).training.meta_batch_size,
        "batch_norm": result["evaluation"]["batch_norm"],
        "accuracy": result["evaluation"]["accuracy"],
        "validation": [(line["step"], line["val_accuracy"]) for line in lines if "val_accuracy" in line],
        "theta_sha256": result["theta_sha256"],
    }


def train_alike(config: Config, other: Config) -> bool:
    """Whether two configs of few-shot tasks train the same theta, and differ in the ways of test episodes alone."""
    task, others = config.task, other.task
    if task.train_ways is None or others.train_ways is None:
        return False
    return dataclasses.replace(config, task=dataclasses.replace(task, ways=others.ways), run=other.run) == other


def evaluated(config: str, trained_as: str, settings: list[str], run_dir: Path) -> dict[str, Any]:
    """The same of a run that was trained with another config, whose ways at test alone are others."""
    asked, own = (load_config(ROOT / "configs" / f"{name}.yaml", settings) for name in (config, trained_as))
    if not train_alike(asked, own):
        raise click.ClickException(f"{config} and {trained_as} differ in more than ways at test: train each.")
    asked, console = asked_of(asked, None, None, None, 0, None), Console(stderr=True)
    steps = asked.training.steps

    def accuracy(evaluation: EvaluationSettings, step: int) -> tuple[LearnerState, PolicyScores]:
        changed = dataclasses.replace(asked, evaluation=evaluation)
        experiment = experiment_to_score(changed)
        state = load_state(RunDirectory(str(run_dir)), experiment, step, console)
        return state, score_state(changed, experiment, state, console, own_policy_alone=True).policies[0]

    validation = dataclasses.replace(
        asked.evaluation, split="val", seed=VALIDATION_SEED, episodes=asked.evaluation.val_episodes
    )
    state, scores = accuracy(asked.evaluation, steps)
    return {
        "steps": steps,
        "tasks": steps * asked.training.meta_batch_size,
        "batch_norm": scores.batch_norm,
        "accuracy": scores.accuracy[-1],
        "validation": [
            (step, accuracy(validation, step)[1].accuracy[-1]["mean"]) for step in (asked.evaluation.every, steps)
        ],
        "theta_sha256": hashlib.sha256(state.theta.tobytes()).hexdigest(),
        "trained_as": trained_as,
    }


def accuracies(results: list[dict[str, Any]]) -> tuple[list[float], float, float]:
    """Accuracy of each seed, their mean, and its 95 % interval over episodes alone (not over seeds), in percent."""
    scores = [result["accuracy"] for result in results]
    means = [100 * score["mean"] for score in scores]
    half = 100 * math.sqrt(sum(score["ci95"] ** 2 for score in scores)) / len(scores)
    return means, sum(means) / len(means), half


@click.command()
@click.option("--suite", "suites", multiple=True, type=click.Choice(list(SUITES)), default=["omniglot_5w1s"])
@click.option("--algorithm", "names", multiple=True, help="Rows to make; left out, all.")
@click.option("--steps", default=1000, show_default=True, help="Outer steps of every run.")
@click.option("--seed", "seeds", multiple=True, type=int, default=[0, 1], show_default=True)
@click.option("--episodes", default=600, show_default=True)
@click.option("--parallel", default=2, show_default=True, help="Runs side by side, one thread each.")
@click.option("--kept", default="benchmarks/accuracy", show_default=True, help="Records of finished runs.")
@click.option("--runs", default="benchmarks/results/accuracy", show_default=True, help="Their run directories.")
@click.option("--make/--no-make", default=True, show_default=True, help="Whether runs that are missing are made.")
def main(
    suites: tuple[str, ...],
    names: tuple[str, ...],
    steps: int,
    seeds: tuple[int, ...],
    episodes: int,
    parallel: int,
    kept: str,
    runs: str,
    make: bool,
) -> None:
    """Trains every algorithm of the suites, where no record of it is kept yet, and prints one table each."""
    console, records, places = Console(), Path(kept).absolute(), Path(runs).absolute()
    for place in (records, places):
        place.mkdir(parents=True, exist_ok=True)
    for suite in suites:
        cases = {name: case for name, case in SUITES[suite].items() if not names or name in names}
        if make:
            with ThreadPoolExecutor(parallel) as pool:
                made = [
                    pool.submit(run, case, steps, seed, episodes, records, places)
                    for case in cases.values()
                    for seed in seeds
                ]
            for each in made:
                each.result()
        console.print(table_of(f"{suite}: {steps:,} steps, {episodes} test episodes", cases, steps, seeds, records))
        console.print("* Validation accuracy half-way and at the end (200 episodes, first seed): does it still climb?")


def table_of(title: str, cases: dict[str, Case], steps: int, seeds: tuple[int, ...], kept: Path) -> Table:
    """A row for each case of which at least one seed's record is kept."""
    table = Table(title=title, title_justify="left")
    for column in ("algorithm", "tasks", "half-way, end*", "batch norm", "each seed", "accuracy %", "paper"):
        table.add_column(column, justify="left" if column in ("algorithm", "batch norm") else "right")
    for name, case in cases.items():
        files = [record_of(case, steps, seed, kept) for seed in seeds]
        found = [json.loads(file.read_text()) for file in files if file.exists()]
        if not found:
            continue
        means, mean, half = accuracies(found)
        table.add_row(
            name,
            f"{found[0]['tasks']:,}",
            ", ".join(f"{100 * accuracy:.1f}" for _, accuracy in found[0]["validation"]),
            found[0]["batch_norm"],
            ", ".join(f"{m:.2f}" for m in means),
            f"{mean:.2f} ± {half:.2f}",
            case.paper,
        )
    return table


if __name__ == "__main__":
    main()
