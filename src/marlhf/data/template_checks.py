"""Checks a run's chat templates: the date they see, and whether they keep answers intact."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import yaml

from marlhf.common.chat_templates import begins, fix_date, left_out, uses_date
from marlhf.common.errors import UserError, one_line
from marlhf.config import DataSettings, EvaluateConfig, PPOConfig, RewardConfig, SFTConfig
from marlhf.data.conversations import Messages
from marlhf.data.prompts import Prompt, apply_template, chat_of, render
from marlhf.distributed import Distributed
from marlhf.rewards import CombinedReward
from marlhf.rewards.learned import RewardModel, reward_texts, with_completion
from marlhf.rewards.segments import models_inside

Config = TypeVar("Config", EvaluateConfig, PPOConfig, RewardConfig, SFTConfig)

_PLAIN = "This is the answer."
_THOUGHTS = ("<think>\nThis is a thought.\n</think>\n\n", "This is a thought.\n</think>\n\n")

REPEATED = "the conversation begins with the prompt's own turns, which are taken once"
LEFT_OUT = "the chat template leaves out a part of the answer"


class RowNotes:
    """Collects findings about rows: a line per kind, with the first row and a count."""

    def __init__(self) -> None:
        self._rows: dict[str, list[tuple[str, str]]] = {}

    def add(self, kind: str, row: str, example: str = "") -> None:
        """Add a row to a kind; `example` is the text found there."""
        self._rows.setdefault(kind, []).append((row, example))

    def add_if(self, kind: str, row: str, seen: str | bool) -> None:
        """Add a row to a kind if `seen`; where that is text, it is the example."""
        if seen:
            self.add(kind, row, seen if isinstance(seen, str) else "")

    def lines(self) -> list[str]:
        """One line per kind."""
        found = []
        for kind, rows in self._rows.items():
            row, example = rows[0]
            others = len({name for name, _ in rows}) - 1
            more = f" (and {others} more rows)" if others else ""
            found.append(
                f"{row}{more}: {kind}{f': {one_line(repr(example), 80)}' if example else ''}"
            )
        return found


def with_date(
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
    config = dated(config, distributed) if any(map(uses_date, tokenizers)) else config
    for tokenizer in tokenizers:
        fix_date(tokenizer, config.data.template_date)
    return config


def dated(config: Config, distributed: Distributed) -> Config:
    """The configuration with the date that chat templates see.

    It is the one given; else that of the resumed run or completed evaluation; else today.
    """
    if config.data.template_date is not None:
        return config
    recorded, day = _recorded(config), date.today().isoformat()
    if recorded is not None:  # that of an older version may have none
        day = recorded.get("data", {}).get("template_date")
    (day, *_) = distributed.gather_objects([day])
    changes: Any = {"data": replace(config.data, template_date=day)}
    return replace(config, **changes)


def _recorded(config: Any) -> dict[str, Any] | None:
    """The configuration of the resumed run; None for a new one.

    None too where it cannot be read: unreadable files are reported elsewhere.
    """
    resume = getattr(config, "resume", "auto")  # an evaluation always completes a present one
    if resume is None or config.overwrite:
        return None
    try:
        if resume != "auto":
            manifest = Path(resume).expanduser() / "manifest.json"
            return json.loads(manifest.read_text(encoding="utf-8"))["config"]
        file = Path(config.output_dir).expanduser() / "config.yaml"
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, yaml.YAMLError):
        return None


def reward_tokenizers(reward: CombinedReward) -> list[Any]:
    """Tokenizers of all reward models."""
    return [model.tokenizer for _, model in models_inside(reward)]


def template_notes(
    reward: CombinedReward,
    prompts: Sequence[Prompt],
    policy: Any,
    settings: DataSettings,
) -> list[str]:
    """A line per chat template that changes the policy's text for a reward model.

    One conversation per sequence of roles goes through a reward model's chat template, with
    several kinds of answers; where it is the policy's template, prompt and answer must come out
    unchanged. A line too where add_generation_prompt adds nothing.

    policy   its tokenizer

    Raises UserError, naming the row, where a template refuses.
    """
    chats = [chat_of(prompt, settings) for prompt in prompts]
    found = [generation_prompt_note(policy, chats)]
    kinds = {
        tuple(turn["role"] for turn in prompt.messages): prompt
        for prompt in reversed(prompts)
        if prompt.messages is not None
    }
    for name, model in models_inside(reward) if kinds else ():
        notes = []
        for prompt in reversed(kinds.values()):
            label = f"reward {name}: {prompt.where}"
            notes += _notes(model, prompt, render(prompt, policy, settings), policy, label)
        found += [f"reward {name}: {note}" for note in notes[:1]]
    return [line for line in found if line is not None]


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
        wanted = text + answer
        if lost := left_out(answer, rendered):
            losses.append(
                f"its chat template leaves out {lost!r} of {answer!r}, so that it scores other "
                "text than the policy writes"
            )
        elif model.tokenizer.chat_template == policy.chat_template and not begins(rendered, wanted):
            changes.append(
                f"the chat template, which is the policy's, gives it {rendered[-80:]!r} where the "
                f"policy read and wrote {wanted[-80:]!r}"
            )
    return losses + changes


def generation_prompt_note(tokenizer: Any, prompts: Iterable[Messages | None]) -> str | None:
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
