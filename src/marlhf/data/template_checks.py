"""Checks a run's chat templates: the date they see, and whether they keep answers intact."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

from marlhf.common.chat_templates import begins, fix_date, left_out, prompt_left_out, uses_date
from marlhf.common.errors import UserError, one_line
from marlhf.common.paths import text_file
from marlhf.common.tokenization import Tokenizer
from marlhf.config import EvaluateConfig, PPOConfig, RewardConfig, SFTConfig
from marlhf.config.loading import read_yaml
from marlhf.data.conversations import Messages
from marlhf.data.prompts import Prompt, apply_template, kind_of, render
from marlhf.distributed import Distributed
from marlhf.rewards import CombinedReward
from marlhf.rewards.learned import RewardModel, reward_texts, with_completion
from marlhf.rewards.segments import models_inside

Config = TypeVar("Config", EvaluateConfig, PPOConfig, RewardConfig, SFTConfig)

_TOOLS = re.compile(r"\btools\b")
_PLAIN = "This is the answer."
_THOUGHTS = ("<think>\nThis is a thought.\n</think>\n\n", "This is a thought.\n</think>\n\n")

REPEATED = "the conversation holds the prompt's own turns, which are taken once"
LEFT_OUT = "the chat template leaves out a part of the answer"
TURN_LEFT_OUT = "the chat template leaves out a turn of the prompt"
TOOLS_IGNORED = (
    "the column 'tools' is not given to the chat template, which could list them; describe them in "
    "a system turn"
)


class RowNotes:
    """Collects findings about rows: a line per kind, with the first row and a count.

    earlier   `facts` of other notes, to merge
    """

    def __init__(self, earlier: Iterable[Sequence[Any]] = ()) -> None:
        self._kinds: dict[str, list[Any]] = {}  # kind: [first row, its example, rows, last row]
        for kind, row, example, count, last in earlier:
            known = self._kinds.setdefault(kind, [row, example, 0, ""])
            known[2:] = [known[2] + count, last]

    def add(self, kind: str, row: str, example: str = "") -> None:
        """Add a row to a kind, with an example of the text concerned.

        All findings of one row must be added before the next row.
        """
        known = self._kinds.setdefault(kind, [row, example, 0, ""])
        known[2:] = [known[2] + (known[3] != row), row]

    def add_if(self, kind: str, row: str, seen: str | bool) -> None:
        """Add a row to a kind if `seen`, which may be the example."""
        if seen:
            self.add(kind, row, seen if isinstance(seen, str) else "")

    def facts(self) -> list[list[Any]]:
        """All findings as plain data."""
        return [[kind, *known] for kind, known in self._kinds.items()]

    def lines(self) -> list[str]:
        """One line per kind."""
        texts = []
        for kind, (row, example, count, _) in self._kinds.items():
            more = f" (and {count - 1} more rows)" if count > 1 else ""
            texts.append(
                f"{row}{more}: {kind}{f': {one_line(repr(example), 80)}' if example else ''}"
            )
        return texts


def with_template_date(
    config: Config,
    tokenizers: Iterable[Any],
    distributed: Distributed,
    reward: CombinedReward | None = None,
) -> Config:
    """Fix the date that chat templates see, in the tokenizers and in the returned configuration.

    Reward models' tokenizers are included. The configuration changes only where a chat template
    uses the date.
    """
    tokenizers = [*tokenizers, *(reward_tokenizers(reward) if reward is not None else ())]
    # a rank whose tokenizer differs must not miss a collective; it is refused later
    uses = distributed.gather_objects([any(map(uses_date, tokenizers))])
    config = dated(config, distributed) if any(uses) else config
    for tokenizer in tokenizers:
        fix_date(tokenizer, config.data.template_date)
    return config


def dated(config: Config, distributed: Distributed) -> Config:
    """The configuration with the date that chat templates see.

    It is the configured date; else that of the resumed run or completed evaluation; else today.
    """
    day: str | None = date.today().isoformat()
    recorded = _recorded(config)
    if recorded is not None:  # that of an older version may have none
        day = recorded.get("template_date")
    (day, *_) = distributed.gather_objects([day])
    if config.data.template_date is not None:
        return config
    changes: Any = {"data": replace(config.data, template_date=day)}
    return replace(config, **changes)


def _recorded(config: Any) -> dict[str, Any] | None:
    """The data section of the resumed run; None for a new one.

    None too where it makes no sense: damaged files are reported elsewhere.
    """
    resume = getattr(config, "resume", "auto")  # an evaluation always completes a present one
    if resume is None or config.overwrite:
        return None
    try:
        if resume == "auto":
            recorded = read_yaml(Path(config.output_dir) / "config.yaml")
        else:
            manifest = text_file(Path(resume) / "manifest.json", "resume")
            recorded = json.loads(manifest.read_text(encoding="utf-8"))["facts"]["config"]
        date.fromisoformat(recorded["data"].get("template_date") or "2000-01-01")
        return recorded["data"]
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None


def reward_tokenizers(reward: CombinedReward) -> list[Any]:
    """Tokenizers of all reward models."""
    return [model.tokenizer for _, model in models_inside(reward)]


def strip_bos_for_rewards(reward: CombinedReward, policy: Any) -> None:
    """Have reward models with other tokens strip a policy's BOS; `policy` is its tokenizer."""
    for _, model in models_inside(reward):
        model.strip_bos_of(policy)


