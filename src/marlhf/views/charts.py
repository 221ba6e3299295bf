"""Charts as inline SVG.

Colours, dashes and markers are classes of `assets/page.css`, so that a chart follows the theme of
its page; series differ in dashes and markers too, not only in colour. Sizes are in CSS pixels for
a chart 360 pixels wide, about its width on the page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from marlhf.views.html_page import escape, tag

WIDTH, HEIGHT = 360, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 8, 10, 34

MOST = 24  # bars of a histogram


def histogram(
    counts: Mapping[int, float], x_label: str, y_label: str, largest: int | None = None
) -> str:
    """A bar for each of 1, 2, ... `largest` (default: the largest of `counts`).

    Lengths of MOST and more share the last bar. Charts to be compared need the same `largest`.
    """
    top = min(max(counts, default=1) if largest is None else max(largest, 1), MOST)
    heights = [counts.get(n, 0) for n in range(1, top + 1)]
    heights[-1] += sum(k for n, k in counts.items() if n > top)
    scale = Scale.over([0, max(heights)], HEIGHT - _BOTTOM, _TOP, from_zero=True, integers=True)
    step = (WIDTH - _LEFT - _RIGHT) / top
    bars = []
    for i, height in enumerate(heights):
        y = scale(height)
        name = f"{i + 1}{' or more' if i + 1 == MOST else ''}: {number(height)}"
        bars.append(
            tag(
                "rect",
                tag("title", escape(name)),
                class_="bar",
                x=f"{_LEFT + i * step + 0.08 * step:.1f}",
                y=f"{y:.1f}",
                width=f"{0.84 * step:.1f}",
                height=f"{scale(0) - y:.1f}",
            )
        )
    every = max(1, math.ceil(top / 12))
    marks = [
        (_LEFT + (n - 0.5) * step, f"{n}{'+' if n == MOST else ''}")
        for n in range(1, top + 1)
        if n % every == 0 or n == 1
    ]
    return svg(frame(marks, scale.marks(), x_label, y_label) + "".join(bars), y_label)


class Scale:
    """A linear map from numbers to pixels, with round numbers as marks."""

    def __init__(self, low: float, high: float, start: float, end: float, step: float) -> None:
        self.low, self.high, self.start, self.end, self.step = low, high, start, end, step

    @staticmethod
    def over(
        values: Sequence[float],
        start: float,
        end: float,
        from_zero: bool = False,
        integers: bool = False,
        tight: bool = False,
        count: int = 5,
    ) -> Scale:
        """A scale over all of `values`, with about `count` round numbers.

        integers   marks are integers
        tight      the scale ends at the extreme values, not at round numbers
        """
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        if from_zero:
            low, high = min(low, 0.0), max(high, 0.0)
        if high - low <= max(1e-9 * max(abs(low), abs(high)), 1e-300):
            low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
            low = max(low, 0.0) if from_zero else low
        step = round_step((high - low) / count)
        step = max(1.0, step) if integers else step
        if tight:
            return Scale(low, high, start, end, step)
        return Scale(
            math.floor(low / step + 1e-9) * step,
            math.ceil(high / step - 1e-9) * step,
            start,
            end,
            step,
        )

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def described(self) -> str:
        """The scale for a script: lowest and highest number, and their pixels."""
        return " ".join(f"{x:.8g}" for x in (self.low, self.high, self.start, self.end))

    def marks(self) -> list[tuple[float, str]]:
        """Position and label of every round number."""
        first = math.ceil(self.low / self.step - 1e-9)
        count = math.floor(self.high / self.step + 1e-9) - first
        digits = max(0, -math.floor(math.log10(self.step) + 1e-9))
        values = [(first + i) * self.step for i in range(count + 1)]
        biggest = max(abs(self.low), abs(self.high))
        plain = self.step >= 1e-4 and biggest < 1e6
        form = f".{digits}f" if plain else ".3g"
        return [(self(v), format(0.0 if abs(v) < self.step / 2 else v, form)) for v in values]


def round_step(rough: float) -> float:
    """The smallest of 1, 2, 5, 10, 20, ... (and 0.5, 0.2, ...) that is at least `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))


def frame(
    x_marks: Sequence[tuple[float, str]],
    y_marks: Sequence[tuple[float, str]],
    x_label: str,
    y_label: str,
) -> str:
    """Grid, numbers on the axes, and the label of the x axis."""
    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    parts = []
    for y, label in y_marks:
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{right}"/>')
        parts.append(tag("text", escape(label), x=_LEFT - 5, y=f"{y + 3.5:.1f}", text_anchor="end"))
    parts.append(f'<path class="axis" d="M{_LEFT} {bottom}H{right}"/>')
    parts += [
        tag("text", escape(label), x=f"{x:.1f}", y=bottom + 14, text_anchor="middle")
        for x, label in x_marks
    ]
    middle = (_LEFT + right) / 2
    parts.append(
        tag("text", escape(x_label), class_="label", x=middle, y=HEIGHT - 4, text_anchor="middle")
    )
    return "".join(parts)


def svg(content: str, name: str, **attributes: str) -> str:
    """An SVG element that scales with its container's width."""
    return tag(
        "svg", content, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=name, **attributes
    )


def number(value: float) -> str:
    """A number for people: three significant digits; no decimals from 1000 on."""
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


@dataclass(frozen=True)
class Curve:
    """A series: points in order, and the edges of a band around them, if any.

    index    chooses colour, dashes and marker
    """

    label: str
    index: int
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


@dataclass(frozen=True)
class LineChart:
    """Lines over an axis. `dots` marks every point, not only a few per line."""

    title: str
    x_label: str
    lines: Sequence[Curve]
    dots: bool = False
    from_zero: bool = False

    @property
    def has_integer_x(self) -> bool:
        """Whether all x values are integers, as updates are."""
        return all(float(x).is_integer() for line in self.lines for x in line.x)


@dataclass(frozen=True)
class Interval:
    """A number with its interval, if it has one; `index` as in `Curve`."""

    label: str
    value: float
    low: float | None
    high: float | None
    index: int


def interval_chart(rows: Sequence[Interval], x_label: str, low: float, high: float) -> str:
    """Numbers under each other with their intervals, on an axis from `low` to `high`.

    What lies beyond the axis is drawn at its end.
    """
    scale = Scale.over([low, high], _LEFT, WIDTH - _RIGHT, tight=True)
    step = (HEIGHT - _TOP - _BOTTOM) / max(len(rows), 1)

    def at(value: float) -> float:
        return scale(min(max(value, low), high))

    parts = [frame(scale.marks(), [], x_label, "")]
    parts += [
        f'<path class="grid" d="M{x:.1f} {_TOP}V{HEIGHT - _BOTTOM}"/>' for x, _ in scale.marks()
    ]
    for i, row in enumerate(rows):
        y = _TOP + (i + 0.5) * step
        about = f"{row.label}: {number(row.value)}"
        line = ""
        if row.low is not None and row.high is not None:
            about += f" [{number(row.low)}, {number(row.high)}]"
            ends = f"M{at(row.low):.1f} {y:.1f}H{at(row.high):.1f}"
            line = f'<path class="line s{row.index % STYLES}" d="{ends}"/>'
        name = tag("title", escape(about))
        parts.append(tag("g", name + line + marker(row.index, at(row.value), y)))
    return svg("".join(parts), x_label)


STYLES = 8  # colours, dashes and markers of series


def shape(index: int) -> int:
    """Index of a series' marker: its colour's, or another once colours repeat."""
    return (index + index // STYLES) % STYLES


def line_chart(chart: LineChart, **attributes: str) -> str:
    """Lines with some markers; a script reads values off the scales in the SVG."""
    drawn = [line for line in chart.lines if len(line.x)]
    xs = [x for line in drawn for x in line.x]
    ys = [y for line in drawn for values in (line.y, line.low, line.high) for y in values or ()]
    x_scale = Scale.over(
        xs, _LEFT + 4, WIDTH - _RIGHT - 4, integers=chart.has_integer_x, tight=True
    )
    y_scale = Scale.over(ys, HEIGHT - _BOTTOM, _TOP, from_zero=chart.from_zero)
    x_marks = x_scale.marks()
    parts = [frame(x_marks, y_scale.marks(), chart.x_label, chart.title)]
    for line in drawn:
        if line.low and line.high:
            edge = [*zip(line.x, line.high, strict=True)]
            edge += [*zip(line.x, line.low, strict=True)][::-1]
            parts.append(
                f'<path class="band s{line.index % STYLES}" d="{_path(edge, x_scale, y_scale)}Z"/>'
            )
    for line in drawn:
        points = [*zip(line.x, line.y, strict=True)]
        name = f"s{line.index % STYLES}"
        parts.append(
            tag(
                "path",
                class_=f"line {name}",
                d=_path(points, x_scale, y_scale),
                data_label=line.label,
            )
        )
        every = 1 if chart.dots else max(1, len(points) // 6)
        begin = 0 if chart.dots else (line.index * 2) % every
        parts += [
            marker(line.index, x_scale(x), y_scale(y)) for x, y in [*points[begin::every]][:200]
        ]
    scales = {f"data_{n}": s.described() for n, s in (("x", x_scale), ("y", y_scale))}
    return svg("".join(parts), chart.title, data_x_label=chart.x_label, **scales, **attributes)


def _path(points: Sequence[tuple[float, float]], x_scale: Scale, y_scale: Scale) -> str:
    return "M" + "L".join(f"{x_scale(x):.1f} {y_scale(y):.1f}" for x, y in points)


def marker(index: int, x: float, y: float) -> str:
    """One of eight shapes, filled with the colour of its series."""
    shapes = (
        "M-3.4 0a3.4 3.4 0 1 0 6.8 0a3.4 3.4 0 1 0 -6.8 0Z",  # circle
        "M-3 -3H3V3H-3Z",  # square
        "M0 -4L3.8 2.8H-3.8Z",  # triangle
        "M0 -4.3L4.3 0L0 4.3L-4.3 0Z",  # diamond
        "M0 4L3.8 -2.8H-3.8Z",  # triangle, point down
        "M-3.6 -1.3H-1.3V-3.6H1.3V-1.3H3.6V1.3H1.3V3.6H-1.3V1.3H-3.6Z",  # plus
        "M-4 0L-1.2 -1.2L0 -4L1.2 -1.2L4 0L1.2 1.2L0 4L-1.2 1.2Z",  # star
        "M-4.2 -1.8H4.2V1.8H-4.2Z",  # bar
    )
    return (
        f'<path class="mark s{index % STYLES}" transform="translate({x:.1f} {y:.1f})" '
        f'd="{shapes[shape(index)]}"/>'
    )


def legend(labels: Sequence[tuple[str, int]]) -> str:
    """Labels next to a sample of each line."""
    items = [
        tag(
            "li",
            f'<svg class="swatch" viewBox="0 0 34 12" aria-hidden="true">'
            f'<path class="line s{index % STYLES}" d="M1 6H33"/>{marker(index, 17, 6)}</svg>'
            + escape(label),
        )
        for label, index in labels
    ]
    return tag("ul", "".join(items), class_="legend")
