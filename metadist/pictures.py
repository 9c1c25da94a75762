"""Pictures of a run: accuracy or loss per inner step, adapted curves, training curves."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from metadist.config import Config
from metadist.core.calibration import BINS
from metadist.core.episode import Examples
from metadist.core.keys import TaskKey
from metadist.distributed.learner import LearnerState
from metadist.distributed.seconds import Seconds
from metadist.experiment import Experiment, open_task
from metadist.files import replacing
from metadist.paired import Comparison
from metadist.scores import NO_BATCH_NORM, Evaluation
from metadist.timeline import read_timeline
from metadist.tracking import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY, BLACK = "#2a6fb0", "#d9731a", "#9a9a9a", "#222222"
PHASES = ("#8fbf8f", BLUE, "#b08fc7", "#e0b040", "#d8d8d8")
"""Sampling, adapting, reducing, stepping, waiting."""
CURVE_POINTS = 300
CURVE_AVERAGES = 50
"""Points of a training curve, each the mean of the steps around it."""


def draw_evaluation(
    evaluation: Evaluation, directory: Path, config: Config, experiment: Experiment, state: LearnerState
) -> list[Path]:
    """Draws what fits the task into `directory`; gives the files."""
    files = [_save(_scores_per_step(evaluation), directory / "evaluation.png")]
    if evaluation.is_classification:
        files.append(_save(_reliability(evaluation), directory / "reliability.png"))
    curves = adapted_curves(config, experiment, state)
    if curves is not None:
        files.append(_save(curves, directory / "adapted_curves.png"))
    return files


def draw_training(directory: Path) -> Path | None:
    """Draws training and validation scores against steps from metrics.jsonl; None where there are no lines."""
    lines = read_metrics(directory)
    trained = [line for line in lines if "loss" in line]
    if not trained:
        return None
    name = "loss" if trained[0]["accuracy"] is None else "accuracy"
    scale = 1 if name == "loss" else 100
    steps = np.array([line["step"] for line in trained])
    values = scale * np.array([line[name] for line in trained])
    figure, axes = _figure(1)
    axis = axes[0]
    width = max(1, len(values) // CURVE_AVERAGES)
    whole = len(values) // width * width
    axis.plot(steps, values, color=GREY, linewidth=0.5, alpha=0.4)
    means = values[:whole].reshape(-1, width).mean(1)
    axis.plot(steps[width - 1 : whole : width], means, color=BLUE, label="training tasks")
    validated = [line for line in lines if line.get(f"val_{name}") is not None]
    if validated:
        scores = [scale * line[f"val_{name}"] for line in validated]
        axis.plot(
            [line["step"] for line in validated], scores, "o-", color=ORANGE, markersize=4, label="validation tasks"
        )
    if name == "accuracy":
        axis.set_ylim(max(0, np.percentile(means, 10) - 10), 100)
    axis.set_xlabel("step")
    axis.set_ylabel(f"query {name}{', %' if name == 'accuracy' else ''}")
    axis.legend(frameon=False)
    return _save(figure, directory / "training.png")


def draw_timeline(directory: Path) -> Path | None:
    """Draws where the time of a step goes from timeline.jsonl; None where there are no lines."""
    lines = read_timeline(directory)
    if not lines:
        return None
    phases = [*Seconds._fields, "waiting"]
    steps = [line["step"] for line in lines]
    figure, axes = _figure(1)
    parts = [[1000 * line[phase] for line in lines] for phase in phases]
    # One line alone has no area: a bar then.
    if len(lines) == 1:
        axes[0].bar(phases, [part[0] for part in parts], color=PHASES)
    else:
        axes[0].stackplot(steps, parts, labels=phases, colors=PHASES, linewidth=0)
        axes[0].set_xlabel("step")
        axes[0].legend(frameon=False, loc="upper center", ncol=2)
        # The first steps warm up, and a stall here and there would press the rest flat.
        axes[0].set_ylim(0, 1.8 * 1000 * float(np.median([line["wall"] for line in lines])))
        axes[0].set_xlim(steps[0], steps[-1])
    axes[0].set_ylabel("a step, ms")
    return _save(figure, directory / "timeline.png")


def picture_of(evaluation: Evaluation, directory: Path) -> Path:
    """The picture that tells most about a run: its adapted curves where it has some."""
    curves = directory / "adapted_curves.png"
    return curves if curves.exists() else directory / "evaluation.png"


def _scores_per_step(evaluation: Evaluation) -> "Figure":
    from matplotlib.ticker import MaxNLocator

    figure, axes = _figure(1)
    axis = axes[0]
    steps = range(evaluation.inner_steps + 1)
    for place, (policy, colour) in enumerate(zip(evaluation.policies, (BLUE, ORANGE), strict=False)):
        scores = policy.accuracy if evaluation.is_classification else policy.loss
        scale = 100 if evaluation.is_classification else 1
        mean = np.array([scale * score["mean"] for score in scores])
        half = np.array([scale * score["ci95"] for score in scores])
        if evaluation.inner_steps == 0:
            # A band has no width over a single step: the policies stand beside each other instead.
            axis.errorbar([place], mean, half, fmt="o", color=colour, markersize=4, capsize=3)
            continue
        label = f"batch norm: {policy.batch_norm}"
        axis.plot(steps, mean, "o-", color=colour, label=label, markersize=4)
        axis.fill_between(steps, mean - half, mean + half, color=colour, alpha=0.2, linewidth=0)
    axis.set_ylabel("query accuracy, %" if evaluation.is_classification else "query loss")
    axis.set_title(f"{evaluation.episodes} {evaluation.split} episodes, 95 % intervals", loc="left")
    if evaluation.inner_steps == 0:
        axis.set_xlim(-0.5, len(evaluation.policies) - 0.5)
        axis.set_xticks(range(len(evaluation.policies)), [policy.batch_norm for policy in evaluation.policies])
        axis.set_xlabel("batch norm")
        return figure
    axis.set_xlabel("inner steps")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(evaluation.policies) > 1:
        axis.legend(frameon=False)
    return figure


def draw_against_shots(evaluations: dict[int, Evaluation], directory: Path) -> Path:
    """Draws the score after the last inner step against the number of shots."""
    from matplotlib.ticker import FixedLocator, NullLocator

    first = next(iter(evaluations.values()))
    name = first.scores[-1]
    scale = 100 if name == "accuracy" else 1
    figure, (axis,) = _figure(1)
    shots = list(evaluations)
    for place, (policy, colour) in enumerate(zip(first.policies, (BLUE, ORANGE), strict=False)):
        scores = [getattr(evaluation.policies[place], name)[-1] for evaluation in evaluations.values()]
        mean, half = (np.array([scale * score[part] for score in scores]) for part in ("mean", "ci95"))
        label = f"batch norm: {policy.batch_norm}"
        beside = np.array(shots) * 1.02**place
        axis.errorbar(beside, mean, half, fmt="o-", color=colour, label=label, markersize=4, capsize=3)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(FixedLocator(shots))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xticklabels([str(number) for number in shots])
    axis.set_xlabel("shots")
    axis.set_ylabel("query accuracy, %" if name == "accuracy" else "query loss")
    axis.set_title(f"{first.episodes} {first.split} episodes, 95 % intervals", loc="left")
    if len(first.policies) > 1:
        axis.legend(frameon=False)
    return _save(figure, picture_against_shots(name, directory))


def draw_comparison(comparison: Comparison, path: Path) -> Path:
    """Draws each run's score with its interval, and beside it the paired difference to the first."""
    runs, is_accuracy = comparison.runs, comparison.score == "accuracy"
    scale, unit = (100, "accuracy, %") if is_accuracy else (1, "query loss")
    figure = _canvas(9.0, 1.4 + 0.4 * len(runs))
    left, right = figure.subplots(1, 2, sharey=True)
    _make_plain([left, right])
    for row, run in enumerate(runs):
        score, difference = comparison.score_of(run), comparison.difference(run)
        for axis, shown, colour in (
            (left, score, BLUE),
            (right, difference, ORANGE if comparison.excludes_zero(run) else GREY),
        ):
            if axis is left or row:
                axis.errorbar(scale * shown["mean"], row, xerr=scale * shown["ci95"], fmt="o", color=colour, capsize=3)
    right.axvline(0, color=BLACK, linewidth=0.8)
    left.set_yticks(range(len(runs)), [run.name for run in runs])
    left.set_ylim(len(runs) - 0.5, -0.5)
    first = runs[0].evaluation
    left.set_title(f"{first.episodes} {first.split} episodes, 95 % intervals", loc="left", fontsize=10)
    left.set_xlabel(unit)
    right.set_title("paired; orange: the interval excludes 0", loc="left", fontsize=10)
    right.set_xlabel(f"difference to {runs[0].name}{', percentage points' if is_accuracy else ''}")
    return _save(figure, path)


