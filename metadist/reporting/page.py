"""The page: one HTML file without a script, a font or a request of its own."""

from html import escape
from importlib.resources import files

from metadist import __version__
from metadist.reporting.advice import Advice
from metadist.reporting.findings import Findings
from metadist.reporting.page_adaptation import explanation, gradients, layers, rates, task_map, tasks
from metadist.reporting.page_record import calibration, environment, evaluation, figures, lead, training

SECTIONS = {
    "training": ("Training", training),
    "evaluation": ("New tasks", evaluation),
    "calibration": ("Calibration", calibration),
    "layers": ("What the inner loop changes", layers),
    "gradients": ("Do tasks pull the same way?", gradients),
    "rates": ("Learned inner rates", rates),
    "tasks": ("The hardest and the easiest tasks", tasks),
    "map": ("A map of tasks", task_map),
    "explanation": ("Why one prediction came out as it did", explanation),
    "environment": ("Environment and config", environment),
}


def render(findings: Findings, advice: list[Advice]) -> str:
    """The whole document. Sections that have nothing to show are left out."""
    record = findings.record
    bodies = {key: function(findings) for key, (_, function) in SECTIONS.items()}
    shown = {key: body for key, body in bodies.items() if body}
    links = {"next": "What to try next"} | {key: SECTIONS[key][0] for key in shown}
    navigation = "".join(f'<a href="#{key}">{escape(title)}</a>' for key, title in links.items())
    sections = "".join(
        f'<section id="{key}"><h2>{escape(SECTIONS[key][0])}</h2>{body}</section>' for key, body in shown.items()
    )
    body = (
        f"{lead(findings)}{figures(findings)}"
        f"{_notes(findings.notes)}<nav>{navigation}</nav></header>"
        f'<section id="next"><h2>What to try next</h2>{_advice(advice)}</section>{sections}'
    )
    return document(record.name, f"<header>{heading('metadist report', record.name)}{body}", record.location)


def heading(eyebrow: str, name: str) -> str:
    """What stands above everything."""
    return f'<p class="eyebrow">{escape(eyebrow)}</p><h1>{escape(name)}</h1>'


def document(name: str, body: str, location: str) -> str:
    """A whole page around its body."""
    style = files("metadist.reporting").joinpath("page.css").read_text()
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # Nothing may be loaded, whatever stands in a config or a class's name.
        '<meta http-equiv="Content-Security-Policy" content="'
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        '<link rel="icon" href="data:,">'
        f"<title>{escape(name)}: report</title><style>{style}</style></head><body><main>{body}"
        f'<footer class="muted">Made by metadist {escape(__version__)} from {escape(location)}. The same files'
        " and options give the same page.</footer></main></body></html>\n"
    )


def _notes(notes: list[str]) -> str:
    return f'<ul class="notes">{"".join(f"<li>{_with_code(note)}</li>" for note in notes)}</ul>' if notes else ""


def _advice(advice: list[Advice]) -> str:
    if not advice:
        return "<p>Nothing stands out in this run.</p>"
    items = "".join(f"<li><span>{_with_code(each.text)}</span></li>" for each in advice)
    return f'<ol class="advice">{items}</ol>'


def _with_code(text: str) -> str:
    """Text whose parts between backticks are set as code."""
    parts = [escape(part) for part in text.split("`")]
    return "".join(f"<code>{part}</code>" if number % 2 else part for number, part in enumerate(parts))
