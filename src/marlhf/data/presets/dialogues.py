"""`Dahoas/full-hh-rlhf`: assistant dialogues with preferences between two answers (Bai et al.
2022, arXiv 2204.05862)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from marlhf.data.files import Files, Row
from marlhf.data.presets.base import Example, RowError, Source, value

_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


@dataclass(frozen=True)
class FullHHRLHF:
    """Dialogues, each prompt being the dialogue so far with the dataset's "Human:", "Assistant:".

    Rows are often later turns of one dialogue; all with the same first turn are one document.
    Prompts have the column `reference`, the preferred answer.
    """

    source: ClassVar[Source] = Source(
        "Dahoas/full-hh-rlhf", Files(columns=("prompt", "chosen", "rejected")), eval_split="test"
    )

    def __call__(self, row: Row) -> Example:
        prompt = value(row, "prompt", str)
        chosen, rejected = value(row, "chosen", str), value(row, "rejected", str)
        first_turn = prompt.partition(_ASSISTANT)[0].removeprefix(_HUMAN)
        if not first_turn.strip():
            raise RowError("prompt is empty")
        return Example(prompt, (chosen,), (chosen, rejected), {"reference": chosen}, first_turn)
