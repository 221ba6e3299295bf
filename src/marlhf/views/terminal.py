"""Terminal views: coloured macro actions, before/after summary; and the learning curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from marlhf.common.errors import UserError, printable
from marlhf.runs.alarms import finite

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Black on backgrounds of the Okabe-Ito palette, legible on dark and light terminals. Light and
# dark alternate, so that neighbours differ by more than their hue.
_STYLES = (
    "black on #56b4e9",
    "black on #f0e442",
    "black on #cc79a7",
    "black on #dddddd",
)
_LABEL = 16  # width that long labels of a table get at least
_TRAINING, _HELD_OUT = "#0072b2", "#d55e00"


def macro_pieces(
    text: str, offsets: Sequence[tuple[int, int]], starts: Sequence[bool]
) -> list[str]:
    """Split a response into the text of each macro action, one per True in `starts`.

    text     a decoded response
    offsets  half-open character span in `text` of each of its tokens
    starts   for each of these tokens, whether a macro action starts there

    The pieces joined are `text`. A character made of tokens of several macro actions goes to the
    first of them; a macro action without characters (special tokens) is an empty piece.
    """
    cuts = []
    written = 0
    for (begin, end), start in zip(offsets, starts, strict=True):
        if start:
            cuts.append(max(begin, written))
        written = max(written, end)
    if not cuts:
        if text:
            raise ValueError("starts: no macro action starts in a response that has text")
        return []
    return [text[a:b] for a, b in pairwise([0, *cuts[1:], len(text)])]


def colour_macro_actions(
    pieces: Sequence[str], console: Console | None = None, line_break: str = "⏎"
) -> Text:
    """Join the pieces in alternating colours, safe for colour blindness.

    Where `console` (default: standard output) shows no colour, as in a pipe or with NO_COLOR set,
    `|` separates macro actions. `line_break` replaces line breaks, and � any other control
    character, which might command the terminal.
    """
    visible_pieces = [visible(piece, line_break) for piece in pieces if piece]
    if not has_colour(console or Console()):
        return Text("|".join(visible_pieces))
    styled = ((piece, _STYLES[i % len(_STYLES)]) for i, piece in enumerate(visible_pieces))
    return Text.assemble(*styled)


def has_colour(console: Console) -> bool:
    return console.color_system is not None and not console.no_color


def visible(text: str, line_break: str = "⏎") -> str:
    """Text without control characters and bidi marks, except for those in `line_break`."""
    text = text.replace("\r\n", "\n").replace("\t", "  ")
    return printable(text, "\n").replace("\n", line_break)


def print_table(console: Console, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table whose numbers and heads are never cut; its first column is folded.

    Heads wider than their cells are written in several lines. Where labels would have too little
    room beside the numbers, intervals `[0.1, 0.2]` get lines of their own.
    """
    columns = [[printable(row[i]) for row in rows] for i in range(len(heads))]
    heads = [
        head.replace(" ", "\n") if len(head) > _width(cells) else head
        for head, cells in zip(heads, columns, strict=True)
    ]

    def room() -> int:  # two spaces between columns
        of_numbers = zip(heads[1:], columns[1:], strict=True)
        return console.width - sum(_width([head, *cells]) + 2 for head, cells in of_numbers)

    label = _width([heads[0], *columns[0]])
    least = min(label, _LABEL)
    if room() < least:
        columns[1:] = [[cell.replace(" [", "\n[") for cell in cells] for cells in columns[1:]]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    table.add_column(heads[0], overflow="fold", width=min(label, max(least, room())))
    for head in heads[1:]:
        table.add_column(head, justify="right", no_wrap=True)
    for row in zip(*columns, strict=True):
        table.add_row(*map(Text, row))
    console.print()
    console.print(table)


def _width(cells: Sequence[str]) -> int:
    return max((cell_len(line) for cell in cells for line in cell.split("\n")), default=0)


