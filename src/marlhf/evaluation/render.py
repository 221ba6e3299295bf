"""Results as tables, for the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from marlhf.common.errors import printable


@dataclass(frozen=True)
class Table:
    """A title, headings, and rows of cells; the first column is text, all others numbers."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


def tables(results: Mapping[str, Any]) -> list[Table]:
    """Every table of an evaluation; intervals are 95%, over prompts."""
    policies = results["policies"]
    several = len({entry["temperature"] for entry in policies}) > 1
    names = [_name(entry, several) for entry in policies]
    metrics = [
        [label, *(_cell(entry["metrics"][label]) for entry in policies)]
        for label in policies[0]["metrics"]
    ]
    metrics += [
        [f"distinct_{n} of all", *(_number(entry["distinct"][n]) for entry in policies)]
        for n in policies[0]["distinct"]
    ]
    rendered = [Table(f"Means over {results['prompts']} prompts", ["", *names], metrics)]
    for key, title in (("pass_at_k", "pass@k"), ("best_of_n", "Score of the best of n")):
        if key in policies[0]:
            rows = [[k, *(_point(entry[key][k]) for entry in policies)] for k in policies[0][key]]
            rendered.append(Table(title, [title[-1], *names], rows))
    comparisons = results["comparisons"]
    if not comparisons:
        return rendered
    names = [_name(entry, several) for entry in comparisons]
    baseline = comparisons[0]["baseline"]
    rows = [
        [label, *(_cell(entry["differences"][label], "+.3f") for entry in comparisons)]
        for label in comparisons[0]["differences"]
    ]
    rendered.append(Table(f"Difference to {baseline}, paired", ["", *names], rows))
    rows = [
        [
            name,
            measure,
            _cell(won["rate"]),
            *(str(won[k]) for k in ("wins", "ties", "losses")),
            _out(won),
        ]
        for name, entry in zip(names, comparisons, strict=True)
        for measure, won in entry["win_rates"].items()
    ]
    headings = ["policy", "by", "win rate", "wins", "ties", "losses", "left out"]
    if rows:
        rendered.append(Table(f"Win rates against {baseline}, a tie counts half", headings, rows))
    return rendered


def show(results: Mapping[str, Any], console: Console) -> None:
    """Print every table."""
    for table in tables(results):
        rich_table = RichTable(box=box.SIMPLE_HEAD, title=_text(table.title), title_justify="left")
        for i, heading in enumerate(table.headings):
            rich_table.add_column(_text(heading), justify="right" if i else "left")
        for row in table.rows:
            rich_table.add_row(*map(_text, row))
        console.print(rich_table)


def _text(cell: str) -> Text:
    """A cell without markup or terminal commands, which a policy's name may contain."""
    return Text(printable(cell))


def markdown(results: Mapping[str, Any]) -> str:
    """All tables in Markdown, after the models and settings behind them."""
    parts = ["# Evaluation", ""]
    parts += [f"- {label}: {path}" for label, path in results["models"].items()]
    if results["reference"] is not None:
        parts.append(f"- KL is measured to {results['reference']}")
    parts += [
        f"- {results['responses_per_prompt']} responses to each of {results['prompts']} prompts, "
        f"seed {results['seed']}",
        f"- in brackets: 95% bootstrap intervals, {results['resamples']} resamples of the prompts",
        *_judge_lines(results),
        "",
    ]
    for table in tables(results):
        align = ["---", *["---:"] * (len(table.headings) - 1)]
        rows = [table.headings, align, *table.rows]
        lines = ("| " + " | ".join(map(_escaped, row)) + " |" for row in rows)
        parts += [f"## {table.title}", "", *lines, ""]
    return "\n".join(parts)


def _judge_lines(results: Mapping[str, Any]) -> list[str]:
    judge = results.get("judge")
    if judge is None:
        return []
    return [
        f"- judge: {judge['model']}, task {judge['task']}; {judge['answers']} answers, "
        f"{judge['tokens_in']} tokens read, {judge['tokens_out']} written"
        + ("" if judge["cost"] is None else f", cost {judge['cost']:.4f}")
    ]


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")


def _name(entry: Mapping[str, Any], several: bool) -> str:
    return f"{entry['policy']} @ {entry['temperature']:g}" if several else entry["policy"]


def _point(entry: Mapping[str, Any] | None) -> str:
    """Cell of a point: the estimate of pass@k, or that of the score for best-of-n."""
    return _cell(entry["score"] if entry is not None and "score" in entry else entry)


def _cell(estimate: Mapping[str, Any] | None, form: str = ".3f") -> str:
    if estimate is None:
        return "–"
    if estimate["low"] is None:
        return format(estimate["mean"], form)
    low, high = (format(estimate[key], form) for key in ("low", "high"))
    return f"{estimate['mean']:{form}} [{low}, {high}]"


def _out(won: Mapping[str, Any]) -> str:
    """Counts of pairs that the win rate leaves out."""
    return "; ".join(f"{won[key]} {key}" for key in ("invalid", "unanswered") if won.get(key))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
