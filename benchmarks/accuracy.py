"""Every algorithm at one same budget of outer steps, beside its paper's figure: `python -m benchmarks.accuracy`.

Each run is `metadist train` on the algorithm's own config with other `training.steps`, in a process of its own with
one thread; as many run side by side as `--parallel` says. All are evaluated on the same test episodes. A run that is
there already is not made again: its directory lies below `--out`.
"""

import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from metadist import load_config

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Case:
    """One row: a config, what is changed in it, and what its paper reports after its own, larger budget."""

    config: str
    paper: str
    changes: tuple[str, ...] = ()
    evaluation_only: bool = False
    """The algorithm trains nothing: one step is as good as any number."""


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
    "proto_net": Case("omniglot_20w1s_proto_net", "96.0"),
    "r2d2": Case("omniglot_20w1s_r2d2", "96.24 (to be verified)"),
}
TINY_IMAGENET = {
    f"{name}, {shots} shot{'s' * (shots > 1)}": Case(f"tiny_imagenet_5w{shots}s_{name}", "none for this data set")
    for shots in (1, 5)
    for name in ("maml", "proto_net", "r2d2", "transfer")
}
SUITES = {"omniglot_5w1s": OMNIGLOT_5W1S, "omniglot_20w1s": OMNIGLOT_20W1S, "tiny_imagenet": TINY_IMAGENET}


def config_of(case: Case) -> Path:
    return ROOT / "configs" / f"{case.config}.yaml"


def run(case: Case, steps: int, seed: int, episodes: int, out: Path) -> dict[str, Any]:
    """Trains and evaluates one case; gives what `metadist train --json` printed, and the validation curve."""
    steps = 1 if case.evaluation_only else steps
    name = f"{case.config}_{steps}_steps_seed_{seed}"
    result = out / f"{name}.json"
    if not result.exists():
        every = max(1, steps // 4)
        settings = [f"training.steps={steps}", f"training.seed={seed}", f"evaluation.episodes={episodes}"]
        settings += [f"evaluation.every={every}", "evaluation.val_episodes=200", *case.changes]
        settings = [setting.format(a_tenth_of_the_steps=max(1, steps // 10)) for setting in settings]
        command = [sys.executable, "-m", "metadist", "train", str(config_of(case)), "--workers", "0", "--json"]
        command += ["--run-dir", str(out / name), *(part for s in settings for part in ("--set", s))]
        with (out / f"{name}.log").open("w") as log:
            finished = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT, check=False)
        if finished.returncode:
            raise click.ClickException(f"{' '.join(command)} ended with status {finished.returncode}: see {log.name}")
        result.write_text(finished.stdout)
    found: dict[str, Any] = json.loads(result.read_text())
    lines = map(json.loads, (out / name / "metrics.jsonl").read_text().splitlines())
    found["curve"] = [(line["step"], line["val_accuracy"]) for line in lines if "val_accuracy" in line]
    return found


def accuracies(results: list[dict[str, Any]]) -> tuple[list[float], float, float]:
    """Accuracy of each seed, their mean, and its 95 % interval over episodes alone (not over seeds), in percent."""
    scores = [result["evaluation"]["accuracy"] for result in results]
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
@click.option("--out", default="benchmarks/results/accuracy", show_default=True)
def main(
    suites: tuple[str, ...],
    names: tuple[str, ...],
    steps: int,
    seeds: tuple[int, ...],
    episodes: int,
    parallel: int,
    out: str,
) -> None:
    """Trains every algorithm of the suites and prints one table each."""
    console, place = Console(), Path(out).absolute()
    place.mkdir(parents=True, exist_ok=True)
    for suite in suites:
        cases = {name: case for name, case in SUITES[suite].items() if not names or name in names}
        with ThreadPoolExecutor(parallel) as pool:
            runs = {
                name: [pool.submit(run, case, steps, seed, episodes, place) for seed in seeds]
                for name, case in cases.items()
            }
            results = {name: [each.result() for each in made] for name, made in runs.items()}
        table = Table(title=f"{suite}: {steps:,} steps, {episodes} test episodes", title_justify="left")
        for column in ("algorithm", "tasks", "half-way*", "batch norm", "each seed", "accuracy %", "paper"):
            table.add_column(column, justify="left" if column in ("algorithm", "batch norm") else "right")
        for name, found in results.items():
            means, mean, half = accuracies(found)
            curve = found[0]["curve"]
            table.add_row(
                name,
                f"{found[0]['step'] * load_config(config_of(cases[name])).training.meta_batch_size:,}",
                " → ".join(f"{100 * accuracy:.1f}" for _, accuracy in curve[1::2]) if len(curve) > 1 else "",
                found[0]["evaluation"]["batch_norm"],
                ", ".join(f"{m:.2f}" for m in means),
                f"{mean:.2f} ± {half:.2f}",
                cases[name].paper,
            )
        console.print(table)
        console.print("* Validation accuracy half-way and at the end (200 episodes, first seed): does it still climb?")
        (place / f"{suite}_{steps}_steps.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