@dataclass(frozen=True)
class BeforeAfter:
    """One prompt answered before and after training.

    before, after              the response as macro actions, see `macro_pieces`
    score_before, score_after  its score by the reward
    """

    prompt: str
    before: Sequence[str]
    after: Sequence[str]
    score_before: float | None = None
    score_after: float | None = None


def before_after_panel(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    samples: Sequence[BeforeAfter],
    console: Console | None = None,
) -> Group:
    """Held-out score and KL before and after training, and samples with macro actions.

    before, after   rows of metrics with `eval_score_mean` and `eval_kl_mean`; a missing or null
                    value is shown as a dash
    """
    console = console or Console()
    coloured = has_colour(console)
    rows = (
        ("score, mean", "eval_score_mean"),
        ("KL to the start, nats per response", "eval_kl_mean"),
    )
    table = Table(box=box.SIMPLE_HEAD, title="On held-out prompts", title_justify="left")
    table.add_column("")
    for heading in ("before", "after", "change"):
        table.add_column(heading, justify="right")
    for label, key in rows:
        old, new = finite(before.get(key)), finite(after.get(key))
        change = None if old is None or new is None else new - old
        table.add_row(label, _decimal(old), _decimal(new), _decimal(change, "+.3f"))
    marked = "are runs of one colour" if coloured else "are separated by |"
    title = f"Samples; macro actions {marked}"
    answers = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    answers.add_column("")
    answers.add_column("score", justify="right")
    answers.add_column("prompt and response", ratio=1)
    for sample in samples:
        for label, pieces, score in (
            ("before", sample.before, sample.score_before),
            ("after", sample.after, sample.score_after),
        ):
            prompt = Text(visible(sample.prompt), style="bold")
            border = "" if coloured else "|"
            line = Text.assemble(prompt, border, colour_macro_actions(pieces, console))
            answers.add_row(label, _decimal(finite(score)), line, end_section=label == "after")
    return Group(table, answers) if samples else Group(table)


def _decimal(value: float | None, form: str = ".3f") -> str:
    return "–" if value is None else format(value, form)


def plot_reward_kl(metrics: Sequence[Mapping[str, Any]], path: str | Path, title: str) -> None:
    """Draw score and KL over the updates as a PNG of 900 x 750 pixels.

    metrics   rows of metrics.jsonl: `score_mean` and `kl_mean` of an update, `eval_score_mean` and
              `eval_kl_mean` on held-out prompts; missing, null and non-finite values are left out

    Raises UserError if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise UserError("plots need matplotlib: pip install marlhf[demo]") from error

    # Without pyplot: no global state, and no search for a display.
    figure = Figure(figsize=(7.2, 6.0), dpi=125, layout="constrained")
    score, kl = figure.subplots(2, 1, sharex=True)
    figure.suptitle(title, fontsize=12)
    _panel(score, metrics, "score_mean", "eval_score_mean")
    score.set_ylabel("score\n(mean over responses)")
    _panel(kl, metrics, "kl_mean", "eval_kl_mean")
    kl.set_ylabel("KL to the reference\n(nats per response)")
    kl.set_xlabel("PPO update")
    kl.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles, labels = score.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def _panel(axes: Axes, metrics: Sequence[Mapping[str, Any]], train: str, held_out: str) -> None:
    x, y = _series(metrics, train)
    axes.plot(x, y, color=_TRAINING, linewidth=1.5, marker=".", label="training batch")
    x, y = _series(metrics, held_out)
    axes.plot(
        x,
        y,
        color=_HELD_OUT,
        linestyle="--",
        linewidth=1.2,
        marker="D",
        markersize=7,
        label="held-out prompts",
    )
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _series(metrics: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Updates and values of a metric, without missing values."""
    points = [(finite(row.get("step", i)), finite(row.get(key))) for i, row in enumerate(metrics)]
    drawable = [(x, y) for x, y in points if x is not None and y is not None]
    return [x for x, _ in drawable], [y for _, y in drawable]
