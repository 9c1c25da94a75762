"""`metadist report`: one page about one run."""

from dataclasses import dataclass
from typing import Any

from rich.console import Console

from metadist.config import Config
from metadist.reporting.advice import Advice, advise
from metadist.reporting.findings import Findings, find
from metadist.reporting.page import render
from metadist.run_directory import RunDirectory
from metadist.scores import nan_to_none

REPORT_FILE = "report.html"
EPISODES = 100


@dataclass(frozen=True)
class Report:
    """Where the page lies, and the numbers and sentences on it."""

    path: str
    findings: Findings
    advice: list[Advice]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as `metadist report --json` prints them."""
        f, a = self.findings, self.findings.adaptation
        result = {
            "report": self.path,
            "run_dir": f.record.location,
            "step": f.step,
            "episodes": len(a.episodes) if a else 0,
            "layers": [{"layer": m.layer.name, "change": m.change, "cka": m.cka} for m in a.movements] if a else [],
            "hardest": [a.episodes[n].key.task for n in a.by_difficulty[:3]] if a else [],
            "mean_cosine": f.alignment.mean_cosine if f.alignment else None,
            "noise_scale": f.alignment.noise_scale if f.alignment else None,
            "advice": [{"rule": each.rule, "text": each.text} for each in self.advice],
            "notes": f.notes,
        }
        plain: dict[str, Any] = nan_to_none(result)
        return plain


def report(
    run_dir: str,
    *,
    episodes: int = EPISODES,
    step: int | None = None,
    config: Config | None = None,
    console: Console | None = None,
) -> Report:
    """Writes `report.html` into a run directory: one page that needs nothing else, from its record and a checkpoint.

    It adapts to the first `episodes` episodes of the run's evaluation, on this machine's CPU, from the newest
    checkpoint or that of `step`; the same run gives the same page. `config` is needed only where the run's task, model
    or algorithm is an object of your own program: without it the page tells what was recorded. Raises UserError.
    """
    console = console or Console(stderr=True)
    directory = RunDirectory(run_dir)
    try:
        findings = find(directory, episodes, step, config, console)
        advice = advise(findings)
        directory.write(REPORT_FILE, render(findings, advice).encode())
        return Report(f"{directory.location.rstrip('/')}/{REPORT_FILE}", findings, advice)
    finally:
        directory.close()
