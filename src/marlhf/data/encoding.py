"""Tokenises prompts and truncates them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from marlhf.common.errors import UserError
from marlhf.common.paths import digest_of_file, writing
from marlhf.common.tokenization import Tokenizer, encode_texts, text_start
from marlhf.config import RolloutSettings
from marlhf.data.files import Row
from marlhf.data.prompts import Prompt, excerpt, kinds_of, render, survey_of
from marlhf.data.rows import Derived, key_of
from marlhf.data.store import batched, digest_of, stored

# factor by which a normaliser can increase a text's bytes (UTF-8, the worst character)
_GROWTH = {"NoneType": 1, "NFC": 3, "NFD": 3, "NFKC": 11, "NFKD": 11}
_ADDS_SPACES = ("Metaspace", "add_prefix_space=True")


def check_prompts(
    sets: Sequence[Sequence[Prompt]],
    tokenizer: Tokenizer,
    rollout: RolloutSettings | None = None,
    positions: int | None = None,
) -> None:
    """Check that prompts can be rendered, and that they and their responses fit the model.

    One prompt per sequence of roles is rendered, so that a missing or unsuitable chat template is
    found before training. The longest prompt and its response must fit into `positions`. Raises
    UserError.
    """
    for prompt in kinds_of(*sets):
        encode([render(prompt, tokenizer)], tokenizer, 2, special=prompt.messages is None)
    if rollout is None or positions is None:
        return
    limit, new = rollout.max_prompt_length, rollout.max_new_tokens
    longest = max(_longest(prompts, tokenizer, limit, positions - new) for prompts in sets)
    if longest + new > positions:
        raise UserError(
            f"rollout.max_new_tokens: given {new}, and the longest prompt has {longest} tokens "
            f"(rollout.max_prompt_length={limit}); together they must not exceed the {positions} "
            "positions of the model"
        )


def _longest(prompts: Sequence[Prompt], tokenizer: Tokenizer, limit: int, room: int) -> int:
    """Tokens of the longest prompt, truncated to `limit`; 0 where none can exceed `room`."""
    bound = token_bound(tokenizer)
    is_text = all(prompt.messages is None for prompt in kinds_of(prompts))
    if limit <= room or (bound and is_text and bound(survey_of(prompts)["bytes"]) <= room):
        return 0

    def measure(_: object) -> dict[str, int]:
        texts = ((render(prompt, tokenizer), prompt.messages is None) for prompt in prompts)
        longest = 0
        for batch in batched(x for x in texts if bound is None or bound(_bytes(x[0])) > room):
            ids, _ = encode([text for text, _ in batch], tokenizer, limit, [s for _, s in batch])
            longest = max(longest, *map(len, ids))
        return {"tokens": longest}

    key = prompts.key if isinstance(prompts, Derived) else None
    parts = None if key is None else [key, tokenizer_key(tokenizer), limit, room]
    return stored("longest", parts, measure).facts["tokens"]


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def token_bound(tokenizer: Tokenizer) -> Callable[[int], int] | None:
    """Upper bound on a text's tokens as a function of its UTF-8 bytes; None: unknown.

    A token stands for at least one byte of the normalised text, unless the tokenizer puts spaces
    before words that have none.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    growth = _GROWTH.get(type(getattr(backend, "normalizer", None)).__name__)
    splitting = repr(getattr(backend, "pre_tokenizer", None))
    if backend is None or growth is None or any(word in splitting for word in _ADDS_SPACES):
        return None
    special = len(text_start(tokenizer))
    return lambda size: growth * size + special


def tokenizer_key(tokenizer: Any) -> str:
    """Digest of everything that a tokenizer's ids and chat template depend on."""
    kind = type(tokenizer)
    day = getattr(tokenizer, "template_date", None)
    with TemporaryDirectory() as folder:
        with writing("data", folder, "; TMPDIR names another folder for it"):
            tokenizer.save_pretrained(folder)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        contents = {str(path.relative_to(folder)): digest_of_file(path) for path in files}
    return digest_of([f"{kind.__module__}.{kind.__qualname__}", day, contents])


def tokenised_key(
    rows: Sequence[Row], tokenizer: Tokenizer, settings: Any, where: str, first_row: int
) -> list[Any] | None:
    """Key of tokenised rows in the cache; None where the rows' content has no digest.

    where, first_row   name of the data and number of its first row, in messages
    """
    if key_of(rows) is None:
        return None
    return [key_of(rows), settings, tokenizer_key(tokenizer), where, first_row]


def encode(
    texts: Sequence[str],
    tokenizer: Tokenizer,
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


def _bos(text: str, tokenizer: Tokenizer) -> list[int]:
    """BOS, for a text of no tokens. Raises UserError where the tokenizer has none."""
    if tokenizer.bos_token_id is None:
        raise UserError(
            f"the prompt {excerpt(text)} has no tokens, and the tokenizer has no BOS token"
        )
    return [tokenizer.bos_token_id]
