"""The laws of segmenters and rewards hold for those built in, and mistakes are each caught."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiny_models import byte_tokenizer
from torch import Tensor

from marlhf.common.errors import UserError
from marlhf.testing import check_reward, check_segmenter


@pytest.mark.parametrize(
    "spec",
    ["token", {"name": "ngram", "n": 3}, "sequence", "perplexity", "word", "sentence", "line",
     "entropy_jump", "random_ngram", {"name": "union", "of": ["sentence", "line"]}],
)  # fmt: skip
def test_the_built_in_segmenters_obey_every_law(spec: Any) -> None:
    check_segmenter(spec, byte_tokenizer())


def starts(batch: Any) -> Tensor:
    found = torch.zeros_like(batch.response_mask)
    found[:, 0] = batch.response_mask[:, 0]
    return found


def middle_of_the_batch(batch: Any) -> Tensor:
    found = starts(batch)
    middle = batch.response_mask.shape[1] // 2
    found[:, middle] |= batch.response_mask[:, middle]
    return found


def after_the_longest(batch: Any) -> Tensor:
    found = starts(batch)
    found[0] = batch.response_mask[0]
    return found


def second_token_of_a_wide_batch(batch: Any) -> Tensor:
    """Where the batch is ten tokens wide or more."""
    marked = starts(batch)
    if batch.response_mask.shape[1] >= 10:
        marked[:, 1] = batch.response_mask[:, 1]
    return marked


def likelier_than_the_mean(batch: Any) -> Tensor:
    return (starts(batch) | (batch.logprobs > batch.logprobs.mean())) & batch.response_mask


def at_random(batch: Any) -> Tensor:
    return (starts(batch) | (torch.rand(batch.response_mask.shape) < 0.5)) & batch.response_mask


@pytest.mark.parametrize(
    ("wrong", "law"),
    [
        (middle_of_the_batch, "padding: three more tokens"),
        (after_the_longest, "company: "),
        (second_token_of_a_wide_batch, "company: a response alone"),
        (likelier_than_the_mean, "padding: "),
        (at_random, "repetition: "),
    ],
)
def test_wrong_segmenters_are_caught(wrong: Any, law: str) -> None:
    with pytest.raises(AssertionError, match=law):
        check_segmenter(wrong, byte_tokenizer())
    check_segmenter(wrong, byte_tokenizer(), stateful=True)


def test_a_segmenter_that_breaks_the_contract_is_refused() -> None:
    with pytest.raises(UserError, match="is not a start"):
        check_segmenter(lambda batch: torch.zeros_like(batch.response_mask), byte_tokenizer())


class Counts:
    """Remembers how often it was called."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, prompts: list[str], completions: list[str]) -> list[float]:
        self.calls += 1
        return [float(self.calls)] * len(completions)


def of_the_first_prompt(prompts: list[str], completions: list[str]) -> list[float]:
    return [float(sum(map(ord, prompts[0])))] * len(completions)


def of_the_last_prompt_it_came_with(prompts: list[str], completions: list[str]) -> list[float]:
    lengths = {c: float(sum(map(ord, p))) for p, c in zip(prompts, completions, strict=True)}
    return [lengths[c] for c in completions]


def relative(prompts: list[str], completions: list[str]) -> list[float]:
    longest = max(map(len, completions)) or 1
    return [len(c) / longest for c in completions]


@pytest.mark.parametrize(
    ("wrong", "law"),
    [
        (Counts(), "repetition: "),
        (relative, "company: a completion alone"),
        (of_the_first_prompt, "company: the completions from last to first"),
        (of_the_last_prompt_it_came_with, "company: "),
    ],
)
def test_wrong_rewards_are_caught(wrong: Any, law: str) -> None:
    with pytest.raises(AssertionError, match=law):
        check_reward(wrong)
    check_reward(wrong, deterministic=False)


def test_rounding_of_large_rewards_is_no_difference() -> None:
    def rounded(prompts: list[str], completions: list[str]) -> list[float]:
        return [1e4 + 1e-3 * len(completions) for _ in completions]

    check_reward(rounded)
    with pytest.raises(AssertionError, match="company: "):
        check_reward(rounded, tolerance=1e-8)


def test_finished_responses_are_among_those_to_cut() -> None:
    def encoded_again(batch: Any) -> Tensor:
        """Has no token for the EOS."""
        again = [len(batch.tokenizer(t, add_special_tokens=False).input_ids) for t in batch.texts]
        assert again == batch.lengths
        return starts(batch)

    with pytest.raises(UserError, match="AssertionError"):
        check_segmenter(encoded_again, byte_tokenizer())


def test_right_rewards_pass() -> None:
    check_reward({"name": "length", "target": 5})
    check_reward(lambda prompts, completions: [None if not c else len(c) for c in completions])
    check_reward(
        lambda prompts, completions, wanted: [
            [(len(c), float(w in c))] for c, w in zip(completions, wanted, strict=True)
        ],
        completions=["a b", "c"],
        columns={"wanted": ["b", "d"]},
    )
