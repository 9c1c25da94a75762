"""`report.html` of a sweep: where the good settings lie, how trials went, and what mattered."""

from html import escape
from pathlib import Path
from typing import Any

from metadist.files import replacing
from metadist.reporting.charts import Chart, span
from metadist.reporting.page import document, heading
from metadist.reporting.sweep_record import SweepRecord, Trial, read_sweep_record
from metadist.scores import HEADERS, written
from metadist.sweeps.search_space import Distribution

REPORT_FILE = "report.html"
PREFERRED = ("algorithm.inner_lr", "outer.lr")
"""The axes of the map, where they are searched."""
SHOWN_TRIALS = 200
"""Rows of the table."""


def write_sweep_report(directory: str) -> str:
    """Writes the page into a sweep directory, from what lies there; gives its path. Raises UserError."""
    record = read_sweep_record(directory)
    place = Path(directory) / REPORT_FILE
    with replacing(place) as partial:
        partial.write_text(render_sweep(record), encoding="utf-8")
    return str(place)


def render_sweep(record: SweepRecord) -> str:
    """The whole document."""
    bodies = {
        "On test tasks": _finals(record),
        "Where good settings lie": _map(record),
        "How trials went": _curves(record),
        "How rates changed": _schedules(record),
        "What mattered": _importance(record),
        "All settings": _parallel(record),
        "Trials": _table(record),
    }
    sections = "".join(f"<section><h2>{title}</h2>{body}</section>" for title, body in bodies.items() if body)
    header = f"<header>{heading('metadist sweep', record.name)}{_lead(record)}{_figures(record)}</header>"
    return document(record.name, header + sections, record.location)


def _lead(record: SweepRecord) -> str:
    ranked = record.ranked()
    if not ranked:
        return '<p class="lead">No trial has come to a validation yet.</p>'
    best = ranked[0]
    settings = ", ".join(f"{key} = {shown(value)}" for key, value in best.settings.items())
    text = (
        f"The best of {len(record.trials)} trials reached {_score(record, best)} on validation tasks with {settings}."
    )
    return f'<p class="lead">{escape(text)}</p>{_edges(record, best)}'


def _edges(record: SweepRecord, best: Trial) -> str:
    """Which values of the best setting lie near an end of their interval: the optimum may be beyond."""
    at_edge = []
    for key, value in best.settings.items():
        distribution = record.space[key]
        if distribution.is_listed:
            continue
        if not 0.05 <= distribution.place(value) <= 0.95:
            low, high = distribution.values
            at_edge.append(f"{key} = {shown(value)} in {shown(low)} to {shown(high)}")
    if not at_edge:
        return ""
    said = f"Near an end of its interval: {'; '.join(at_edge)}. The best may lie beyond: widen it."
    return f'<ul class="notes"><li>{escape(said)}</li></ul>'


def _figures(record: SweepRecord) -> str:
    outcomes = [trial.outcome for trial in record.trials]
    steps = sum(trial.reports[-1]["step"] for trial in record.trials if trial.reports)
    full = len(record.trials) * record.steps
    early = (f"{outcomes.count('stopped')}", f"stopped early ({record.scheduler})")
    taken_over = (f"{sum(trial.taken_over for trial in record.trials)}", "times a trial went on from another's theta")
    cells = [
        (f"{outcomes.count('finished')}", "trials finished"),
        taken_over if record.changes_rates else early,
        (f"{outcomes.count('failed')}", "failed"),
        (f"{steps / full:.0%}" if full else "none", f"of {full:,} steps, that all trials to the end would take"),
    ]
    body = "".join(f'<div class="figure"><b>{value}</b><span>{escape(name)}</span></div>' for value, name in cells)
    return f'<div class="figures">{body}</div>'


def _finals(record: SweepRecord) -> str:
    """What is left of the best, with new seeds and on tasks that no trial was chosen by."""
    if record.finals is None:
        return ""
    metric, finalists = record.finals["metric"], record.finals["finalists"]
    rows = []
    for each in finalists:
        difference = written(each["difference"], metric, "+") if each["difference"] else ""
        settings = ", ".join(f"{key} {shown(value)}" for key, value in each["point"].items())
        cells = [each["name"], written(each["score"], metric), difference, settings]
        rows.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{name}</th>" for name in ("", HEADERS[metric], "to the base config", "setting"))
    note = (
        f"Trained anew with {len(finalists[0]['seeds'])} seeds that no trial had, and scored once on"
        f" {record.finals['episodes']} test tasks, the same for all; 95 % intervals over these tasks."
    )
    table = f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>'
    return f'<p class="note">{escape(note)}</p>{table}'


