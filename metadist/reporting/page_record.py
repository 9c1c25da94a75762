"""Sections drawn from what the run directory holds: the head, training, evaluation, calibration, environment."""

import math
from html import escape
from itertools import pairwise
from typing import Any

import numpy as np

from metadist.reporting.charts import Chart, span
from metadist.reporting.findings import Findings
from metadist.reporting.record import Record
from metadist.scores import NO_BATCH_NORM

AVERAGES = 60
"""Points of a training curve, each the mean of the steps around it."""


def lead(f: Findings) -> str:
    """What was trained on what, for how long, in a sentence or two."""
    record = f.record
    algorithm, model, task = (_title(record, section) for section in ("algorithm", "model", "task"))
    steps, batch = f.step if f.step is not None else record.last_step, record.setting("training", "meta_batch_size")
    long = f", in {duration(record.seconds)}" if record.seconds else ""
    tasks = f", {steps * batch:,} tasks in all{long}" if batch else long
    planned = record.setting("training", "steps")
    of = f" of {planned:,}" if planned and steps < planned else ""
    return (
        f'<p class="lead">{escape(algorithm)} meta-trained {escape(model)} on {escape(task)}: {steps:,}{of} steps of'
        f" {batch} tasks{tasks}.</p>{_plain_result(record)}"
    )


def _plain_result(record: Record) -> str:
    e = record.evaluation
    if e is None:
        return ""
    own = e["policies"][0]["per_inner_step"]
    first, last = own[0], own[-1]
    adapting = f"after {_steps(e['inner_steps'])}" if e["inner_steps"] else "after adapting in one go"
    if last["accuracy"] is None:
        before = f", and {_interval(first['loss'], 3)} before" if e["inner_steps"] else ""
        return (
            f'<p class="lead">On {e["episodes"]:,} new tasks of the {e["split"]} split the mean squared error'
            f" {adapting} is {_interval(last['loss'], 3)}{before}.</p>"
        )
    if last["accuracy"]["mean"] is None:
        return ""
    mean, half = last["accuracy"]["mean"], last["accuracy"]["ci95"] or 0
    return (
        f'<p class="lead">Of 100 query examples of new {e["split"]} tasks, {100 * mean:.0f} are named rightly'
        f" {adapting} (95 % interval {100 * max(mean - half, 0):.1f} to {100 * min(mean + half, 1):.1f}, over"
        f" {e['episodes']:,} tasks).</p>"
    )


def figures(f: Findings) -> str:
    """The few numbers that one looks for first."""
    e, cells = f.record.evaluation, []
    if e is not None:
        for policy in e["policies"]:
            last = policy["per_inner_step"][-1]
            name = "" if policy["batch_norm"] == NO_BATCH_NORM else f", batch norm {policy['batch_norm']}"
            if last["accuracy"] is not None:
                cells.append(
                    (
                        _interval(last["accuracy"], 1, 100, " %"),
                        f"accuracy on {e['episodes']:,} {e['split']} tasks{name}",
                    )
                )
            else:
                cells.append(
                    (_interval(last["loss"], 3), f"squared error on {e['episodes']:,} {e['split']} tasks{name}")
                )
        first = e["policies"][0]["per_inner_step"][0]
        if e["inner_steps"] and first["accuracy"] is not None:
            cells.append((_interval(first["accuracy"], 1, 100, " %"), "before adapting"))
        elif e["inner_steps"]:
            cells.append((_interval(first["loss"], 3), "before adapting"))
        if e["ece"] is not None:
            cells.append(
                (f"{100 * e['ece']:.1f} <small>%</small>", "calibration error: how far confidences are from the truth")
            )
    speed = _speed(f.record)
    if speed:
        cells.append((f"{speed:,.0f} <small>tasks/s</small>", "training, validation included"))
    body = "".join(f'<div class="figure"><b>{value}</b><span>{escape(name)}</span></div>' for value, name in cells)
    return f'<div class="figures">{body}</div>' if cells else ""


