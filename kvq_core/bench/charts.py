"""Charts as inline SVG: colours and text sizes come from the page's style sheet, hovering from its script."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 480, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 14, 46
COLORS = 8
OTHER = -1
"""The colour of what no legend names."""


@dataclass(frozen=True)
class Dot:
    """A point of a series; one with a tip has a marker that can be hovered over."""

    x: float
    y: float
    tip: str = ""
    label: str = ""


@dataclass(frozen=True)
class Series:
    """Points of one colour, which a legend's button shows and hides; `line` joins them."""

    color: int
    dots: Sequence[Dot]
    line: bool = True


@dataclass(frozen=True)
class Axis:
    """One axis of a chart: its title, and how it is scaled."""

    title: str
    log: bool = False
    zero: bool = True
    """Begins at 0, where it is linear."""
    top: float | None = None


@dataclass(frozen=True)
class Scale:
    """Maps values to pixels, and knows where ticks belong."""

    low: float
    high: float
    log: bool
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        low, high = self._at(self.low), self._at(self.high)
        return self.start + (self._at(value) - low) / (high - low) * (self.end - self.start)

    def _at(self, value: float) -> float:
        return math.log10(max(value, 1e-12)) if self.log else value

    def ticks(self) -> list[float]:
        """Values that get a tick."""
        if not self.log:
            return self._even(5)
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        steps = (1, 2, 5) if len(decades) < 5 else (1,)
        ticks = [10**decade * step for decade in decades for step in steps]
        ticks = [tick for tick in ticks if self.low * 0.999 <= tick <= self.high * 1.001]
        # Over a narrow range, powers of ten and their halves are too far apart to read anything by.
        return ticks if len(ticks) > 2 else self._even(6)

    def _even(self, parts: int) -> list[float]:
        step = nice(self.high - self.low, parts)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, int(self.high / step + 1e-9) + 1)]


def chart(
    title: str, x: Axis, y: Axis, series: Sequence[Series], *, marks: Sequence[tuple[float, str]] = ()
) -> str:
    """A chart of lines or dots as a `<figure>`; `marks` are labelled horizontal lines."""
    dots = [dot for one in series for dot in one.dots]
    if not dots:
        return ""
    across = _scale([dot.x for dot in dots], x, LEFT, WIDTH - RIGHT)
    up = _scale([dot.y for dot in dots] + [value for value, _ in marks], y, HEIGHT - BOTTOM, TOP)
    body = [_axes(across, up, x, y)]
    for value, text in marks:
        body.append(
            f'<line class="mark" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up(value):.1f}" y2="{up(value):.1f}"/>'
        )
        where = f'x="{WIDTH - RIGHT}" y="{up(value) - 4:.1f}" text-anchor="end"'
        body.append(f'<text class="mark" {where}>{escape(text)}</text>')
    body += [_series(one, across, up) for one in series]
    return _figure(title, HEIGHT, body)


def bars(title: str, rows: Sequence[tuple[str, int, float, str]]) -> str:
    """Horizontal bars as a `<figure>`; rows are (name, colour, value, what stands beside the bar)."""
    if not rows or max(value for _, _, value, _ in rows) <= 0:
        return ""
    most, step, left, right = max(value for _, _, value, _ in rows), 34, 96, 165
    body = []
    for i, (name, color, value, text) in enumerate(rows):
        width, top = (WIDTH - left - right) * value / most, 8 + i * step
        body.append(
            f'<g class="{style(color)}" data-series="{color}" data-tip="{escape(f"{name}: {text}")}">'
            f'<text x="{left - 8}" y="{top + 16}" text-anchor="end">{escape(name)}</text>'
            f'<rect class="fill" x="{left}" y="{top}" width="{max(width, 1):.1f}" height="22" rx="3"/>'
            f'<text x="{left + width + 6:.1f}" y="{top + 16}">{escape(text)}</text></g>'
        )
    return _figure(title, 12 + len(rows) * step, body)


