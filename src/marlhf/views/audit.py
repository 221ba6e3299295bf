"""An audit in a terminal, and as a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from marlhf.common.errors import printable
from marlhf.views.charts import (
    Curve,
    Interval,
    LineChart,
    interval_chart,
    legend,
    line_chart,
)
from marlhf.views.html_page import escape, html_table, page, tag
from marlhf.views.replay import Replay, response_html
from marlhf.views.terminal import print_table

Numbers = Mapping[str, Any]

_ARM_HEADS = ("arm", "rank", "finest", "noise scale")
_VALUE_HEADS = ("values of", "bias", "error", "explained")
_POSITION_HEADS = ("before token", "truth", "critic", "bias", "error")
_ARMS_NOTE = (
    "rank: correlation of an arm's advantages with the truth, corrected for the truth's own noise; "
    "finest: between all prefixes continued, comparable between segmenters; noise scale: "
    "prompts in a batch whose policy gradient has as much signal as noise"
)
_VALUES_NOTE = (
    "error: root mean square; explained: share of the truth's variance, bias aside; both without "
    "the truth's own noise"
)


def show(numbers: Numbers, console: Console) -> None:
    """Print the audit's tables."""
    console.print(Text(printable(_about(numbers))))
    print_table(console, _ARM_HEADS, _arm_rows(numbers))
    console.print(Text(_ARMS_NOTE, style="dim"))
    if rows := _value_rows(numbers):
        print_table(console, _VALUE_HEADS, rows)
        console.print(Text(_VALUES_NOTE, style="dim"))
    if numbers["critic"] is not None:
        console.print(Text(printable(_verdict(numbers)), style="bold"))
        print_table(console, _POSITION_HEADS, _position_rows(numbers))
    for note in numbers["notes"]:
        console.print(Text(printable(note)))


def audit_page(numbers: Numbers, replay: Replay, responses: int = 3) -> str:
    """HTML of an audit; `replay` holds the truth and the arms."""
    body = [tag("h1", "Credit, audited"), tag("p", escape(_about(numbers)), class_="lead")]
    body += [tag("p", escape(note), class_="muted") for note in numbers["notes"]]
    body.append(tag("h2", "Advantages"))
    body.append(_table(_ARM_HEADS, _arm_rows(numbers)))
    body.append(tag("p", escape(_ARMS_NOTE + "."), class_="muted prose"))
    body.append(_agreement_charts(numbers))
    body.append(tag("h2", "Values"))
    if rows := _value_rows(numbers):
        body.append(_table(_VALUE_HEADS, rows))
        body.append(tag("p", escape(_VALUES_NOTE + "."), class_="muted prose"))
    if numbers["critic"] is not None:
        body.append(tag("p", escape(_verdict(numbers))))
    body.append(_position_chart(numbers))
    if numbers["critic"] is not None:
        body.append(_table(_POSITION_HEADS, _position_rows(numbers)))
    body.append(tag("h2", "Responses"))
    lead = (
        "Those first on which the arms differ most from the truth. Blue tokens are reinforced, red "
        "ones discouraged; a bar begins each macro action. Point at one, or touch it, for its "
        "numbers."
    )
    body.append(tag("p", escape(lead), class_="muted prose"))
    body += [response_html(replay, i) for i in replay.order[:responses]]
    return page("Credit, audited", "\n".join(body))


def _about(numbers: Numbers) -> str:
    data = numbers["data"]
    prompts = "held-out prompts" if data is None else f"prompts of {data}"
    return (
        f"{numbers['run']}, update {numbers['step']}: {numbers['responses']} responses to "
        f"{numbers['prompts']} {prompts}; the truth is the mean of {numbers['continuations']} "
        f"continuations of each of {numbers['prefixes']} prefixes "
        f"({numbers['distinct_prefixes']} distinct). Intervals are 95%, by bootstrap over prompts."
    )


def _verdict(numbers: Numbers) -> str:
    path = numbers["critic_path"]
    critic = "The critic" if path is None else f"The critic {path}"
    return f"{critic}: {numbers['critic']['verdict']}."


def _arm_rows(numbers: Numbers) -> list[tuple[str, ...]]:
    of_truth = numbers["truth"]["gradient"]["noise_scale"]
    rows = [("the truth", "", "", _estimate(of_truth, "no signal seen", ".3g"))]
    return rows + [
        (
            arm["label"],
            _agreement(arm["rank"]),
            _agreement(arm["finest"]),
            _estimate(arm["gradient"]["noise_scale"], "no signal seen", ".3g"),
        )
        for arm in numbers["arms"]
    ]