def _map(record: SweepRecord) -> str:
    """Two keys as a plane with every trial in it."""
    intervals = [key for key, distribution in record.space.items() if not distribution.is_listed]
    keys = [key for key in PREFERRED if key in intervals] + [key for key in intervals if key not in PREFERRED]
    heat = record.heat()
    if len(keys) < 2 or not heat:
        return ""
    across, up = keys[:2]
    chart = Chart(
        f"{up} against {across}, coloured by rank",
        *(_limits(record.space[key]) for key in (across, up)),
        x_title=across,
        y_title=up,
        width=560,
        height=380,
        x_log=record.space[across].kind == "loguniform",
        y_log=record.space[up].kind == "loguniform",
    )
    # The best are drawn last, above all others.
    for trial in reversed([trial for trial in record.ranked() if across in trial.settings and up in trial.settings]):
        x, y = trial.settings[across], trial.settings[up]
        chart.shaded_point(x, y, heat[trial.number], _title(record, trial))
    best = record.ranked()[0].settings
    if across in best and up in best:
        chart.ring(best[across], best[up])
    note = (
        f"Each dot is a trial, blue the best and red the worst by its last {record.metric}; the ring is the best."
        " Trials that were stopped early are judged by where they stopped."
    )
    if record.changes_rates:
        note = "Each dot is a trial at its last rates, blue the best and red the worst; the ring is the best."
    return f'<p class="note">{escape(note)}</p>{chart.svg().replace("chart", "chart large", 1)}'


def _curves(record: SweepRecord) -> str:
    heat = record.heat()
    values = [r[record.metric] for trial in record.ranked() for r in trial.reports if r.get(record.metric) is not None]
    if not values:
        return ""
    ceiling = record.ceiling(values)
    beyond = any(value > ceiling for value in values)
    values = [value for value in values if value <= ceiling]
    low, high = span(values)
    logarithmic = record.metric == "loss" and min(values) > 0 and max(values) > 20 * min(values)
    if logarithmic:
        low, high = min(values) / 1.1, max(values) * 1.1
    chart = Chart(
        f"{record.metric} on validation tasks against steps",
        (0, record.steps),
        (low, high),
        x_title="step",
        y_title=f"{record.metric} on validation tasks",
        width=560,
        height=300,
        y_log=logarithmic,
    )
    for trial in reversed(record.ranked()):
        reports = [report for report in trial.reports if report.get(record.metric) is not None]
        steps, scores = [r["step"] for r in reports], [min(r[record.metric], high) for r in reports]
        chart.shaded_line(steps, scores, heat[trial.number], _title(record, trial))
        if trial.outcome == "stopped":
            chart.shaded_point(steps[-1], scores[-1], heat[trial.number], "stopped", r=2.5)
    note = "One line a trial, blue the best and red the worst"
    note += "." if record.changes_rates else f"; a dot where {record.scheduler} stopped it."
    note += " Losses far above all others are drawn at the upper edge." if beyond else ""
    return f'<p class="note">{escape(note)}</p>{chart.svg().replace("chart", "chart large", 1)}'


def _schedules(record: SweepRecord) -> str:
    """Of a population, each rate against steps: what each trial's theta was made with, from the first step on."""
    keys = [key for key in record.space if any(key in trial.schedules for trial in record.trials)]
    heat, charts = record.heat(), []
    for key in keys:
        chart = Chart(
            f"{key} against steps",
            (0, record.steps),
            _limits(record.space[key]),
            x_title="step",
            y_title=key,
            width=560,
            height=260,
            y_log=record.space[key].kind == "loguniform",
        )
        for trial in reversed(record.ranked()):
            changes = trial.schedules[key]
            ends = [step for step, _ in changes[1:]] + [record.steps]
            steps = [place for (begin, _), end in zip(changes, ends, strict=True) for place in (begin, end)]
            rates = [rate for _, rate in changes for _ in range(2)]
            chart.shaded_line(steps, rates, heat[trial.number], _title(record, trial))
        charts.append(chart.svg().replace("chart", "chart large", 1))
    if not charts:
        return ""
    note = (
        "One line a trial, blue the best and red the worst: the rates that its theta was made with, also while that was"
        " another trial's. `outer.lr_schedule: from` this directory replays the best one in `metadist train`."
    )
    return f'<p class="note">{note}</p>{"".join(charts)}'


