"""`openai/webgpt_comparisons`: questions, two answers each, and which one people preferred (Nakano
et al. 2021, arXiv 2112.09332)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import ClassVar

from marlhf.data.files import Files, Row
from marlhf.data.presets.base import Example, RowError, Source, value

# The released code removes all text in brackets, mostly citations such as [1].
_BRACKETED = re.compile(r" ?[(\[].*?[)\]]")


@dataclass(frozen=True)
class WebGPTComparisons:
    """Questions with a preference between two answers; a tie (equal scores) gives a prompt only.

    As in the paper, prompts do not contain the quotes that answers are based on. Prompts have the
    column `reference`, the preferred answer, or null.
    """

    source: ClassVar[Source] = Source(
        "openai/webgpt_comparisons",
        Files(
            "default",
            "refs/convert/parquet",
            ("question", "answer_0", "answer_1", "score_0", "score_1"),
        ),
    )

    def __call__(self, row: Row) -> Example:
        question = value(row, "question.full_text", str)
        if not question.strip():
            raise RowError("question.full_text is empty")
        prompt = f" Human: {question} Assistant:"
        answers = [_without_citations(value(row, f"answer_{i}", str)) for i in (0, 1)]
        scores = [value(row, f"score_{i}", (int, float)) for i in (0, 1)]
        if not all(map(math.isfinite, scores)):
            raise RowError("a score is not finite")
        if scores[0] == scores[1]:
            return Example(prompt, (), None, {"reference": None}, question)
        better = int(scores[1] > scores[0])
        pair = (answers[better], answers[1 - better])
        return Example(prompt, pair[:1], pair, {"reference": pair[0]}, question)


def _without_citations(answer: str) -> str:
    return " " + _BRACKETED.sub("", answer)
