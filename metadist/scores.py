"""Scores of adapted models: means with intervals, per batch-norm policy and inner step."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table

Score = dict[str, float]
"""`{"mean": .., "ci95": ..}`."""


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
            "policies": [
                {
                    "batch_norm": policy.batch_norm,
                    "per_inner_step": [
                        {"inner_step": number, "loss": loss, "accuracy": accuracy if self.is_classification else None}
                        for number, (loss, accuracy) in enumerate(zip(policy.loss, policy.accuracy, strict=True))
                    ],
                }
                for policy in self.policies
            ],
        }
        plain: dict[str, Any] = _nan_to_none(result)
        return plain

    def table(self) -> Table:
        """One row an inner step (0, 1, 5, 10, .. and the last), one column a policy and score."""
        title = f"{self.episodes} {self.split} episodes, theta of step {self.step}; mean and 95 % interval"
        table = Table(title=title, title_justify="left")
        table.add_column("inner steps", justify="right")
        for policy in self.policies:
            under = "" if policy.batch_norm == NO_BATCH_NORM else f" (batch norm: {policy.batch_norm})"
            table.add_column(f"query loss{under}", justify="right")
            if self.is_classification:
                table.add_column(f"accuracy{under}", justify="right")
        shown = [
            n
            for n in range(self.inner_steps + 1)
            if n <= 1 or n % 5 == 0 or n == self.inner_steps or n <= 3 >= self.inner_steps
        ]
        for number in shown:
            cells = [str(number)]
            for policy in self.policies:
                loss, accuracy = policy.loss[number], policy.accuracy[number]
                cells.append(f"{loss['mean']:.4f} ± {loss['ci95']:.4f}")
                if self.is_classification:
                    cells.append(f"{100 * accuracy['mean']:.2f} ± {100 * accuracy['ci95']:.2f} %")
            table.add_row(*cells)
        return table


NO_BATCH_NORM = "none"
"""Stands for the policy of a model that has no batch norm."""


def _nan_to_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _nan_to_none(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_nan_to_none(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