def template_notes(
    reward: CombinedReward,
    prompts: Sequence[Prompt],
    policy: Any,
) -> list[str]:
    """Lines about chat templates that leave out or change what they are given.

    One conversation per kind goes through the policy's chat template, and through a reward model's
    with several kinds of answers; where the two are the same, prompt and answer must come out
    unchanged. A line too where add_generation_prompt adds nothing.

    policy   its tokenizer

    Raises UserError, naming the row, where a template refuses.
    """
    kinds = {kind_of(p): p for p in reversed(prompts) if p.messages is not None}
    all_notes = [
        *_prompt_notes(policy, [*reversed(kinds.values())]),
        generation_prompt_note(policy, [prompt.messages for prompt in prompts]),
    ]
    for name, model in models_inside(reward) if kinds else ():
        notes = []
        for prompt in reversed(kinds.values()):
            label = f"reward {name}: {prompt.where}"
            notes += _notes(model, prompt, render(prompt, policy), policy, label)
        all_notes += [f"reward {name}: {note}" for note in notes[:1]]
    return [line for line in all_notes if line is not None]


def _prompt_notes(policy: Tokenizer, prompts: Iterable[Prompt]) -> list[str]:
    """Lines about the first conversations of which the policy's chat template omits something."""
    omissions: dict[str, str] = {}
    for prompt in prompts:
        assert prompt.messages is not None
        where = f"model.chat_template: {prompt.where}"
        if lost := prompt_left_out(prompt.messages, render(prompt, policy)):
            omissions.setdefault(
                TURN_LEFT_OUT, f"{where}: {TURN_LEFT_OUT}: {one_line(repr(lost), 80)}"
            )
        if ignores_tools(policy, prompt.columns):
            omissions.setdefault(TOOLS_IGNORED, f"{where}: {TOOLS_IGNORED}")
    return list(omissions.values())


def ignores_tools(tokenizer: Tokenizer, row: Mapping[str, Any]) -> bool:
    """Whether a row has tools that the chat template could list, but is not given."""
    return bool(row.get("tools")) and bool(_TOOLS.search(str(tokenizer.chat_template)))


def _notes(model: RewardModel, prompt: Prompt, text: str, policy: Any, where: str) -> list[str]:
    """Changes that a reward model's template makes to a prompt's answers, omissions first."""
    if not model.tokenizer.chat_template:
        return []
    is_open = text.rstrip().endswith("<think>")
    answers = [_PLAIN, *(thought + _PLAIN for thought in _THOUGHTS[is_open:])]
    many = len(answers)
    try:
        texts, _ = reward_texts(model.tokenizer, [text] * many, answers, [prompt.messages] * many)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    losses, changes = [], []
    for answer, rendered in zip(answers, texts, strict=True):
        expected = text + answer
        if lost := left_out(answer, rendered):
            losses.append(
                f"its chat template leaves out {lost!r} of {answer!r}, so that it scores other "
                "text than the policy writes"
            )
        elif model.tokenizer.chat_template == policy.chat_template and not begins(
            rendered, expected
        ):
            changes.append(
                f"the chat template, which is the policy's, gives it {rendered[-80:]!r} where the "
                f"policy read and wrote {expected[-80:]!r}"
            )
    return losses + changes


def generation_prompt_note(tokenizer: Tokenizer, prompts: Iterable[Messages | None]) -> str | None:
    """A line where the chat template's generation prompt is empty but answers have a header.

    The policy then has to write the header itself.
    """
    messages = next((m for m in prompts if m and m[-1]["role"] != "assistant"), None)
    if messages is None:
        return None
    before = apply_template(messages, tokenizer, for_answer=True)
    if before != apply_template(messages, tokenizer):
        return None
    after = apply_template(with_completion(messages, _PLAIN), tokenizer)
    header = after[len(before) :].partition(_PLAIN)[0] if after.startswith(before) else ""
    if not header.strip():
        return None
    return (
        "model.chat_template: add_generation_prompt adds nothing, so that the model itself has to "
        f"write the {one_line(repr(header), 60)} before its answer, and rewards read it"
    )
