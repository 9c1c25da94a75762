"""The picture of `benchmarks.inner_loop`."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def draw(summaries: dict[str, Any], path: Path) -> None:
    """One panel a case: tasks/s of each contender on a logarithmic axis, and its share of the matrix rate."""
    figure = Figure(figsize=(7, 1.6 * len(summaries) + 0.4), layout="constrained")
    panels = figure.subplots(len(summaries), 1, squeeze=False)[:, 0]
    for panel, summary in zip(panels, summaries.values(), strict=True):
        names = list(summary["contenders"])[::-1]
        found = [summary["contenders"][name] for name in names]
        speeds = [one["tasks_per_second"] for one in found]
        colours = ["tab:blue" if name.startswith("metadist") else "tab:gray" for name in names]
        bars = panel.barh(names, speeds, color=colours)
        labels = [f" {one['tasks_per_second']:.4g}/s, {one['share_of_matrix_rate']:.1%} of limit" for one in found]
        panel.bar_label(bars, labels, fontsize=7)
        panel.set_xscale("log")
        panel.set_xlim(min(speeds) / 2, max(speeds) * 8)
        panel.set_title(summary["case"], fontsize=9, loc="left")
        panel.tick_params(labelsize=7)
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("tasks/s, one thread")
    figure.savefig(path, dpi=120)
