"""The credit of a rollout under several settings, in a terminal and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor

from marlhf.algorithm.experience import MacroBatch
from marlhf.common.errors import printable
from marlhf.common.tokenization import Tokenizer
from marlhf.runs.rollouts import KeptRollout
from marlhf.views.charts import number
from marlhf.views.html_page import escape, html_table, json_attribute, page, tag, token_html
from marlhf.views.terminal import macro_pieces, print_table, visible

_HEADS = ("arm", "macro actions", "tokens each", "advantages", "same sign", "correlation", "weight")
_FULL = 2.5  # standard deviations of an advantage that has the full colour


@dataclass(frozen=True)
class Arm:
    """The credit of all responses under one configuration."""

    label: str
    batch: MacroBatch


@dataclass(frozen=True)
class Replay:
    """A rollout with the credit of several arms; the first is the run's own.

    pieces       text of each token of each response
    order        responses, those first on which the arms differ most
    difference   [B] largest distance of an arm's advantages to the first's, in its deviations
    """

    kept: KeptRollout
    arms: Sequence[Arm]
    pieces: list[list[str]]
    order: list[int]
    difference: list[float]
    step: int

    @staticmethod
    def of(kept: KeptRollout, arms: Sequence[Arm], tokenizer: Tokenizer, step: int) -> Replay:
        """Decode the responses, and order them by what the arms disagree on."""
        responses, mask = kept.responses(tokenizer), kept.tensors["response_mask"]
        pieces = [
            macro_pieces(text, offsets, [True] * len(offsets))
            for text, offsets in zip(responses.texts, responses.offsets, strict=True)
        ]
        scaled = [_scaled(arm.batch.advantages_BT, mask) for arm in arms]
        apart = torch.zeros(len(mask))
        for other in scaled[1:]:
            apart = torch.maximum(apart, (other - scaled[0]).abs().amax(1).float())
        order = apart.argsort(descending=True, stable=True).tolist()
        return Replay(kept, arms, pieces, order, apart.tolist(), step)

    @property
    def mask(self) -> Tensor:
        """[B,T] bool: the tokens of the responses."""
        return self.kept.tensors["response_mask"]

    def summary(self) -> list[tuple[str, ...]]:
        """A row per arm, see `_HEADS`; agreement with the first arm is over tokens."""
        first = self.arms[0].batch.advantages_BT[self.mask]
        rows = []
        for arm in self.arms:
            batch, of_tokens = arm.batch, arm.batch.advantages_BT[self.mask]
            macro = batch.advantages_BM[batch.mask_BM]
            weights = batch.weights_BT
            rows.append(
                (
                    arm.label,
                    f"{int(batch.mask_BM.sum())}",
                    f"{float(batch.lengths_BM[batch.mask_BM].double().mean()):.2f}",
                    f"{float(macro.mean()):+.3f} ± {float(macro.double().std(correction=0)):.3g}",
                    f"{float((of_tokens.sign() == first.sign()).double().mean()):.0%}",
                    _correlation(of_tokens, first),
                    "1" if weights is None else f"{float(weights[self.mask].mean()):.2f}",
                )
            )
        return rows


def _scaled(advantages: Tensor, mask: Tensor) -> Tensor:
    """Advantages in standard deviations over the tokens, so that arms compare."""
    deviation = advantages[mask].double().std(correction=0)
    return advantages.double() / (deviation if deviation > 0 else 1.0)


def _correlation(x: Tensor, y: Tensor) -> str:
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    scale = float(x.norm() * y.norm())
    return "-" if scale == 0 else f"{float(x @ y) / scale:.2f}"


def show(replay: Replay, console: Console, responses: int) -> None:
    """Print the arms' summary, then responses with each arm's advantages."""
    print_table(console, _HEADS, replay.summary())
    for i in replay.order[:responses]:
        score = float(replay.kept.tensors["scores"][i])
        title = f"response {i}, score {score:.3g}, arms differ by {replay.difference[i]:.2g}"
        console.rule(title, align="left", style="dim")
        for arm in replay.arms:
            console.print(Text(printable(arm.label), style="bold"))
            line = Text()
            for tokens, advantage, strength in _macro_actions(replay, arm, i):
                text = visible("".join(replay.pieces[i][t] for t in tokens), "⏎")
                colour = "green" if advantage > 0 else "red"
                weight = "bold " if strength > 0.5 else "dim " if strength < 0.1 else ""
                line.append(printable(text), style=f"{weight}{colour}")
                line.append(f" {advantage:+.2f} ", style="dim")
            console.print(line, soft_wrap=not console.is_terminal)


def replay_page(replay: Replay, responses: int) -> str:
    """HTML of the arms' summary and of responses, every token coloured by its advantage."""
    rows = [[escape(cell) for cell in row] for row in replay.summary()]
    lead = (
        f"Update {replay.step}, {len(replay.mask)} responses, those first on which the arms "
        "differ most. Blue tokens are reinforced, red ones discouraged; a bar begins each macro "
        "action. Point at one, or touch it, for its numbers."
    )
    body = [tag("h1", "Credit, replayed"), tag("p", escape(lead), class_="lead")]
    body.append(html_table(_HEADS, rows))
    body += [response_html(replay, i) for i in replay.order[:responses]]
    return page("Credit, replayed", "\n".join(body))


