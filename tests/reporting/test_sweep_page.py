"""The page of a sweep: what it says follows from its trials, and it loads nothing."""

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from metadist.cli import cli
from metadist.errors import UserError
from metadist.reporting.charts import Chart
from metadist.reporting.sweep_page import render_sweep, write_sweep_report
from metadist.reporting.sweep_record import read_sweep_record
from metadist.run_directory import RunDirectory
from metadist.sweeps.directory import SweepDirectory
from metadist.sweeps.file import load_sweep
from tests import chromium

CONFIGS = Path(__file__).parents[2] / "configs"


def loss_at(point: dict, step: int) -> float:
    """The inner rate decides, the outer one hardly, the inner steps not at all."""
    inner, outer = math.log10(point["algorithm.inner_lr"]), math.log10(point["outer.lr"])
    return 1 + (inner + 1) ** 2 + 0.05 * (outer + 3) ** 2 + 10 / step


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """Thirty trials, of which the worse half was stopped after the first validation and one failed."""
    folder = tmp_path_factory.mktemp("sweeps")
    path = folder / "sweep.yaml"
    path.write_text(
        f"""\
base: {CONFIGS / "sinusoid_maml.yaml"}
overrides: {{scaling.num_workers: 0}}
space:
  outer.lr: loguniform(1e-4, 1e-2)
  algorithm.inner_lr: loguniform(1e-2, 1)
  algorithm.inner_steps: choice(1, 2, 3)
objective: {{metric: loss}}
budget: {{trials: 30, steps: 90, every: 10}}
run: {{storage_path: {folder}, name: mine}}
"""
    )
    sweep = load_sweep(path)
    found = SweepDirectory(sweep)
    found.open(resume=False)
    points = sweep.points()
    middle = np.median([loss_at(point, 10) for point in points])
    for number, point in enumerate(points):
        found.begin(number, point)
        place = RunDirectory(str(found.trial(number)))
        if number == 7:
            place.write_json("failure.json", {"error": "NonFiniteError: <script>alert(1)</script>"})
            found.end(number, "failed")
            continue
        stopped = loss_at(point, 10) > middle
        steps = [10] if stopped else range(10, 91, 10)
        place.write_json("reports.json", [{"step": step, "loss": loss_at(point, step)} for step in steps])
        found.end(number, "stopped" if stopped else "finished")
    found.write_results()
    return found.path


def test_the_best_and_the_counts_are_those_of_the_trials(directory: Path) -> None:
    record = read_sweep_record(str(directory))
    finished = [trial for trial in record.trials if trial.outcome == "finished"]
    best = min(finished, key=lambda trial: loss_at(trial.point, 90))
    assert record.ranked()[0].number == best.number
    page = render_sweep(record)
    assert f"a loss of {loss_at(best.point, 90):.4g}" in page
    assert f"<b>{len(finished)}</b><span>trials finished" in page
    assert "<b>1</b><span>failed" in page
    assert page.count('class="strand"') == 2 * 29
    heat = record.heat()
    assert heat[best.number] == 0
    assert max(heat.values()) == 1


def test_dots_lie_where_their_values_are(directory: Path) -> None:
    record = read_sweep_record(str(directory))
    page = render_sweep(record)
    best = record.ranked()[0]
    ring = re.search(r'class="line ink" cx="([\d.]+)" cy="([\d.]+)"', page)
    low, high = math.log10(0.01) - 0.06, 0.06
    across = (math.log10(best.point["algorithm.inner_lr"]) - low) / (high - low)
    up = (math.log10(best.point["outer.lr"]) - (-4.06)) / 2.12
    assert float(ring[1]) == pytest.approx(46 + across * (560 - 58), abs=0.1)
    assert float(ring[2]) == pytest.approx(380 - 36 - up * (380 - 48), abs=0.1)


def test_importance_finds_what_the_loss_was_made_of(directory: Path) -> None:
    pytest.importorskip("optuna")
    method, shares = read_sweep_record(str(directory)).importances()
    assert method in ("functional ANOVA", "PED-ANOVA")
    assert next(iter(shares)) == "algorithm.inner_lr"
    assert shares["algorithm.inner_lr"] > 0.7
    assert sum(shares.values()) == pytest.approx(1)


def test_a_trial_that_diverges_leaves_room_for_the_others(directory: Path) -> None:
    record = read_sweep_record(str(directory))
    worst = record.ranked()[-1]
    assert "far above all others" not in render_sweep(record)
    far = dataclasses.replace(worst, reports=[worst.reports[0] | {"loss": 1e15}])
    trials = [far if trial is worst else trial for trial in record.trials]
    page = render_sweep(dataclasses.replace(record, trials=trials))
    assert "far above all others" in page
    # The axis of the losses ends where it did, or a little below.
    assert "1e+15" in page  # In the table, and in what the dot says.
    assert "000,000" not in page


def test_a_best_value_near_the_end_of_its_interval_is_told(directory: Path) -> None:
    record = read_sweep_record(str(directory))
    assert "Near an end of its interval" not in render_sweep(record)
    trials = [
        dataclasses.replace(trial, point=trial.point | {"algorithm.inner_lr": 0.99})
        if trial is record.ranked()[0]
        else trial
        for trial in record.trials
    ]
    page = render_sweep(dataclasses.replace(record, trials=trials))
    assert "Near an end of its interval: algorithm.inner_lr = 0.99 in 0.01 to 1." in page


def test_logarithmic_axes_have_round_ticks() -> None:
    for limits, labels in (((0.01, 1), ["0.01", "0.1", "1"]), ((0.1, 0.6), ["0.1", "0.2", "0.5"])):
        svg = Chart("", limits, (0, 1), x_log=True).svg()
        assert re.findall(r'text-anchor="middle"[^>]*>([^<]+)<', svg) == labels


def test_a_sweep_without_a_validation_has_a_page_too(directory: Path) -> None:
    record = dataclasses.replace(read_sweep_record(str(directory)), trials=[])
    assert "No trial has come to a validation yet" in render_sweep(record)


def test_the_command_writes_it_and_nothing_in_it_is_run(directory: Path) -> None:
    found = CliRunner().invoke(cli, ["report", str(directory), "--json"])
    assert found.exit_code == 0, found.output
    page = Path(json.loads(found.stdout)["report"])
    assert page == directory / "report.html"
    text = page.read_text()
    assert "&lt;script&gt;alert(1)" in text
    assert "<script" not in text
    assert text == Path(write_sweep_report(str(directory))).read_text()


def test_a_damaged_sweep_is_refused(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text((directory / "sweep.json").read_text()[:-5])
    with pytest.raises(UserError, match=r"sweep\.json: missing or damaged"):
        read_sweep_record(str(tmp_path))


@pytest.mark.skipif(chromium.PROGRAM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [1100, 390])
def test_a_browser_shows_it_without_a_request_or_a_complaint(directory: Path, width: int) -> None:
    page = Path(write_sweep_report(str(directory)))
    seen = chromium.visit(page, width)
    assert seen.requests == [page.as_uri()]
    assert seen.complaints == []
    assert (seen.scroll_width, seen.wider) == (width, [])