def style(color: int) -> str:
    """The class of a colour; beyond the last they begin again."""
    return "sx" if color == OTHER else f"s{color % COLORS}"


def marker(color: int, x: float, y: float) -> str:
    """The path of a marker; they differ in shape as well as in colour."""
    return _MARKERS[color % len(_MARKERS)](x, y)


def nice(span: float, parts: int) -> float:
    """1, 2 or 5 times a power of ten, so that about `parts` of them make `span`."""
    raw = span / parts
    power = 10 ** math.floor(math.log10(raw))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= raw * 0.999)


def short(value: float) -> str:
    """`1.5k`, `20M`, `0.05`: a few characters for a tick."""
    for divisor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= divisor:
            return f"{value / divisor:.4g}{suffix}"
    return f"{value:.4g}"


def _scale(values: Sequence[float], axis: Axis, start: float, end: float) -> Scale:
    if axis.log:
        positive = [value for value in values if value > 0] or [1.0]
        low, high = min(positive), max(positive)
        margin = max((high / low) ** 0.06, 1.1)
        return Scale(low / margin, high * margin, True, start, end)
    low, high = 0.0 if axis.zero else min(values), axis.top or max(values)
    if high <= low:
        high = low + 1
    margin = (high - low) * 0.06
    return Scale(low - margin * (low != 0), high + margin * (axis.top is None), False, start, end)


def _axes(across: Scale, up: Scale, x: Axis, y: Axis) -> str:
    parts = []
    for tick in up.ticks():
        at = f"{up(tick):.1f}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{up(tick) + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    bottom = HEIGHT - BOTTOM
    for tick in across.ticks():
        at = f"{across(tick):.1f}"
        parts.append(f'<line class="axis" x1="{at}" x2="{at}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(f'<text x="{at}" y="{bottom + 17}" text-anchor="middle">{short(tick)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text class="name" x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x.title)}</text>'
    )
    turned = f'transform="translate(14 {(TOP + bottom) / 2}) rotate(-90)" text-anchor="middle"'
    parts.append(f'<text class="name" {turned}>{escape(y.title)}</text>')
    return "".join(parts)


def _series(one: Series, across: Scale, up: Scale) -> str:
    places = [(across(dot.x), up(dot.y), dot) for dot in one.dots]
    parts = []
    if one.line and len(places) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in places)
        parts.append(f'<polyline points="{path}"/>')
    for x, y, dot in places:
        if dot.tip:
            parts.append(f'<path class="fill" d="{marker(one.color, x, y)}" data-tip="{escape(dot.tip)}"/>')
        if dot.label:
            end = x > WIDTH * 0.8
            anchor = f'x="{x - 9 if end else x + 9:.1f}" text-anchor="{"end" if end else "start"}"'
            parts.append(f'<text {anchor} y="{y + 4:.1f}">{escape(dot.label)}</text>')
    return f'<g class="{style(one.color)}" data-series="{one.color}">{"".join(parts)}</g>'


def _figure(title: str, height: int, body: Sequence[str]) -> str:
    svg = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">{"".join(body)}</svg>'
    return f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>"


def _circle(x: float, y: float) -> str:
    return f"M{x - 5:.1f},{y:.1f}a5,5 0 1,0 10,0a5,5 0 1,0 -10,0z"


def _square(x: float, y: float) -> str:
    return f"M{x - 4.5:.1f},{y - 4.5:.1f}h9v9h-9z"


def _triangle(x: float, y: float) -> str:
    return f"M{x:.1f},{y - 6:.1f}l5.5,10h-11z"


def _diamond(x: float, y: float) -> str:
    return f"M{x:.1f},{y - 6:.1f}l6,6l-6,6l-6,-6z"


_MARKERS: tuple[Callable[[float, float], str], ...] = (_circle, _square, _triangle, _diamond)
