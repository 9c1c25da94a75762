"""Runs held against each other on the very same episodes: paired differences, a table, plain values."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from metadist.scores import (
    HEADERS,
    NO_BATCH_NORM,
    Evaluation,
    Score,
    add_column,
    mean_and_interval,
    nan_to_none,
    written,
)


@dataclass(frozen=True)
class ComparedRun:
    """A trained model's scores under its own batch-norm policy, after its last inner step."""

    name: str
    run_dir: str
    algorithm: str
    evaluation: Evaluation


@dataclass(frozen=True)
class Comparison:
    """Runs on the same episodes; the others are held against the first."""

    runs: list[ComparedRun]

    @property
    def score(self) -> str:
        """ "accuracy", or "loss" in regression."""
        return self.runs[0].evaluation.scores[-1]

    def score_of(self, run: ComparedRun) -> Score:
        score: Score = getattr(run.evaluation.policies[0], self.score)[-1]
        return score

    def difference(self, run: ComparedRun) -> Score:
        """Mean and interval of the differences to the first run, episode by episode."""
        mine, first = (
            getattr(each.evaluation.policies[0], f"episode_{self.score}")[:, -1].astype(np.float64)
            for each in (run, self.runs[0])
        )
        return mean_and_interval(mine - first)

    def excludes_zero(self, run: ComparedRun) -> bool:
        difference = self.difference(run)
        return abs(difference["mean"]) > difference["ci95"]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as `metadist compare --json` prints them. NaN is null; the first has no difference."""
        first = self.runs[0].evaluation
        rows = []
        for number, run in enumerate(self.runs):
            plain = run.evaluation.as_dict()
            rows.append(
                {"name": run.name, "run_dir": run.run_dir, "algorithm": run.algorithm}
                | {key: plain[key] for key in ("batch_norm", "step", "inner_steps", "accuracy", "loss", "ece")}
                | {
                    "difference": self.difference(run) | {"interval_excludes_0": self.excludes_zero(run)}
                    if number
                    else None
                }
            )
        result = {"split": first.split, "episodes": first.episodes, "seed": first.seed, "score": self.score}
        together: dict[str, Any] = nan_to_none(result | {"runs": rows})
        return together

    def table(self) -> Table:
        """One row a run, with what the mark means below."""
        first, others = self.runs[0].evaluation, self.runs[1:]
        title = f"the same {first.episodes} {first.split} episodes for all; mean and 95 % interval"
        # Without vertical lines all of it has room in 80 columns, long names folded.
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
        table.caption, table.caption_justify = self._notes(), "left"
        columns: list[list[str | Text]] = []

        def text_column(header: str, cells: Sequence[str | Text], **style: Any) -> None:
            table.add_column(header, **style)
            columns.append(list(cells))

        def number_column(header: str, cells: list[str]) -> None:
            add_column(table, header, cells)
            columns.append(list(cells))

        text_column("run", [Text(run.name, overflow="fold") for run in self.runs])
        text_column("algorithm", [run.algorithm for run in self.runs])
        policies = [run.evaluation.policies[0].batch_norm for run in self.runs]
        if set(policies) != {NO_BATCH_NORM}:
            text_column("batch norm", policies)
        text_column("steps", [f"{run.evaluation.step:,}" for run in self.runs], justify="right")
        number_column(HEADERS[self.score], [written(self.score_of(run), self.score) for run in self.runs])
        if others:
            number_column("difference", ["", *map(self._written_difference, others)])
        for row in zip(*columns, strict=True):
            table.add_row(*row)
        return table

    def _written_difference(self, run: ComparedRun) -> str:
        return written(self.difference(run), self.score, "+") + (" *" if self.excludes_zero(run) else "  ")

    def _notes(self) -> str:
        notes = []
        others = self.runs[1:]
        if others:
            notes.append("Differences are to the first, paired episode by episode; * their interval excludes 0.")
            notes.append("* says that these trained models differ on such episodes; other seeds were not trained.")
        if len(others) > 1:
            notes.append(f"{len(others)} intervals, each by itself: not corrected for looking at several.")
        policies = {run.evaluation.policies[0].batch_norm for run in self.runs}
        if len(policies) > 1 and "transductive" in policies:
            notes.append(
                "Under transductive batch norm an episode's query examples are seen together; otherwise each alone."
            )
        return "\n".join(notes)
