"""Small charts as inline SVG: no script, no font and no file of their own; the page's colours, dark and light."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 340, 200
LEFT, RIGHT, TOP, BOTTOM = 42, 10, 18, 34
"""Room around the plot, for the numbers of the axes."""
COLOURS = 5
"""Lines that differ by colour; the page's style has as many."""
MOST_POINTS = 200
"""Points of a drawn line; a longer one is drawn as means of neighbours."""
MOST_LINES = 12
"""Lines of a chart; further ones are only counted."""
MOST_DIGITS = 12
"""Of the number at a tick."""
LARGEST = 1e100
"""Values beyond are drawn as this, so that differences of them are finite."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a chart; points that are not finite are left out and break it."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    """Lower ends of an interval at each point, or none."""
    high: Sequence[float] = ()
    dashed: bool = False
    """A guide, without marks."""


@dataclass(frozen=True, slots=True)
class Chart:
    """What is drawn."""

    title: str
    lines: Sequence[Line]
    x_label: str = ""
    y_label: str = ""
    log: bool = False
    """Logarithmic vertical axis; values that are not positive are left out."""
    bottom: float | None = None
    top: float | None = None


@dataclass(frozen=True, slots=True)
class _Axis:
    """Maps values to places; `low` < `high`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        low, high, here = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (here - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        return decades(self.low, self.high) if self.log else ticks(self.low, self.high)


def figure(chart: Chart) -> str:
    """A `<figure>` with title, legend and SVG; a sentence in place of a picture where no point can be drawn."""
    lines = [_usable(thinned(line), chart.log) for line in chart.lines[:MOST_LINES]]
    title = f"<figcaption><b>{escape(chart.title)}</b>{_legend(chart)}</figcaption>"
    drawn = [pair for line in lines for pair in zip(line.x, line.y, strict=True) if not math.isnan(pair[1])]
    if not drawn:
        return f"<figure>{title}<p class=missing>Nothing that could be drawn was measured.</p></figure>"
    ends = [end for line in lines for end in (*line.low, *line.high) if math.isfinite(end)]
    x = _axis([place for place, _ in drawn], None, None, LEFT, WIDTH - RIGHT)
    y = _axis([value for _, value in drawn] + ends, chart.bottom, chart.top, HEIGHT - BOTTOM, TOP, chart.log)
    parts = [*_frame(chart, x, y)]
    for number, line in enumerate(lines):
        parts += _marks(line, f"c{number % COLOURS}", x, y)
    label = escape(f"{chart.title}: {chart.y_label or 'value'} over {chart.x_label or 'step'}")
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    return f"<figure>{title}{svg}</figure>"


def thinned(line: Line, most: int = MOST_POINTS) -> Line:
    """The line with at most `most` points, each the mean of as many neighbours."""
    size = -(-len(line.x) // most)
    if size <= 1:
        return line
    x, y, low, high = (_means(values, size) for values in (line.x, line.y, line.low, line.high))
    return Line(line.label, x, y, low, high, line.dashed)


def _means(values: Sequence[float], size: int) -> list[float]:
    """Of every `size` neighbours, over those that are finite; NaN where none is."""
    found = []
    for start in range(0, len(values), size):
        kept = [max(-LARGEST, min(LARGEST, v)) for v in values[start : start + size] if math.isfinite(v)]
        found.append(sum(kept) / len(kept) if kept else math.nan)
    return found


def _usable(line: Line, log: bool) -> Line:
    """Within what can be drawn: NaN for a point that cannot."""

    def clean(value: float) -> float:
        return max(-LARGEST, min(LARGEST, value)) if math.isfinite(value) and (value > 0 or not log) else math.nan

    y = [clean(value) if math.isfinite(place) else math.nan for place, value in zip(line.x, line.y, strict=True)]
    x = [max(-LARGEST, min(LARGEST, place)) if math.isfinite(place) else 0.0 for place in line.x]
    return Line(line.label, x, y, [clean(v) for v in line.low], [clean(v) for v in line.high], line.dashed)


def _axis(
    values: Sequence[float], low: float | None, high: float | None, start: float, end: float, log: bool = False
) -> _Axis:
    least, most = min(values), max(values)
    if log:
        least, most = least / 1.5, most * 1.5
    else:
        room = 0.06 * (most - least) or 0.5 * abs(most) or 0.5
        least, most = least - room, most + room
    least, most = (least if low is None else low), (most if high is None else high)
    if not least < most:
        most = least + 1.0 + abs(least)
    return _Axis(least, most, start, end, log)


def ticks(low: float, high: float, most: int = 4) -> list[float]:
    """At most `most` + 1 round numbers between low and high."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [(first + i) * step for i in range(most + 1) if (first + i) * step <= high + 1e-9 * step]


def decades(low: float, high: float, most: int = 5) -> list[float]:
    """Powers of ten between low and high, at most `most`; the ends where there is none."""
    first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
    every = max(1, -(-(last - first + 1) // most))
    return [10.0**power for power in range(first, last + 1, every)] or [low, high]


def text_of(value: float, digits: int = 3) -> str:
    """A number of an axis, in few characters."""
    return f"{value:.{digits}g}".replace("e+0", "e").replace("e-0", "e-").replace("e+", "e") if value else "0"


def labelled(values: Sequence[float]) -> list[tuple[float, str]]:
    """Each with its text, of as many digits as tell it from the others."""
    texts = ([text_of(value, digits) for value in values] for digits in range(3, MOST_DIGITS + 1))
    found = next((one for one in texts if len(set(one)) == len(set(values))), None)
    return list(zip(values, found or [repr(value) for value in values], strict=True))


def _frame(chart: Chart, x: _Axis, y: _Axis) -> Iterator[str]:
    right, floor = WIDTH - RIGHT, HEIGHT - BOTTOM
    for value, text in labelled(y.ticks()):
        at = y.at(value)
        if TOP - 1 <= at <= floor + 1:
            yield f'<path class="grid" d="M{LEFT} {at:.1f}H{right}"/>'
            yield f'<text x="{LEFT - 5}" y="{at + 3.5:.1f}" text-anchor="end">{text}</text>'
    for value, text in labelled(x.ticks()):
        yield f'<text x="{x.at(value):.1f}" y="{floor + 14}" text-anchor="middle">{text}</text>'
    yield f'<path class="axis" d="M{LEFT} {floor}H{right}"/>'
    yield f'<text x="{(LEFT + right) / 2:.0f}" y="{HEIGHT - 5}" text-anchor="middle">{escape(chart.x_label)}</text>'
    yield f'<text x="2" y="10">{escape(chart.y_label)}</text>'


def _marks(line: Line, colour: str, x: _Axis, y: _Axis) -> Iterator[str]:
    """A path broken where a value is missing, the interval, and marks where there are few points."""

    def places(values: Sequence[float]) -> list[tuple[float, float] | None]:
        clipped = (None if math.isnan(v) else min(max(v, y.low), y.high) for v in values)
        return [None if v is None else (x.at(at), y.at(v)) for at, v in zip(line.x, clipped, strict=True)]

    points = places(line.y)
    few = sum(point is not None for point in points) <= 25 and not line.dashed
    if line.low and line.high:
        for low, high in zip(places(line.low), places(line.high), strict=True):
            if low is not None and high is not None:
                yield f'<path class="bar {colour}" d="M{low[0]:.1f} {low[1]:.1f}V{high[1]:.1f}"/>'
    drawn, pen = "", "M"
    for point in points:
        if point is None:
            pen = "M"
            continue
        drawn += f"{pen}{point[0]:.1f} {point[1]:.1f}"
        pen = "L"
    yield f'<path class="line {colour}{" dashed" if line.dashed else ""}" d="{drawn}"/>'
    if few:
        for point in filter(None, points):
            yield f'<circle class="{colour}" cx="{point[0]:.1f}" cy="{point[1]:.1f}" r="2.4"/>'


def _legend(chart: Chart) -> str:
    if len(chart.lines) < 2:
        return ""
    shown = [
        f'<span class="key c{number % COLOURS}">{escape(line.label)}</span>'
        for number, line in enumerate(chart.lines[:MOST_LINES])
    ]
    more = len(chart.lines) - MOST_LINES
    return f"<span class=keys>{''.join(shown)}{f' and {more} more' if more > 0 else ''}</span>"
