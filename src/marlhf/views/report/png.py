"""The charts of a report as PNGs, for slides and papers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marlhf.common.errors import UserError
from marlhf.views.charts import STYLES, LineChart, shape
from marlhf.views.report.figures import frontier, macro_lengths, sections
from marlhf.views.report.groups import Group

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The light theme of assets/page.css, with the shapes that matplotlib has.
_COLOURS = "#0072b2 #c24a00 #007a59 #a3477f #8a6a00 #2b83ba #5b5b5b #7a3cc2".split()
_MARKERS = "o s ^ D v P * _".split()
_DASHES: list[Any] = [
    "-",
    "--",
    "-.",
    ":",
    (0, (5, 1)),
    (0, (3, 1, 1, 1)),
    (0, (1, 1)),
    (0, (8, 3)),
]


def write_pngs(groups: Sequence[Group], folder: Path) -> list[Path]:
    """Write one PNG per chart, by update and (if the name says so) by seconds.

    Raises UserError if matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise UserError("PNGs need matplotlib: pip install 'marlhf[demo]'") from error
    written = []
    for figures in sections(groups).values():
        for figure in figures:
            name = "".join(c if c.isalnum() or c in "-_." else "_" for c in figure.name[:200])
            written.append(save(draw(figure.by_update), folder / f"{name}.png"))
            if figure.name in ("eval_score_mean", "score_mean"):
                path = folder / f"{name}_by_seconds.png"
                written.append(save(draw(figure.by_seconds), path))
    if (chart := frontier(groups)) is not None:
        written.append(save(draw(chart), folder / "frontier.png"))
    if any(macro_lengths(group)[0] for group in groups):
        written.append(save(_draw_lengths(groups), folder / "macro_lengths.png"))
    return written


def new_figure() -> tuple[Figure, Any]:
    """An empty figure and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), dpi=150, layout="constrained")  # no pyplot: no display
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw(chart: LineChart) -> Figure:
    """Draw a chart; its lines differ in colour, dashes and markers."""
    figure, axes = new_figure()
    for line in chart.lines:
        if not line.x:
            continue
        i = line.index % STYLES
        every = 1 if chart.dots else max(1, len(line.x) // 6)
        axes.plot(
            line.x,
            line.y,
            color=_COLOURS[i],
            linestyle=_DASHES[i],
            marker=_MARKERS[shape(line.index)],
            markevery=every,
            markersize=5,
            linewidth=1.6,
            label=_plain(line.label),
        )
        if line.low and line.high:
            axes.fill_between(line.x, line.low, line.high, color=_COLOURS[i], alpha=0.15, lw=0)
    if chart.has_integer_x:
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel(_plain(chart.x_label))
    axes.set_title(_plain(chart.title), loc="left", fontsize=11)
    if len(chart.lines) > 1:
        figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def _draw_lengths(groups: Sequence[Group]) -> Figure:
    figure, axes = new_figure()
    for group in groups:
        lengths, _ = macro_lengths(group)
        if lengths:
            i = group.index % STYLES
            x = list(range(1, max(lengths) + 1))
            shares = [lengths[n] / lengths.total() for n in x]
            axes.plot(x, shares, color=_COLOURS[i], linestyle=_DASHES[i],
                      marker=_MARKERS[shape(group.index)], label=_plain(group.label),
                      drawstyle="steps-mid")  # fmt: skip
    axes.set_xlabel("tokens in a macro action")
    axes.set_title("Share of macro actions", loc="left", fontsize=11)
    if len(groups) > 1:
        figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def _plain(label: str) -> str:
    """Escape a label: matplotlib reads $ as math and hides labels that begin with _."""
    return label.replace("$", r"\$").lstrip("_")


def save(figure: Figure, path: Path) -> Path:
    """Write the figure; returns its path."""
    figure.savefig(path)
    return path
