"""The HTML page of `marlhf segment --html`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from marlhf.views.charts import histogram, number
from marlhf.views.html_page import (
    escape,
    html_table,
    json_attribute,
    macro_span,
    page,
    tag,
    token_html,
)
from marlhf.views.inspector import Segmented, Summary, summarise


def inspector_page(segmented: Sequence[Segmented], labels: Sequence[str]) -> str:
    """HTML of each text by each segmenter, with histograms of macro-action lengths."""
    summaries = [summarise(segmented, i) for i in range(len(labels))]
    tokens = sum(len(item.ids) for item in segmented)
    count = f"{len(segmented)} texts" if len(segmented) > 1 else "One text"
    with_model = any(item.logprobs is not None for item in segmented)
    hint = (
        " Runs of one background, each with a bar at its start, are macro actions; a dotted line "
        "ends a token. Point at a token, or touch it, for its place"
        + (
            " and perplexity; the redder its underline, the more it surprised the model."
            if with_model
            else "."
        )
    )
    body = [
        tag("h1", "Macro actions"),
        tag("p", escape(f"{count}, {tokens} tokens.{hint}"), class_="lead"),
        _overview(summaries, labels),
    ]
    for number_, item in enumerate(segmented, 1):
        title = f"Text {number_}" if len(segmented) > 1 else "Text"
        body.append(tag("h2", escape(title)) + _facts(item))
        columns = [
            tag("section", tag("h3", escape(label)) + _cut(item, i), class_="card")
            for i, label in enumerate(labels)
        ]
        body.append(tag("div", "".join(columns), class_="columns"))
    return page("Macro actions", "\n".join(body))


def _overview(summaries: Sequence[Summary], labels: Sequence[str]) -> str:
    heads = ("segmenter", "macro actions", "tokens each", "longest")
    rows = [
        (escape(label), number(s.count), f"{s.mean:.2f}", number(s.longest))
        for label, s in zip(labels, summaries, strict=True)
    ]
    largest = max(s.longest for s in summaries)
    charts = [
        tag(
            "figure",
            tag("figcaption", escape(label))
            + histogram(
                s.lengths, "tokens in a macro action", f"macro actions of {label}", largest
            ),
            class_="card",
        )
        for label, s in zip(labels, summaries, strict=True)
    ]
    return html_table(heads, rows) + tag("div", "".join(charts), class_="charts")


def _facts(item: Segmented) -> str:
    facts = f"{len(item.ids)} tokens"
    if item.logprobs:
        facts += f", perplexity {math.exp(-sum(item.logprobs) / len(item.logprobs)):.1f}"
    return tag("p", escape(facts), class_="muted")


def _cut(item: Segmented, segmenter: int) -> str:
    spans = []
    for index, tokens in enumerate(item.macro_actions(segmenter)):
        parts = [_token(item, t, index, tokens) for t in tokens]
        spans.append(macro_span("".join(parts), index))
    return tag("p", "".join(spans), class_="text")


def _token(item: Segmented, t: int, index: int, tokens: range) -> str:
    position = f"macro action {index + 1}, token {t - tokens.start + 1} of {len(tokens)}"
    lines = [repr(item.pieces[t]), position, f"token {t + 1} of the text, id {item.ids[t]}"]
    style = None
    if item.logprobs is not None:
        nats = -item.logprobs[t]
        lines.append(f"perplexity {math.exp(min(nats, 700)):.3g} ({nats:.2f} nats)")
        style = f"--s:{min(nats / 8, 1):.2f}"
    return tag(
        "span", token_html(item.pieces[t]), class_="t", data_tip=json_attribute(lines), style=style
    )
