"""Charts as SVG that follows the page's colours, light and dark. Numbers come in, text goes out."""

import math
from collections.abc import Sequence
from html import escape

import numpy as np

Numbers = Sequence[float] | np.ndarray
WIDTH, HEIGHT = 420, 240
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 36


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers within [low, high], some `about` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / about
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round((first + i) * step, 12) for i in range(int((high - first * step) / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A tick's label."""
    if abs(value) >= 10_000 and value % 1000 == 0:
        return f"{value / 1000:,.0f}k"
    return minus(value, ",.10g")


def minus(value: float, form: str) -> str:
    """Formatted, with a typographical minus."""
    return f"{value:{form}}".replace("-", "\N{MINUS SIGN}")


class Chart:
    """A plane with two axes; what is added is clipped to it."""

    def __init__(
        self,
        label: str,
        x: tuple[float, float],
        y: tuple[float, float],
        *,
        x_title: str = "",
        y_title: str = "",
        x_ticks: Numbers | None = None,
        width: int = WIDTH,
        height: int = HEIGHT,
        x_log: bool = False,
        y_log: bool = False,
    ) -> None:
        self.label, self.width, self.height = label, width, height
        self.x_log, self.y_log = x_log, y_log
        self.x_range, self.y_range = _wide(*_scaled(x, x_log)), _wide(*_scaled(y, y_log))
        self.x_title, self.y_title = x_title, y_title
        self.x_ticks = _ticks(self.x_range, x_log) if x_ticks is None else x_ticks
        self.y_ticks = _ticks(self.y_range, y_log)
        self.parts: list[str] = []
        self.legend: list[tuple[str, str]] = []

    def x(self, value: float) -> float:
        low, high = self.x_range
        value = math.log10(value) if self.x_log else value
        return LEFT + (value - low) / (high - low) * (self.width - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        inside = min(max(math.log10(value) if self.y_log else value, low), high)
        return self.height - BOTTOM - (inside - low) / (high - low) * (self.height - TOP - BOTTOM)

    def line(self, x: Numbers, y: Numbers, colour: str, name: str = "", *, faint: bool = False) -> None:
        places = " ".join(f"{self.x(a):.1f},{self.y(b):.1f}" for a, b in zip(x, y, strict=True) if math.isfinite(b))
        self.parts.append(f'<polyline class="line {colour}{" faint" * faint}" points="{places}"/>')
        self._name(name, colour)

    def shaded_line(self, x: Numbers, y: Numbers, heat: float, title: str) -> None:
        """In a colour between blue, at a heat of 0, and red, at 1."""
        places = " ".join(f"{self.x(a):.1f},{self.y(b):.1f}" for a, b in zip(x, y, strict=True) if math.isfinite(b))
        self.parts.append(
            f'<polyline class="strand" style="--heat:{heat:.2f}" points="{places}">'
            f"<title>{escape(title)}</title></polyline>"
        )

    def shaded_point(self, x: float, y: float, heat: float, title: str, r: float = 4.5) -> None:
        self.parts.append(
            f'<circle class="shade" style="--heat:{heat:.2f}" cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="{r}">'
            f"<title>{escape(title)}</title></circle>"
        )

    def text(self, x: float, y: float, text: str) -> None:
        self.parts.append(f'<text class="tick" x="{self.x(x) + 3:.1f}" y="{self.y(y) + 4:.1f}">{escape(text)}</text>')

    def ring(self, x: float, y: float, r: float = 8) -> None:
        """Around the point that is meant."""
        self.parts.append(f'<circle class="line ink" cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="{r}"/>')

    def dashes(self, x: Numbers, y: Numbers, colour: str, name: str = "") -> None:
        self.line(x, y, f"{colour} dashed", name)

    def band(self, x: Numbers, low: Numbers, high: Numbers, colour: str) -> None:
        edge = [*zip(x, high, strict=True), *reversed(list(zip(x, low, strict=True)))]
        places = " ".join(f"{self.x(a):.1f},{self.y(b):.1f}" for a, b in edge if math.isfinite(b))
        self.parts.append(f'<polygon class="band {colour}" points="{places}"/>')

    def points(
        self, x: Numbers, y: Numbers, colour: str, titles: Sequence[str], name: str = "", r: float = 3.2
    ) -> None:
        for a, b, title in zip(x, y, titles, strict=True):
            if math.isfinite(b):
                self.parts.append(
                    f'<circle class="dot {colour}" cx="{self.x(a):.1f}" cy="{self.y(b):.1f}" r="{r}">'
                    f"<title>{escape(title)}</title></circle>"
                )
        self._name(name, colour)

    def bar(self, x0: float, x1: float, y: float, colour: str, title: str, base: float | None = None) -> None:
        low = self.y_range[0] if base is None else base
        top, bottom = self.y(max(y, low)), self.y(min(y, low))
        self.parts.append(
            f'<rect class="bar {colour}" x="{self.x(x0) + 0.6:.1f}" y="{top:.1f}"'
            f' width="{max(self.x(x1) - self.x(x0) - 1.2, 0.5):.1f}" height="{max(bottom - top, 0):.1f}">'
            f"<title>{escape(title)}</title></rect>"
        )

    def whisker(self, x: float, low: float, high: float, colour: str) -> None:
        self.parts.append(
            f'<line class="line {colour}" x1="{self.x(x):.1f}" x2="{self.x(x):.1f}"'
            f' y1="{self.y(low):.1f}" y2="{self.y(high):.1f}"/>'
        )

    def _name(self, name: str, colour: str) -> None:
        if name:
            self.legend.append((colour, name))

    def svg(self, x_labels: Sequence[str] | None = None) -> str:
        """The chart; its legend is HTML below it, so that it wraps."""
        bottom, right = self.height - BOTTOM, self.width - RIGHT
        axes = []
        for value in self.y_ticks:
            axes.append(
                f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{self.y(value):.1f}" y2="{self.y(value):.1f}"/>'
                f'<text class="tick" text-anchor="end" x="{LEFT - 6}" y="{self.y(value) + 3.5:.1f}">'
                f"{number(value)}</text>"
            )
        labels = x_labels or [number(value) for value in self.x_ticks]
        for value, label in zip(self.x_ticks, labels, strict=True):
            axes.append(
                f'<text class="tick" text-anchor="middle" x="{self.x(value):.1f}" y="{bottom + 15}">'
                f"{escape(label)}</text>"
            )
        axes.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
        place = f'text-anchor="end" x="{right}" y="{self.height - 4}"'
        titles = f'<text class="title" {place}>{escape(self.x_title)}</text>'
        drawing = (
            f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(self.label, quote=True)}">'
            f"{''.join(axes)}{''.join(self.parts)}{titles}</svg>"
        )
        head = f'<div class="y-title">{escape(self.y_title)}</div>' if self.y_title else ""
        return f'<div class="chart">{head}{drawing}{legend(self.legend)}</div>'


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """Names beside swatches of their colours."""
    if not entries:
        return ""
    items = "".join(f'<li><span class="swatch {colour}"></span>{escape(name)}</li>' for colour, name in entries)
    return f'<ul class="legend">{items}</ul>'


def heat_table(rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]], centre: float) -> str:
    """A table whose cells are tinted by how far they are from `centre`, above in one colour and below in another."""
    widest = max((abs(value - centre) for row in values for value in row), default=0.0) or 1.0
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = []
    for name, row in zip(rows, values, strict=True):
        cells = "".join(
            f'<td class="heat {"up" if value >= centre else "down"}"'
            f' style="--heat:{abs(value - centre) / widest:.2f}">{number(float(f"{value:.3g}"))}</td>'
            for value in row
        )
        body.append(f"<tr><th>{escape(name)}</th>{cells}</tr>")
    return f'<div class="wide"><table class="map"><tr><th></th>{head}</tr>{"".join(body)}</table></div>'


def _scaled(limits: tuple[float, float], log: bool) -> tuple[float, float]:
    return (math.log10(limits[0]), math.log10(limits[1])) if log else limits


def _ticks(scaled: tuple[float, float], log: bool) -> list[float]:
    """Round numbers; on a logarithmic axis powers of ten, with their multiples by 2 and 5 where these are few."""
    if not log:
        return ticks(*scaled)
    decades = range(math.floor(scaled[0]), math.ceil(scaled[1]) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        found = [factor * 10.0**power for power in decades for factor in factors]
        inside = [value for value in found if scaled[0] - 1e-9 <= math.log10(value) <= scaled[1] + 1e-9]
        if len(inside) >= 3:
            break
    return inside


def _wide(low: float, high: float) -> tuple[float, float]:
    """A range with some width."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return (0.0, 1.0)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def span(values: Numbers, room: float = 0.06) -> tuple[float, float]:
    """From the least to the largest finite value, with some room."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return (0.0, 1.0)
    low, high = min(finite), max(finite)
    margin = room * (high - low) or 0.5
    return (low - margin, high + margin)
