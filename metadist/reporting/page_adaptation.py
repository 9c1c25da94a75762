"""Sections drawn from what the checkpoint gave again: layers, gradients, rates, tasks, their map, one explanation."""

from collections import Counter
from html import escape

import numpy as np

from metadist.reporting.adaptation import Adaptation, AdaptedEpisode, principal_components
from metadist.reporting.charts import Chart, heat_table, legend, minus, span
from metadist.reporting.findings import Findings
from metadist.reporting.images import image, is_image, signed_image
from metadist.tasks.few_shot import EpisodeClass

COLOURS = ("blue", "orange", "green", "violet", "teal", "pink", "brown", "red")
EXAMPLES = 5
"""Support and query examples of a class that are shown; wrong ones come first."""
WAYS = 10
"""Classes of an episode that are shown; those with wrong predictions come first."""
COSINE_BINS = 24


def layers(f: Findings) -> str:
    """Relative change and CKA of each layer."""
    a = f.adaptation
    if a is None:
        return ""
    if not a.movements:
        return "<p>This algorithm adapts in one go, or takes no inner step: no layer moves.</p>"
    largest = max((m.change["mean"] for m in a.movements if m.change), default=0.0)
    rows = []
    for m in a.movements:
        change = f"{100 * m.change['mean']:.1f} ± {100 * m.change['ci95']:.1f} %" if m.change else "starts at 0"
        share = m.change["mean"] / largest if m.change and largest else 0.0
        cka = f"{m.cka['mean']:.3f} ± {m.cka['ci95']:.3f}" if m.cka else "not known"
        rows.append(
            f"<tr><th>{escape(m.layer.label)}</th><td>{change}{_track(share, 'orange')}</td>"
            f"<td>{cka}{_track(m.cka['mean'] if m.cka else 0.0, 'blue')}</td></tr>"
        )
    return (
        f"<p>Over {len(a.episodes)} tasks, from theta to phi ({a.steps} inner step{'s' * (a.steps != 1)}): how far the"
        " parameters of each layer go, as a share of their size, and how alike that layer's answers to the query set"
        " stay (CKA; 1 is the same but for rotation and scale).</p>"
        '<div class="wide"><table class="layers"><tr><th>layer</th><th>change</th><th>CKA</th></tr>'
        f"{''.join(rows)}</table></div>"
        '<p class="note">As in Raghu et al. 2020 (arXiv:1909.09157, sec. 3): linear CKA of Kornblith et al. 2019'
        " (arXiv:1905.00414), by its unbiased estimate, which small query sets need. A layer's answers can change"
        " although it does not move itself, where one before it does.</p>"
    )


def _track(share: float, colour: str) -> str:
    return f'<div class="track {colour}"><i style="width:{100 * min(max(share, 0), 1):.0f}%"></i></div>'


def gradients(f: Findings) -> str:
    """Cosines between tasks' meta-gradients."""
    g = f.alignment
    if g is None:
        return ""
    reach = min(1.0, float(np.ceil(10 * np.abs(g.cosines).max()) / 10) or 0.1)
    counts, edges = np.histogram(g.cosines, COSINE_BINS, (-reach, reach))
    chart = Chart(
        "cosines between meta-gradients",
        (-reach, reach),
        (0, float(counts.max()) * 1.08),
        x_title="cosine",
        y_title="pairs of tasks",
    )
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        if count:
            chart.bar(low, high, float(count), "violet", f"{count} pairs between {low:.2f} and {high:.2f}")
    balance = (
        f"A meta-batch of about {g.noise_scale:,.0f} tasks would have as much noise as signal; this run's has"
        f" {f.record.setting('training', 'meta_batch_size')}."
        if g.noise_scale is not None
        else "They show no common direction that could be told from noise."
    )
    return (
        f"<p>The meta-gradients of {g.tasks} training tasks, those of the step after the checkpoint, have a mean cosine"
        f" of {minus(g.mean_cosine, '.3f')}: 1 is the same direction, 0 none in common, below 0 they work against each"
        " other."
        f' {balance}</p><div class="pair">{chart.svg()}</div>'
        '<p class="note">Balance: the simple noise scale of McCandlish et al. 2018 (arXiv:1812.06162).</p>'
    )


def rates(f: Findings) -> str:
    """The map of learned inner rates."""
    if f.rates is None:
        return ""
    table = heat_table(f.rates.parameters, f.rates.columns, f.rates.values.tolist(), f.rates.start)
    negative = f" {100 * f.rates.negative:.1f} % of all are negative." if f.rates.negative else ""
    return f"<p>All started from {f.rates.start:g}; orange went up, blue down.{negative}</p>{table}"