def training(f: Findings) -> str:
    """Training and validation curves; the norm of the meta-gradient; the time line."""
    record, name = f.record, f.record.score
    if not record.trained:
        return ""
    scale, unit = (100, "query accuracy, %") if name == "accuracy" else (1, "query loss")
    lines = [line for line in record.trained if line.get(name) is not None]
    charts = [_curve(record, lines, name, scale, unit)]
    if name == "accuracy":
        charts.append(_curve(record, record.trained, "loss", 1, "query loss"))
    if any(line.get("gradient_norm") is not None for line in record.trained):
        x, y = _averages(record.trained, "gradient_norm", 1)
        chart = Chart(
            "norm of the meta-gradient",
            (0, record.last_step),
            (0, max(y) * 1.05),
            x_title="step",
            y_title="norm of the meta-gradient, before clipping",
        )
        chart.line(x, y, "violet")
        charts.append(chart.svg())
    charts.append(_time_line(record))
    return f'<div class="pair">{"".join(charts)}</div>'


def _curve(record: Record, lines: list[dict[str, Any]], name: str, scale: float, unit: str) -> str:
    x, y = _averages(lines, name, scale)
    validated = [
        (line["step"], scale * line[f"val_{name}"]) for line in record.validated if line.get(f"val_{name}") is not None
    ]
    high = max([*y, *[v for _, v in validated]])
    low, high = (min([*y[len(y) // 10 :], *[v for _, v in validated]]), high)
    low, high = span([low, high])
    if name == "accuracy":
        high = min(high, 100.0)
    else:
        low = max(low, 0.0)
    chart = Chart(f"{unit} against steps", (0, record.last_step), (low, high), x_title="step", y_title=unit)
    raw_x = [line["step"] for line in lines]
    if len(lines) > AVERAGES:
        chart.line(raw_x, [scale * line[name] for line in lines], "blue", faint=True)
    chart.line(x, y, "blue", "training tasks")
    if validated:
        chart.line([s for s, _ in validated], [v for _, v in validated], "orange")
        chart.points(
            [s for s, _ in validated],
            [v for _, v in validated],
            "orange",
            [f"step {s:,}: {v:.4g}" for s, v in validated],
            "validation tasks",
            2.6,
        )
    return chart.svg()


def _averages(lines: list[dict[str, Any]], name: str, scale: float) -> tuple[list[float], list[float]]:
    pairs = np.array([(line["step"], scale * line[name]) for line in lines if line.get(name) is not None], float)
    if not len(pairs):
        return [0.0], [0.0]
    groups = np.array_split(pairs, min(AVERAGES, len(pairs)))
    means = np.stack([group.mean(0) for group in groups])
    return list(means[:, 0]), list(means[:, 1])


def _time_line(record: Record) -> str:
    """Tasks a second between logged steps, over the hours of all sessions one after another."""
    batch, chart_x, chart_y, borders, passed = record.setting("training", "meta_batch_size"), [], [], [], 0.0
    for session in record.sessions:
        if len(session) < 3:
            continue
        points = session[:: max(1, len(session) // AVERAGES)]
        for (s0, t0), (s1, t1) in pairwise(points):
            if t1 > t0:
                chart_x.append(passed + (t1 - session[0][1]))
                chart_y.append((s1 - s0) * (batch or 1) / (t1 - t0))
        passed += session[-1][1] - session[0][1]
        borders.append(passed)
    if not chart_x:
        return ""
    unit, seconds = next(
        (u, s) for u, s in (("hours", 3600), ("minutes", 60), ("seconds", 1)) if passed >= 2 * s or s == 1
    )
    chart = Chart(
        "speed over time",
        (0, passed / seconds),
        (0, max(chart_y) * 1.08),
        x_title=f"{unit} of training",
        y_title="tasks a second, validations and checkpoints included",
    )
    chart.line([x / seconds for x in chart_x], chart_y, "teal")
    for border in borders[:-1]:
        chart.parts.append(
            f'<line class="line grey dashed" x1="{chart.x(border / seconds):.1f}" x2="{chart.x(border / seconds):.1f}"'
            f' y1="{chart.y(chart.y_range[0]):.1f}" y2="{chart.y(chart.y_range[1]):.1f}"/>'
        )
    if len(borders) > 1:
        chart.legend.append(("grey dashed", "resumed"))
    return chart.svg()


def evaluation(f: Findings) -> str:
    """Scores per inner step under each batch-norm policy."""
    e = f.record.evaluation
    if e is None:
        return ""
    accurate = e["accuracy"] is not None
    name, scale, unit, digits = ("accuracy", 100, "accuracy, %", 1) if accurate else ("loss", 1, "query loss", 3)
    tried = f.adaptation.loss.shape[1] - 1 if f.adaptation and e["step"] == f.step else e["inner_steps"]
    last = max(e["inner_steps"], tried)
    every = [
        scale * (_number(row[name]["mean"]) + sign * (row[name]["ci95"] or 0))
        for policy in e["policies"]
        for row in policy["per_inner_step"]
        for sign in (-1, 1)
    ]
    chart = Chart(
        f"{unit} per inner step",
        (0, max(last, 1)),
        _bounded(span(every), accurate),
        x_title="inner steps",
        y_title=f"{unit}, with 95 % intervals",
        x_ticks=_whole(last),
    )
    if f.adaptation and last > e["inner_steps"]:
        own = f.adaptation.accuracy if accurate else f.adaptation.loss
        beyond = list(range(f.adaptation.steps, last + 1))
        chart.dashes(
            beyond,
            [scale * float(own[:, step].mean()) for step in beyond],
            "grey",
            f"beyond the run's steps, {len(f.adaptation.episodes)} tasks",
        )
    for policy, colour in zip(e["policies"], ("blue", "orange"), strict=False):
        rows = policy["per_inner_step"]
        x = [row["inner_step"] for row in rows]
        y = [scale * _number(row[name]["mean"]) for row in rows]
        half = [scale * (row[name]["ci95"] or 0) for row in rows]
        label = "" if policy["batch_norm"] == NO_BATCH_NORM else f"batch norm: {policy['batch_norm']}"
        chart.band(
            x, [a - b for a, b in zip(y, half, strict=True)], [a + b for a, b in zip(y, half, strict=True)], colour
        )
        chart.line(x, y, colour)
        for a, b, c in zip(x, y, half, strict=True):
            if math.isfinite(b):
                chart.whisker(a, b - c, b + c, colour)
        chart.points(
            x, y, colour, [f"after {_steps(a)}: {b:.4g} ± {c:.2g}" for a, b, c in zip(x, y, half, strict=True)], label
        )
    return (
        f"<p>{e['episodes']:,} {e['split']} tasks, never seen in training; theta of step {e['step']:,}.</p>"
        f'<div class="pair">{chart.svg()}{_score_table(e, name, scale, digits)}</div>'
    )


def _score_table(e: dict[str, Any], name: str, scale: float, digits: int) -> str:
    policies = e["policies"]
    head = "".join(
        f'<th class="n">{escape("score" if p["batch_norm"] == NO_BATCH_NORM else p["batch_norm"])}</th>'
        for p in policies
    )
    rows = []
    for step in range(e["inner_steps"] + 1):
        if step > 3 and step % 5 and step != e["inner_steps"]:
            continue
        cells = "".join(
            f'<td class="n">{_interval(p["per_inner_step"][step][name], digits, scale)}</td>' for p in policies
        )
        rows.append(f'<tr><td class="n">{step}</td>{cells}</tr>')
    unit = "accuracy, %" if name == "accuracy" else "query loss"
    return (
        f'<div><div class="y-title">{unit}</div><table><tr><th class="n">inner steps</th>{head}</tr>'
        f"{''.join(rows)}</table></div>"
    )


def calibration(f: Findings) -> str:
    """Reliability diagrams."""
    e = f.record.evaluation
    if e is None or e["ece"] is None:
        return ""
    charts = []
    for policy, colour in zip(e["policies"], ("blue", "orange"), strict=False):
        c = policy["calibration"]
        under = "" if policy["batch_norm"] == NO_BATCH_NORM else f"batch norm {policy['batch_norm']}: "
        chart = Chart(
            "reliability",
            (0, 100),
            (0, 100),
            x_title="confidence, %",
            y_title=f"{under}accuracy by confidence, %",
        )
        chart.dashes([0, 100], [0, 100], "grey", "perfect calibration")
        largest = max(b["count"] for b in c["bins"])
        for b in c["bins"]:
            if b["count"]:
                chart.bar(
                    100 * b["lower"],
                    100 * b["upper"],
                    30 * b["count"] / largest,
                    f"{colour} hollow",
                    f"{b['count']} predictions",
                )
        some = [b for b in c["bins"] if b["count"] and b["confidence"] is not None]
        x, y = [100 * b["confidence"] for b in some], [100 * b["accuracy"] for b in some]
        chart.line(x, y, colour)
        chart.points(x, y, colour, [f"{b['count']} predictions" for b in some], "accuracy")
        chart.legend.append((f"{colour} hollow", "how many predictions"))
        charts.append(chart.svg())
    return (
        "<p>Of predictions made with a confidence of p, a share p should come true. Above the line the model is too"
        f' modest, below it too sure.</p><div class="pair">{"".join(charts)}</div>'
    )


def environment(f: Findings) -> str:
    """The fingerprint, and the resolved config, folded."""
    rows = "".join(
        f"<tr><th>{escape(key.replace('_', ' '))}</th><td><code>{escape(str(value))}</code></td></tr>"
        for key, value in (f.record.fingerprint or {}).items()
    )
    table = f'<div class="wide"><table>{rows}</table></div>' if rows else "<p>The fingerprint is missing.</p>"
    return (
        f"<p>What the run's bits depend on, as it was written at its start.</p>{table}"
        f"<details><summary>The resolved config</summary><pre>{escape(f.record.config_text)}</pre></details>"
    )


def duration(seconds: float) -> str:
    """In the two units that tell most."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _title(record: Record, section: str) -> str:
    name = record.setting(section, "name") or "?"
    if section in record.own_objects:
        return str(record.setting(section, "class"))
    if section == "task" and record.setting("task", "ways"):
        pool = str(record.setting("task", "pool")).rpartition("/")[2]
        return f"{record.setting('task', 'ways')}-way {record.setting('task', 'shots')}-shot tasks of {pool}"
    if section == "task" and record.setting("task", "shots"):
        return f"{record.setting('task', 'shots')}-shot {name} tasks"
    return {
        "maml": "MAML",
        "anil": "ANIL",
        "boil": "BOIL",
        "conv4": "Conv-4",
        "mlp": "an MLP",
        "resnet12": "ResNet-12",
        "meta_sgd": "Meta-SGD",
        "maml_plus_plus": "MAML++",
        "cavia": "CAVIA",
        "proto_net": "ProtoNet",
    }.get(name, name)


def _speed(record: Record) -> float | None:
    batch = record.setting("training", "meta_batch_size")
    steps = sum(session[-1][0] - session[0][0] for session in record.sessions)
    return steps * batch / record.seconds if record.seconds and batch and steps else None


def _interval(score: dict[str, Any], digits: int, scale: float = 1, unit: str = "") -> str:
    if score["mean"] is None:
        return "not finite"
    half = "" if score["ci95"] is None else f"± {scale * score['ci95']:.{digits}f}"
    return f"{scale * score['mean']:.{digits}f} <small>{half}{unit}</small>"


def _number(value: float | None) -> float:
    """evaluation.json writes null for what is not finite."""
    return math.nan if value is None else value


def _bounded(limits: tuple[float, float], accurate: bool) -> tuple[float, float]:
    return (max(limits[0], 0.0), min(limits[1], 100.0)) if accurate else (max(limits[0], 0.0), limits[1])


def _whole(last: int) -> list[float]:
    step = max(1, -(-last // 10))
    return [float(value) for value in range(0, last + 1, step)]


def _steps(count: int) -> str:
    return f"{count} inner step{'' if count == 1 else 's'}"