def picture_against_shots(score: str, directory: Path) -> Path:
    """Where that picture lies."""
    return directory / f"{score}_against_shots.png"


def _reliability(evaluation: Evaluation) -> "Figure":
    """Accuracy by confidence after the last inner step, the gap to the diagonal, and how many predictions there are."""
    panels = len(evaluation.policies)
    figure = _canvas(4.6 * panels + 0.6, 4.8)
    upper, lower = figure.subplots(2, panels, sharex=True, sharey="row", squeeze=False, height_ratios=(3, 1))
    _make_plain([*upper, *lower])
    for policy, above, below in zip(evaluation.policies, upper, lower, strict=True):
        assert policy.calibration is not None
        calibration = policy.calibration[-1]
        counts = np.array(calibration.counts)
        some = counts > 0
        number, width = counts[some], 1 / BINS
        centre = (np.arange(BINS) + 0.5)[some] * width
        confidence, accuracy = (np.array(sums)[some] / number for sums in (calibration.confidence, calibration.correct))
        above.plot([0, 1], [0, 1], "--", color=BLACK, linewidth=1, zorder=3, label="perfect calibration")
        above.bar(centre, accuracy, width, color=BLUE, edgecolor="white", linewidth=0.5, label="accuracy")
        gap = confidence - accuracy
        style = {"facecolor": "none", "edgecolor": ORANGE, "hatch": "////", "linewidth": 0.8}
        above.bar(centre, gap, width, bottom=accuracy, label="gap to the mean confidence", **style)
        above.set_ylim(0, 1)
        under = "" if policy.batch_norm == NO_BATCH_NORM else f"batch norm: {policy.batch_norm}, "
        above.set_title(f"{under}ECE {100 * calibration.ece:.2f} %", loc="left")
        below.bar(centre, number, width, color=GREY, edgecolor="white", linewidth=0.5)
        for x, count in zip(centre, number, strict=True):
            below.annotate(f"{count}", (x, count), (0, 2), textcoords="offset points", ha="center", fontsize=6)
        below.margins(y=0.2)
        below.set_xlim(0, 1)
        below.set_xlabel("confidence")
    upper[0].set_ylabel("accuracy")
    lower[0].set_ylabel("predictions")
    upper[0].legend(frameon=False, loc="upper left", fontsize=8)
    return figure


