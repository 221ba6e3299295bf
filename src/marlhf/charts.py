"""Charts as inline SVG. Colours, dashes and markers are classes of `assets/page.css`, so that a
chart follows the theme of its page; a series is told apart by its dashes and markers too.

Sizes are in CSS pixels of a chart that is 360 wide, which is about how wide it is shown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from marlhf.page import tag, text

WIDTH, HEIGHT = 360, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 8, 10, 34


MOST = 24  # bars of a histogram


def histogram(
    counts: Mapping[int, float], x_label: str, y_label: str, largest: int | None = None
) -> str:
    """Bars for 1, 2, 3, ... to `largest` (default: of `counts`); from MOST on they share the last.

    Give charts that are compared the same `largest`.
    """
    top = min(max(counts, default=1) if largest is None else max(largest, 1), MOST)
    heights = [counts.get(n, 0) for n in range(1, top + 1)]
    heights[-1] += sum(k for n, k in counts.items() if n > top)
    scale = Scale.over([0, max(heights)], HEIGHT - _BOTTOM, _TOP, from_zero=True, whole=True)
    step = (WIDTH - _LEFT - _RIGHT) / top
    bars = []
    for i, height in enumerate(heights):
        y = scale(height)
        name = f"{i + 1}{' or more' if i + 1 == MOST else ''}: {number(height)}"
        bars.append(
            tag(
                "rect",
                tag("title", text(name)),
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
    return svg(frame(marks, scale.marks(), x_label, y_label) + "".join(bars), f"{y_label}")


class Scale:
    """Numbers -> pixels, between round numbers."""

    def __init__(self, low: float, high: float, start: float, end: float, step: float) -> None:
        self.low, self.high, self.start, self.end, self.step = low, high, start, end, step

    @staticmethod
    def over(
        values: Sequence[float],
        start: float,
        end: float,
        from_zero: bool = False,
        whole: bool = False,
        count: int = 5,
    ) -> Scale:
        """A scale that shows all of `values`, with about `count` round numbers on it, which are
        whole if asked for."""
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        if from_zero:
            low, high = min(low, 0.0), max(high, 0.0)
        if high - low <= 1e-9 * max(abs(low), abs(high)):
            low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
            low = max(low, 0.0) if from_zero else low
        step = round_step((high - low) / count)
        step = max(1.0, step) if whole else step
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

    def marks(self) -> list[tuple[float, str]]:
        """Position and label of every round number."""
        count = round((self.high - self.low) / self.step)
        digits = max(0, -math.floor(math.log10(self.step) + 1e-9))
        values = [self.low + i * self.step for i in range(count + 1)]
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
    """Grid, numbers on the axes, and what the axes show."""
    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    parts = []
    for y, label in y_marks:
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{right}"/>')
        parts.append(tag("text", text(label), x=_LEFT - 5, y=f"{y + 3.5:.1f}", text_anchor="end"))
    parts.append(f'<path class="axis" d="M{_LEFT} {bottom}H{right}"/>')
    parts += [
        tag("text", text(label), x=f"{x:.1f}", y=bottom + 14, text_anchor="middle")
        for x, label in x_marks
    ]
    middle = (_LEFT + right) / 2
    parts.append(
        tag("text", text(x_label), class_="label", x=middle, y=HEIGHT - 4, text_anchor="middle")
    )
    return "".join(parts)


def svg(content: str, name: str, **attributes: str) -> str:
    """The drawing, which scales with the width it is given."""
    return tag(
        "svg", content, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=name, **attributes
    )


def number(value: float) -> str:
    """A number for people: three significant digits, thousands whole."""
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
