"""The reward of the study's task on long responses: an opening in the first person.

    python scripts/study/sentiment_task.py     # unpacks the model that both tasks start from

SmolLM2-135M writes 128 tokens. The reward, given once, after the last of them, is how often the
first 150 characters, about 35 tokens, say I, me or my: 5 times give 1. Three quarters of the tokens
have no part in it, and those that have are 93 to 128 tokens before it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

OPENING = 150  # characters
ENOUGH = 5  # words
FIRST_PERSON = re.compile(r"\b(?:I|me|my)\b")


def first_person(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    """How much of a completion's opening is in the first person, 0 to 1."""
    counts = [len(FIRST_PERSON.findall(text[:OPENING])) for text in completions]
    return [min(count, ENOUGH) / ENOUGH for count in counts]