def _importance(record: SweepRecord) -> str:
    found = record.importances()
    if found is None:
        return ""
    method, shares = found
    rows = "".join(
        f'<tr><th>{escape(key)}</th><td class="n">{share:.0%}</td>'
        f'<td><div class="track blue"><i style="width:{100 * share:.0f}%"></i></div></td></tr>'
        for key, share in shares.items()
    )
    note = (
        f"Share of each key in the variance of the {record.metric} after {record.first_step} steps, the first"
        f" validation, which every trial came to: {method} over the whole space. Late in training others may matter."
    )
    return f'<p class="note">{escape(note)}</p><table class="layers">{rows}</table>'


def _parallel(record: SweepRecord) -> str:
    """Every trial as a line through its values, each axis from the interval's low end to its high one."""
    heat, keys = record.heat(), list(record.space)
    if not heat or len(keys) < 2:
        return ""
    chart = Chart(
        "values of all trials",
        (-0.15, len(keys) - 0.85),
        (0, 1),
        x_ticks=list(range(len(keys))),
        width=560,
        height=300,
    )
    chart.y_ticks = []
    for number, key in enumerate(keys):
        chart.whisker(number, 0, 1, "grey")
        chart.text(number, 1, f" {shown(_ends(record.space[key])[1])}")
        chart.text(number, 0.03, f" {shown(_ends(record.space[key])[0])}")
    for trial in reversed(record.ranked()):
        axes = [axis for axis, key in enumerate(keys) if key in trial.settings]
        places = [record.space[keys[axis]].place(trial.settings[keys[axis]]) for axis in axes]
        chart.shaded_line(axes, places, heat[trial.number], _title(record, trial))
    labels = [key.rpartition(".")[2] for key in keys]
    note = "One line a trial, blue the best and red the worst. Logarithmic where the space is."
    return f'<p class="note">{note}</p>{chart.svg(labels).replace("chart", "chart large", 1)}'


def _table(record: SweepRecord) -> str:
    ranked = record.ranked()
    others = [trial for trial in record.trials if trial not in ranked]
    head = "".join(f"<th>{escape(name)}</th>" for name in ("trial", "outcome", "step", record.metric, *record.space))
    rows = []
    for trial in (ranked + others)[:SHOWN_TRIALS]:
        value = trial.last(record.metric)
        cells = [
            str(trial.number),
            trial.outcome if trial.error is None else f"{trial.outcome}: {trial.error}",
            str(trial.reports[-1]["step"]) if trial.reports else "0",
            "" if value is None else f"{value:.2%}" if record.metric == "accuracy" else f"{value:.4g}",
            *(shown(trial.settings.get(key, "")) for key in record.space),
        ]
        rows.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    left = len(record.trials) - SHOWN_TRIALS
    more = f'<p class="note">and {left} more in results.parquet</p>' if left > 0 else ""
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>{more}'


def _title(record: SweepRecord, trial: Trial) -> str:
    settings = ", ".join(f"{key} {shown(value)}" for key, value in trial.settings.items())
    return f"trial {trial.number}, {trial.outcome}: {_score(record, trial)}; {settings}"


def _score(record: SweepRecord, trial: Trial) -> str:
    value = trial.last(record.metric)
    assert value is not None
    return f"{value:.2%}" if record.metric == "accuracy" else f"a loss of {value:.4g}"


def _ends(distribution: Distribution) -> tuple[Any, Any]:
    return distribution.values[0], distribution.values[-1]


def _limits(distribution: Distribution) -> tuple[float, float]:
    """The interval, with room for the dots at its ends."""
    low, high = distribution.values
    if distribution.kind == "loguniform":
        room = (high / low) ** 0.03
        return low / room, high * room
    room = 0.03 * (high - low)
    return low - room, high + room


def shown(value: Any) -> str:
    """A value in few characters."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