def response_html(replay: Replay, i: int) -> str:
    """HTML of a response under every arm, with its prompt."""
    score = float(replay.kept.tensors["scores"][i])
    prompt = replay.kept.facts["prompt_texts"][i]
    facts = f"score {number(score)}, arms differ by up to {replay.difference[i]:.2g}"
    columns = [
        tag("section", tag("h3", escape(arm.label)) + _response(replay, arm, i), class_="card")
        for arm in replay.arms
    ]
    parts = [
        tag("h2", escape(f"Response {i}")),
        tag("p", escape(f"{facts} standard deviations of an advantage"), class_="muted"),
        tag("details", tag("summary", "prompt") + tag("p", escape(prompt), class_="text")),
        tag("div", "".join(columns), class_="columns"),
    ]
    return "\n".join(parts)


def _response(replay: Replay, arm: Arm, i: int) -> str:
    spans = []
    for k, (tokens, advantage, strength) in enumerate(_macro_actions(replay, arm, i)):
        batch = arm.batch
        lines = [
            f"macro action {k + 1} of {int(batch.mask_BM[i].sum())}, {len(tokens)} tokens",
            f"advantage {advantage:+.4g}",
        ]
        for name, x in (("value", batch.values_BM), ("return", batch.returns_BM)):
            if x is not None:
                lines.append(f"{name} {float(x[i, k]):.4g}")
        rewards = replay.kept.tensors["task_rewards"][i, tokens.start : tokens.stop]
        lines.append(f"task reward {float(rewards.sum()):.4g}")
        if batch.weights_BT is not None:
            lines.append(f"weight {float(batch.weights_BT[i, tokens.start]):.3g}")
        text = "".join(token_html(replay.pieces[i][t]) for t in tokens)
        spans.append(
            tag(
                "span",
                text,
                class_="m credit " + ("up" if advantage > 0 else "down"),
                data_tip=json_attribute(lines),
                style=f"--s:{min(strength, 1):.2f}",
            )
        )
    return tag("p", "".join(spans), class_="text")


def _macro_actions(replay: Replay, arm: Arm, i: int) -> list[tuple[range, float, float]]:
    """`(tokens, advantage, share of the full colour)` of each macro action of response i."""
    ids = arm.batch.segment_ids[i].tolist()
    length = int(replay.mask[i].sum())
    begins = [t for t in range(length) if t == 0 or ids[t] != ids[t - 1]]
    macro = arm.batch.advantages_BM
    deviation = float(macro[arm.batch.mask_BM].double().std(correction=0)) or 1.0
    macro_actions = []
    for k, (start, stop) in enumerate(pairwise([*begins, length])):
        advantage = float(macro[i, k])
        macro_actions.append((range(start, stop), advantage, abs(advantage) / deviation / _FULL))
    return macro_actions