def tasks(f: Findings) -> str:
    """Episodes with their images or curves."""
    a = f.adaptation
    if a is None:
        return ""
    if not a.is_classification:
        return _regression_tasks(f, a)
    half = len([number for number in f.shown if number in set(a.by_difficulty[: len(f.shown) // 2 + len(f.shown) % 2])])
    cards = [_classification_card(f, a.episodes[number], number) for number in f.shown]
    return (
        f"<p>Of the first {len(a.episodes)} episodes of the evaluation. Each row is a class: its support"
        " examples, then its query examples, framed green where named rightly and red where not.</p>"
        f'<h3>Hardest</h3><div class="trio">{"".join(cards[:half])}</div>'
        f'<h3>Easiest</h3><div class="trio">{"".join(cards[half:])}</div>'
    )


def _classification_card(f: Findings, episode: AdaptedEpisode, number: int) -> str:
    assert f.experiment is not None
    ways = f.experiment.source.spec.output_size
    classes_of = getattr(f.experiment.source, "classes_of", None)
    classes = classes_of(episode.key) if classes_of else [EpisodeClass(str(way), None, 0) for way in range(ways)]
    wrong = Counter(int(y) for y, said in zip(episode.query.y, episode.predicted, strict=True) if y != said)
    shown = sorted(sorted(range(ways), key=lambda way: -wrong[way])[:WAYS])
    rows = "".join(_class_row(episode, way, _name(classes[way])) for way in shown)
    more = f'<p class="muted">and {ways - len(shown)} more classes</p>' if ways > len(shown) else ""
    right = len(episode.query.y) - wrong.total()
    return (
        f'<article class="episode"><h3>Task {number}</h3><p class="muted">{right} of {len(episode.query.y)} right, loss'
        f' {episode.loss:.3g}</p><ul class="classes">{rows}</ul>{more}</article>'
    )


def _class_row(episode: AdaptedEpisode, way: int, name: str) -> str:
    """Support examples, query examples, and what was said of those."""
    support = [x.numpy() for x, y in zip(episode.support.x, episode.support.y, strict=True) if int(y) == way]
    said = [
        (int(label), x.numpy())
        for x, y, label in zip(episode.query.x, episode.query.y, episode.predicted, strict=True)
        if int(y) == way
    ]
    said.sort(key=lambda each: each[0] == way)
    wrong = Counter(_letter(label) for label, _ in said if label != way)
    if not is_image(episode.query.x[0].numpy()):
        left = right = ""
    else:
        left = "".join(image(x, "small support", f"support example of {name}") for x in support[:EXAMPLES])
        right = "".join(
            image(x, f"small {'right' if label == way else 'wrong'}", f"query example, called {_letter(label)}")
            for label, x in said[:EXAMPLES]
        )
    taken = ", ".join(f"{letter}{f' ({count} times)' if count > 1 else ''}" for letter, count in wrong.items())
    mistake = f'<span class="mistake">taken for {taken}</span>' if taken else ""
    return (
        f'<li><b>{_letter(way)}</b><span class="row">{left}</span><span class="row">{right}</span>'
        f'<span class="name">{_breakable(name)}{mistake}</span></li>'
    )


def _breakable(name: str) -> str:
    """Escaped, and broken into lines after a slash or an underscore rather than anywhere."""
    return escape(name).replace("/", "/<wbr>").replace("_", "_<wbr>")


def _letter(way: int) -> str:
    return chr(ord("A") + way) if way < 26 else str(way + 1)


def _name(each: EpisodeClass) -> str:
    return f"{each.name}, turned {90 * each.turn}°" if each.turn else each.name


def _regression_tasks(f: Findings, a: Adaptation) -> str:
    if not f.curves:
        rows = "".join(
            f'<tr><td class="n">{number}</td><td class="n">{a.episodes[number].loss:.4g}</td></tr>'
            for number in f.shown
        )
        return f'<table><tr><th class="n">task</th><th class="n">loss</th></tr>{rows}</table>'
    charts = []
    every = [value for c in f.curves for value in [*c.y, *next(reversed(c.predicted.values()))]]
    for c in f.curves:
        episode = a.episodes[c.episode]
        chart = Chart(
            f"task {c.episode}",
            (float(c.x[0]), float(c.x[-1])),
            span(every),
            x_title="x",
            width=300,
            height=190,
            y_title=f"task {c.episode}, squared error {episode.loss:.3g}",
        )
        chart.line(c.x, c.y, "ink")
        for step, y in c.predicted.items():
            colour = "grey" if step == 0 else "blue" if step == max(c.predicted) else "orange"
            chart.line(c.x, y, colour if colour == "blue" else f"{colour} dashed")
        x, y = episode.support.x[:, 0].numpy(), episode.support.y[:, 0].numpy()
        chart.points(x, y, "ink", [f"support: {a_:.2f}, {b:.2f}" for a_, b in zip(x, y, strict=True)])
        charts.append(chart.svg())
    half = (len(charts) + 1) // 2
    middle = [
        (s, "blue" if s == max(f.curves[0].predicted) else "grey dashed" if s == 0 else "orange dashed")
        for s in f.curves[0].predicted
    ]
    names = [
        ("ink", "the task; dots: support set"),
        *[(colour, "before adapting" if s == 0 else f"after {s} step{'s' * (s > 1)}") for s, colour in middle],
    ]
    return (
        f"<p>Of the first {len(a.episodes)} episodes of the evaluation.</p>{legend(names)}"
        f'<h3>Hardest</h3><div class="trio">{"".join(charts[:half])}</div>'
        f'<h3>Easiest</h3><div class="trio">{"".join(charts[half:])}</div>'
    )


def task_map(f: Findings) -> str:
    """Tasks on two principal components of their embedding."""
    a = f.adaptation
    if a is None or len(a.episodes) < 3 or not np.isfinite(a.embedding).all():
        return ""
    places, shares = principal_components(a.embedding)
    chart = Chart(
        "map of tasks",
        span(places[:, 0]),
        span(places[:, 1]),
        x_ticks=[],
        height=300,
        x_title=f"first component, {100 * shares[0]:.0f} % of the variance",
        y_title=f"second component, {100 * shares[1]:.0f} % of the variance",
    )
    common = [name for name, _ in Counter(filter(None, f.families)).most_common(len(COLOURS))]
    titles = [_title(f, a, number) for number in range(len(a.episodes))]
    if len(common) > 1:
        for name, colour in zip(common, COLOURS, strict=False):
            mine = [n for n, family in enumerate(f.families) if family == name]
            chart.points(places[mine, 0], places[mine, 1], colour, [titles[n] for n in mine], name)
        rest = [n for n, family in enumerate(f.families) if family not in common]
        chart.points(places[rest, 0], places[rest, 1], "grey", [titles[n] for n in rest], "others" if rest else "")
        coloured = "Coloured by family."
    else:
        loss = np.array([episode.loss for episode in a.episodes])
        rank = loss.argsort().argsort() / max(1, len(loss) - 1)
        for n, (x, y) in enumerate(places):
            chart.parts.append(
                f'<circle class="shade" style="--heat:{rank[n]:.2f}" cx="{chart.x(x):.1f}" cy="{chart.y(y):.1f}" r="4">'
                f"<title>{escape(titles[n])}</title></circle>"
            )
        chart.legend += [("blue", "easier"), ("red", "harder")]
        coloured = "Coloured by how hard they were."
    return (
        f"<p>Each dot is one of {len(a.episodes)} tasks; drawn from {escape(a.embedded)}, on its first two principal"
        f' components. {coloured}</p><div class="pair">{chart.svg()}</div>'
    )


def _title(f: Findings, a: Adaptation, number: int) -> str:
    family = f.families[number] if f.families else None
    episode = a.episodes[number]
    score = f"accuracy {100 * episode.accuracy:.0f} %" if a.is_classification else f"loss {episode.loss:.3g}"
    return f"task {number}{f', {family}' if family else ''}: {score}"


def explanation(f: Findings) -> str:
    """Integrated gradients over one input, and what each support example did to its prediction."""
    e = f.explanation
    if e is None or f.experiment is None:
        return ""
    classes_of = getattr(f.experiment.source, "classes_of", None)
    count = f.experiment.source.spec.output_size
    classes = classes_of(e.episode.key) if classes_of else [EpisodeClass(str(way), None, 0) for way in range(count)]
    x, truth = e.episode.query.x[e.query].numpy(), int(e.episode.query.y[e.query])
    verdict = "rightly" if truth == e.predicted else f"wrongly: it is {_name(classes[truth])}"
    pictures = ""
    if is_image(x):
        pictures = (
            f'<figure class="picture">{image(x, "large", "the query example")}'
            "<figcaption>the query example</figcaption></figure>"
            f'<figure class="picture">{signed_image(e.attributions, "large", "what spoke for and against")}'
            "<figcaption>red spoke for it, blue against it</figcaption></figure>"
        )
    items = []
    for number in np.argsort(-e.support):
        picture = e.episode.support.x[number].numpy()
        shown = image(picture, "", "support example") if is_image(picture) else ""
        name = _breakable(_name(classes[int(e.episode.support.y[number])]))
        items.append(f"<li>{shown}<b>{minus(e.support[number], '+.2f')}</b>{name}</li>")
    batch_norm = (
        " Under statistics of the support set, since an explanation of one example may not depend on those beside it."
        if f.experiment.network.policy == "transductive" and f.experiment.network.batch_norms
        else ""
    )
    return (
        f"<p>A query example of the hardest task was called {escape(_name(classes[e.predicted]))} with a probability of"
        f' {100 * e.probability:.0f} %, {escape(verdict)}.</p><div class="explained">{pictures}</div>'
        "<p>The support examples that mattered: by how much the prediction's log-probability falls where one is"
        f' replaced by the mean example before adapting.</p><ul class="supports">{"".join(items)}</ul>'
        '<p class="note">Integrated gradients (Sundararajan et al. 2017, arXiv:1703.01365) from the mean'
        f" support example, by captum; they add up to the difference in log-probability to within"
        f" {e.missing:.2g}.{batch_norm}</p>"
    )
