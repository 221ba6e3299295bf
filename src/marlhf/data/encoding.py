"""Tokenises prompts and truncates them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from marlhf.common.errors import UserError
from marlhf.common.tokenization import encode_texts
from marlhf.config import DataSettings, RolloutSettings
from marlhf.data.prompts import Prompt, excerpt, render


def check_prompts(
    prompts: Sequence[Prompt],
    tokenizer: Any,
    settings: DataSettings | None = None,
    rollout: RolloutSettings | None = None,
    positions: int | None = None,
) -> None:
    """Check that prompts can be rendered, and that they and their responses fit the model.

    One prompt per sequence of roles is rendered, so that a missing or unsuitable chat template is
    found before training. The longest prompt and its response must fit into `positions`. Raises
    UserError.
    """
    seen = set()
    for prompt in prompts:
        roles = prompt.messages and tuple(m["role"] for m in prompt.messages)
        if roles not in seen:
            seen.add(roles)
            encode([render(prompt, tokenizer, settings)], tokenizer, 2, special=roles is None)
    if rollout is None or positions is None:
        return
    limit, new = rollout.max_prompt_length, rollout.max_new_tokens
    if limit + new <= positions:
        return
    texts = [render(prompt, tokenizer, settings) for prompt in prompts]
    ids, _ = encode(texts, tokenizer, limit, [prompt.messages is None for prompt in prompts])
    longest = max(map(len, ids), default=0)
    if longest + new > positions:
        raise UserError(
            f"rollout.max_new_tokens: given {new}, and the longest prompt has {longest} tokens "
            f"(rollout.max_prompt_length={limit}); together they must not exceed the {positions} "
            "positions of the model"
        )


def encode(
    texts: Sequence[str],
    tokenizer: Any,
    max_length: int,
    special: bool | Sequence[bool] = True,
) -> tuple[list[list[int]], list[bool]]:
    """`(token ids of each text, whether it was truncated)`.

    A text of more than `max_length` tokens keeps its last ones, and BOS before them where it
    starts with BOS: many models degrade without it.

    special: let the tokenizer add the special tokens at the start of a text; False for texts from
        a chat template, which contain them. See `encode_texts`.

    An empty text becomes BOS. Raises UserError where the tokenizer has none.
    """
    flags = [special] * len(texts) if isinstance(special, bool) else list(special)
    rows = encode_texts(tokenizer, texts, flags)
    encoded = [row or _bos(text, tokenizer) for row, text in zip(rows, texts, strict=True)]
    return (
        [shortened(row, max_length, tokenizer.bos_token_id) for row in encoded],
        [len(row) > max_length for row in encoded],
    )


def shortened(ids: list[int], max_length: int, bos: int | None) -> list[int]:
    """Truncate ids on the left to `max_length`, keeping a BOS at the start."""
    if len(ids) <= max_length:
        return ids
    if bos is not None and ids[0] == bos and max_length > 1:
        return [bos, *ids[1 - max_length :]]
    return ids[-max_length:]


def _bos(text: str, tokenizer: Any) -> list[int]:
    """BOS, for a text of no tokens. Raises UserError where the tokenizer has none."""
    if tokenizer.bos_token_id is None:
        raise UserError(
            f"the prompt {excerpt(text)} has no tokens, and the tokenizer has no BOS token"
        )
    return [tokenizer.bos_token_id]