def adapted_curves(config: Config, experiment: Experiment, state: LearnerState) -> "Figure | None":
    """Four test tasks of a one-dimensional regression: the function, the support set, the model as it adapts.

    None where the task is of another kind, or its number of query points cannot be chosen.
    """
    spec = experiment.source.spec
    if spec.kind != "regression" or spec.input_shape != (1,) or spec.output_size != 1:
        return None
    if not dataclasses.is_dataclass(config.task) or not hasattr(config.task, "queries"):
        return None
    source = open_task(dataclasses.replace(config.task, queries=CURVE_POINTS))  # type: ignore[type-var]
    keys = [TaskKey(config.evaluation.seed, config.evaluation.split, 0, task) for task in range(4)]
    batch = source.sample(keys)
    network = experiment.network.bind(torch.tensor(state.statistics), training=False)
    meta = experiment.theta.unflatten(torch.tensor(state.theta))
    last = config.inner_steps_at_test
    figure, axes = _figure(len(keys))
    for number, axis in enumerate(axes):
        support = Examples(batch.support.x[number], batch.support.y[number])
        x, order = torch.sort(batch.query.x[number], dim=0)
        y = batch.query.y[number][order[:, 0]]
        with torch.no_grad():
            path = experiment.algorithm.adapt(network, meta, support, last)
            outputs = [
                experiment.algorithm.predict(network.at(number), phi, support, x) for number, phi in enumerate(path)
            ]
        axis.plot(x[:, 0], y[:, 0], color=BLACK, linewidth=1.2, label="the task's function")
        _draw_steps(axis, x, outputs, last)
        axis.plot(support.x[:, 0], support.y[:, 0], "^", color=BLACK, markersize=6, label="support set")
        axis.set_title(f"{config.evaluation.split} task {number + 1}", loc="left")
        axis.set_xlabel("x")
    axes[0].set_ylabel("y")
    axes[-1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _draw_steps(axis: "Axes", x: torch.Tensor, outputs: list[torch.Tensor], last: int) -> None:
    shown = sorted({0, min(1, last), last})
    for step, colour, style in zip(shown, (GREY, ORANGE, BLUE), (":", "--", "-"), strict=False):
        label = "before adapting" if step == 0 else f"after {step} step{'s' if step > 1 else ''}"
        axis.plot(x[:, 0], outputs[step][:, 0], style, color=colour, label=label)


def _figure(panels: int) -> "tuple[Figure, list[Axes]]":
    figure = _canvas(5.5 if panels == 1 else 3.2 * panels + 1.5, 3.6)
    axes = list(figure.subplots(1, panels, sharey=True, squeeze=False)[0])
    _make_plain(axes)
    return figure, axes


def _canvas(width: float, height: float) -> "Figure":
    # Without pyplot: no display is needed and no state is kept.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _make_plain(axes: "list[Axes]") -> None:
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.5)
        axis.set_axisbelow(True)


def _save(figure: "Figure", path: Path) -> Path:
    with replacing(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
    return path
