"""Responses to the same held-out prompts before and after training, with macro actions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from marlhf.runs.alarms import finite
from marlhf.views.charts import number
from marlhf.views.html_page import escape, json_attribute, tag, token_html, visible_html
from marlhf.views.report.runs import Run

_PROMPTS = 4
_LONG_PROMPT = 240  # characters; the beginning of a longer prompt is folded

SampleLine = dict[str, Any]


def before_after(run: Run) -> str:
    """HTML of a run's first and last held-out responses to each prompt.

    Training responses of its last update follow. With fewer than two evaluations, a line names the
    settings that evaluate.
    """
    held_out = [s for s in run.samples if s.get("held_out") is True and _usable(s)]
    updates = sorted({s["step"] for s in held_out})
    parts = []
    if len(updates) > 1:
        first = {repr(s.get("row")): s for s in held_out if s["step"] == updates[0]}
        last = {repr(s.get("row")): s for s in held_out if s["step"] == updates[-1]}
        pairs = [(first[row], last[row]) for row in first if row in last][:_PROMPTS]
        scale = _scale([s for pair in pairs for s in pair])
        for before, after in pairs:
            names = [f"before (update {updates[0]})", f"after (update {updates[-1]})"]
            parts.append(_prompt(before, [*zip(names, (before, after), strict=True)], scale))
    else:
        parts.append(
            tag(
                "p",
                "No held-out samples of two evaluations: set log.eval_every and log.samples.",
                class_="muted",
            )
        )
    trained = [s for s in run.samples if s.get("held_out") is False and _usable(s)]
    update = max((s["step"] for s in trained), default=0)
    recent = [s for s in trained if s["step"] == update][:_PROMPTS]
    if recent:
        scale = _scale(recent)
        inner = "".join(_prompt(s, [(f"update {update}", s)], scale) for s in recent)
        summary = tag("summary", escape(f"Training responses of update {update}"))
        parts.append(tag("details", summary + inner))
    return "".join(parts)


def _usable(sample: SampleLine) -> bool:
    pieces = sample.get("macro_actions")
    return (
        isinstance(pieces, list)
        and all(isinstance(piece, str) for piece in pieces)
        and finite(sample.get("step")) is not None
    )


def _scale(samples: Sequence[SampleLine]) -> float:
    """The largest absolute advantage, which gets the strongest shade; 1 without any."""
    return max((abs(a) for s in samples for a in _advantages(s)), default=0.0) or 1.0


def _advantages(sample: SampleLine) -> list[float]:
    """Advantages, one per macro action; empty if unknown."""
    advantages = sample.get("macro_advantages")
    if not isinstance(advantages, list) or len(advantages) != len(sample["macro_actions"]):
        return []
    numbers = [finite(a) for a in advantages]
    return [] if None in numbers else [a for a in numbers if a is not None]


def _prompt(sample: SampleLine, answers: Sequence[tuple[str, SampleLine]], scale: float) -> str:
    prompt = str(sample.get("prompt", ""))
    if len(prompt) > _LONG_PROMPT:
        beginning, ending = prompt[:-_LONG_PROMPT], prompt[-_LONG_PROMPT:]
        folded = tag("summary", "the beginning of the prompt") + tag(
            "p", visible_html(beginning), class_="text"
        )
        prompt_html = tag("details", folded) + tag("p", "…" + visible_html(ending), class_="text")
    else:
        prompt_html = tag("p", visible_html(prompt), class_="text")
    responses = "".join(_answer(label, answer, scale) for label, answer in answers)
    return tag(
        "article", tag("div", prompt_html, class_="prompt") + responses, class_="card sample"
    )


def _answer(label: str, sample: SampleLine, scale: float) -> str:
    score, kl = finite(sample.get("score")), finite(sample.get("kl"))
    facts = [label]
    facts += [f"score {number(score)}"] if score is not None else []
    facts += [f"KL {number(kl)} nats"] if kl is not None else []
    facts += ["cut at the limit"] if sample.get("finished") is False else []
    advantages = _advantages(sample)
    pieces = [
        _macro_action(sample, i, piece, advantages[i] if advantages else None, scale)
        for i, piece in enumerate(sample["macro_actions"])
    ]
    return tag("p", escape(" · ".join(facts)), class_="muted facts") + tag(
        "p", "".join(pieces), class_="text"
    )


def _macro_action(
    sample: SampleLine, index: int, piece: str, advantage: float | None, scale: float
) -> str:
    lengths = sample.get("macro_lengths")
    tip = [f"macro action {index + 1}"]
    if isinstance(lengths, list) and index < len(lengths):
        tip[0] += f", {lengths[index]} tokens"
    style, sign = None, ""
    if advantage is not None:
        tip.append(f"advantage {advantage:+.3g}")
        hue = "good" if advantage >= 0 else "bad"
        style = f"--a:rgba(var(--{hue}),{min(abs(advantage) / scale, 1) * 0.55:.2f})"
        if abs(advantage) > 0.01 * scale:
            sign = tag("sup", "+" if advantage > 0 else "−", class_="sign")
    content = token_html(piece)
    line = content.removesuffix("\n")  # the sign stays on this line
    content = line + sign + content[len(line) :]
    return tag("span", content, class_=f"a e{index % 4}", style=style, data_tip=json_attribute(tip))