def _agreement(numbers: Numbers) -> str:
    is_too_noisy = numbers["measured"] is not None and numbers["reliability"] is None
    return _estimate(numbers["corrected"], "truth too noisy" if is_too_noisy else "-")


def _value_rows(numbers: Numbers) -> list[tuple[str, ...]]:
    of_arms = [(arm["label"], arm["values"]) for arm in numbers["arms"]]
    rows = [("critic, per token", numbers["critic"]), *of_arms]
    return [
        (
            label,
            _estimate(values["bias"], "-", ".2g", signed=True),
            _estimate(values["error"], "-", ".2g"),
            _estimate(values["explained"], "-", ".2f"),
        )
        for label, values in rows
        if values is not None
    ]


def _position_rows(numbers: Numbers) -> list[tuple[str, ...]]:
    return [
        (
            str(row["first"]) if row["first"] == row["last"] else f"{row['first']}-{row['last']}",
            _estimate(row["truth"], "-", ".2g"),
            _decimal(row["critic"]["value"], ".2g"),
            _estimate(row["bias"], "-", ".2g", signed=True),
            _estimate(row["error"], "-", ".2g"),
        )
        for row in numbers["by_position"]
    ]


def _estimate(
    estimate: Numbers | None, undefined: str, form: str = ".2f", signed: bool = False
) -> str:
    """`0.62 [0.51, 0.70]`; an interval without an end has ∞ there."""
    if estimate is None:
        return undefined
    form = f"+{form}" if signed else form
    text = _decimal(estimate["value"], form)
    low, high = estimate["low"], estimate["high"]
    if low is None:
        return text
    ends = _decimal(low, form), "∞" if high is None else _decimal(high, form)
    return f"{text} [{ends[0]}, {ends[1]}]"


def _decimal(value: float, form: str) -> str:
    """A number, without an exponent up to a million."""
    if form.endswith("g") and 1 <= abs(value) < 1e6:
        digits = max(0, int(form[-2]) - len(str(int(abs(value)))))
        return format(value, f"{form[:-3]}.{digits}f")
    text = format(value, form.replace(".", "#.") if form.endswith("g") else form)
    return text.replace("-", "") if set(text) <= set("-0.") else text


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return html_table(heads, [[escape(cell) for cell in row] for row in rows])


def _agreement_charts(numbers: Numbers) -> str:
    arms = [(i, arm) for i, arm in enumerate(numbers["arms"])]
    figures = []
    for name, title, low in (
        ("rank", "Rank correlation with the truth (1 is perfect, 0 none)", -1.0),
        ("finest", "Rank agreement between all prefixes continued", -1.0),
        ("sign", "Same sign as the truth (share; a coin has 0.5)", 0.0),
    ):
        rows = [
            Interval(arm["label"], x["value"], x["low"], x["high"], i)
            for i, arm in arms
            if (x := arm[name]["corrected"]) is not None
        ]
        if rows:
            chart = interval_chart(rows, "corrected for the truth's noise", low, 1.0)
            caption = tag("figcaption", escape(title))
            figures.append(tag("figure", caption + chart, class_="card"))
    labels = [(arm["label"], i) for i, arm in arms]
    return legend(labels) + tag("div", "".join(figures), class_="charts")


def _position_chart(numbers: Numbers) -> str:
    rows = numbers["by_position"]
    lines = []
    for index, name in enumerate(("truth", "critic")):
        points = [(row["position"], row[name]) for row in rows if row.get(name) is not None]
        if not points:
            continue
        x, y = [p for p, _ in points], [e["value"] for _, e in points]
        has_band = all(e["low"] is not None for _, e in points)
        low = [e["low"] for _, e in points] if has_band else None
        high = [e["high"] for _, e in points] if has_band else None
        lines.append(Curve(name, index, x, y, low, high))
    if not lines:
        return ""
    chart = LineChart("Value", "tokens before", lines, dots=True)
    caption = tag("figcaption", "Mean value of prefixes by position, with 95% intervals")
    shown = legend([(line.label, line.index) for line in lines]) + line_chart(chart)
    return tag("div", tag("figure", caption + shown, class_="card"), class_="charts")
