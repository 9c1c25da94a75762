"""Scores of adapted models: means with intervals, per batch-norm policy and inner step."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.table import Table

from metadist.core.calibration import Calibration

Score = dict[str, float]
"""`{"mean": .., "ci95": ..}`."""

NO_BATCH_NORM = "none"
"""Stands for the policy of a model that has no batch norm."""


def mean_and_interval(values: np.ndarray) -> Score:
    """Mean over episodes and the half width of its 95 % interval, 1.96 sigma / sqrt(n) as in the papers.

    Sigma is the sample's standard deviation (n - 1); one episode has no interval (NaN).
    """
    exact = values.astype(np.float64)
    with np.errstate(invalid="ignore"):  # A diverged model's losses: their mean says it, NaN or infinite.
        spread = float(exact.std(ddof=1)) if len(exact) > 1 else math.nan
    return {"mean": float(exact.mean()), "ci95": 1.96 * spread / math.sqrt(len(exact))}


@dataclass(frozen=True)
class PolicyScores:
    """Scores under one batch-norm policy, per inner step from 0."""

    batch_norm: str
    loss: list[Score]
    accuracy: list[Score]
    calibration: list[Calibration] | None
    """None in regression."""
    episode_loss: np.ndarray = field(repr=False, compare=False)
    """`[episodes, inner steps + 1]`, in the order of the episodes' keys; likewise the accuracy (NaN in regression)."""
    episode_accuracy: np.ndarray = field(repr=False, compare=False)

    @property
    def condition(self) -> str:
        """What a column's header adds: ` (batch norm: support)`, nothing for a model without batch norm."""
        return "" if self.batch_norm == NO_BATCH_NORM else f" (batch norm: {self.batch_norm})"

    @classmethod
    def of(cls, batch_norm: str, loss: np.ndarray, accuracy: np.ndarray, bins: np.ndarray) -> "PolicyScores":
        """From one policy's part of EpisodeScores."""
        steps = range(loss.shape[1])
        return cls(
            batch_norm,
            [mean_and_interval(loss[:, number]) for number in steps],
            [mean_and_interval(accuracy[:, number]) for number in steps],
            [Calibration.of(bins[:, number]) for number in steps] if bins.shape[-1] else None,
            loss,
            accuracy,
        )


@dataclass(frozen=True)
class Evaluation:
    """Scores of adapted models over a fixed list of episodes; the first policy is the run's own."""

    split: str
    episodes: int
    seed: int
    step: int
    """Outer steps that the evaluated theta has behind it."""
    policies: list[PolicyScores]

    @property
    def inner_steps(self) -> int:
        return len(self.policies[0].loss) - 1

    @property
    def is_classification(self) -> bool:
        return not math.isnan(self.policies[0].accuracy[0]["mean"])

    @property
    def scores(self) -> tuple[str, ...]:
        return ("loss", "accuracy") if self.is_classification else ("loss",)

    def means(self) -> dict[str, float]:
        """Mean loss and accuracy (NaN in regression) after the last inner step, under the run's own policy."""
        own = self.policies[0]
        return {"loss": own.loss[-1]["mean"], "accuracy": own.accuracy[-1]["mean"]}

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as evaluation.json and `metadist evaluate --json` have them. NaN is null."""
        own = self.policies[0]
        result = {
            "split": self.split,
            "episodes": self.episodes,
            "seed": self.seed,
            "step": self.step,
            "batch_norm": own.batch_norm,
            "inner_steps": self.inner_steps,
            "accuracy": own.accuracy[-1] if self.is_classification else None,
            "loss": own.loss[-1],
            "ece": own.calibration[-1].ece if own.calibration else None,
            "policies": [
                {
                    "batch_norm": policy.batch_norm,
                    "per_inner_step": [
                        {
                            "inner_step": number,
                            "loss": policy.loss[number],
                            "accuracy": policy.accuracy[number] if self.is_classification else None,
                            "ece": policy.calibration[number].ece if policy.calibration else None,
                        }
                        for number in range(self.inner_steps + 1)
                    ],
                    "calibration": policy.calibration[-1].as_dict() if policy.calibration else None,
                }
                for policy in self.policies
            ],
        }
        plain: dict[str, Any] = nan_to_none(result)
        return plain

    def table(self) -> Table:
        """One row an inner step (0, 1, 5, 10, .. and the last), one column a policy and score."""
        title = f"{self.episodes} {self.split} episodes, theta of step {self.step}; mean and 95 % interval"
        table = Table(title=title, title_justify="left")
        table.add_column("inner\nsteps", justify="right")
        shown = [
            n
            for n in range(self.inner_steps + 1)
            if n <= 1 or n % 5 == 0 or n == self.inner_steps or n <= 3 >= self.inner_steps
        ]
        columns: list[list[str]] = []
        for policy in self.policies:
            for score in self.scores:
                columns.append([written(getattr(policy, score)[number], score) for number in shown])
                add_column(table, HEADERS[score] + policy.condition, columns[-1])
        for number, *cells in zip(shown, *columns, strict=True):
            table.add_row(str(number), *cells)
        errors = [
            f"{100 * policy.calibration[-1].ece:.2f} %"
            + ("" if policy.batch_norm == NO_BATCH_NORM else f" ({policy.batch_norm})")
            for policy in self.policies
            if policy.calibration
        ]
        if errors:
            steps = f"{self.inner_steps} inner step{'' if self.inner_steps == 1 else 's'}"
            table.caption = f"expected calibration error after {steps}: {', '.join(errors)}"
            table.caption_justify = "left"
        return table


HEADERS = {"loss": "query loss", "accuracy": "accuracy, %"}
"""What the columns of `written` scores are called."""


def written(score: Score, name: str, sign: str = "") -> str:
    """A loss, or an accuracy in per cent, with its interval, as tables show it; `sign` is "+" for differences."""
    scale, digits = (1, 4) if name == "loss" else (100, 2)
    return f"{scale * score['mean']:{sign}.{digits}f} ± {scale * score['ci95']:.{digits}f}"


def add_column(table: Table, header: str, cells: list[str]) -> None:
    """A column of numbers that a narrow terminal wraps in its header alone."""
    table.add_column(header, justify="right", min_width=max(map(len, cells)))


def nan_to_none(value: Any) -> Any:
    """Plain values as JSON can say them."""
    if isinstance(value, dict):
        return {key: nan_to_none(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [nan_to_none(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
