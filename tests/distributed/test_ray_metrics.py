"""A run's metrics as Ray exports them for Prometheus, and the dashboard that draws them."""

import json
import re
import time
import urllib.request
from pathlib import Path

import pytest

from metadist import MetaTrainer
from metadist.distributed.ray_metrics import COUNTERS, GAUGES, HISTOGRAMS
from metadist.sections import ScalingSettings
from tests.distributed.test_same_bits import sinusoid

DASHBOARD = Path(__file__).parents[2] / "cluster/grafana_dashboard.json"
WAIT_S = 120


def scraped(port: int, run: str) -> dict[str, float]:
    """Values of the metrics of one run, by name and phase."""
    try:
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
    except OSError:
        return {}
    found = {}
    for name, labels, value in re.findall(r"^ray_(metadist_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        if f'run="{run}"' in labels and "le=" not in labels:
            phase = re.search(r'phase="(\w+)"', labels)
            found[f"{name} {phase[1]}" if phase else name] = float(value)
    return found


@pytest.mark.ray
def test_prometheus_is_told_what_the_run_did(local_ray: None, metrics_port: int, tmp_path: Path) -> None:
    result = MetaTrainer(sinusoid(tmp_path), scaling_config=ScalingSettings(num_workers=1)).fit(evaluate=False)
    run, deadline = Path(result.run_dir).name, time.monotonic() + WAIT_S
    while (values := scraped(metrics_port, run)).get("metadist_steps_total") != 12:
        assert time.monotonic() < deadline, f"only {values} after {WAIT_S} s"
        time.sleep(0.2)
    assert values["metadist_tasks_total"] == 12 * 25
    assert values["metadist_adapters_alive"] == 1
    assert values["metadist_checkpoints_total"] == 3  # After 5, 10 and 12 steps.
    assert values["metadist_query_loss"] == pytest.approx(result.train["loss"])
    assert "metadist_query_accuracy" not in values  # A regression has none.
    assert values["metadist_step_seconds_count adapting"] == 12
    assert values["metadist_step_seconds_sum adapting"] > 0


def test_the_dashboard_draws_metrics_that_there_are() -> None:
    exported = {f"ray_{name}_total" for name in COUNTERS} | {f"ray_{name}" for name in GAUGES}
    exported |= {f"ray_{name}_{part}" for name in HISTOGRAMS for part in ("sum", "count", "bucket")}
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    drawn = set(re.findall(r"ray_metadist_\w+", " ".join(queries)))
    assert drawn <= exported
    # And all of them are drawn somewhere.
    assert {re.sub("_(sum|count|bucket)$", "", name) for name in drawn} == {
        re.sub("_(sum|count|bucket)$", "", name) for name in exported
    }
