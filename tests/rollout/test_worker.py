"""Scored rollouts: where scores land, and the columns that passes read."""

from __future__ import annotations

import torch

from marlhf.common.types import Generation, Sequences
from marlhf.config import RewardSettings
from marlhf.data.prompts import as_prompts
from marlhf.rollout.scores import reward_columns, score_to_rewards


def generation_of_lengths(lengths: list[int], finished: list[bool], T: int = 4) -> Generation:
    B = len(lengths)
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    ids = torch.zeros(B, T, dtype=torch.int64)
    ones = torch.ones(B, 2, dtype=torch.int64)
    return Generation(ones, ones.bool(), ids, mask, torch.tensor(finished))


def test_a_score_sits_on_the_last_response_token() -> None:
    generation = generation_of_lengths([4, 1, 2], [True, False, True])
    scores = torch.tensor([3.0, 1.0, -0.5])
    settings = RewardSettings(clip=2.0, missing_eos_penalty=0.25)
    rewards = score_to_rewards(scores, generation, settings, lambda x: x)
    assert rewards.tolist() == [[0, 0, 0, 2.0], [0.75, 0, 0, 0], [0, -0.5, 0, 0]]


def test_only_a_prompts_own_conversation_is_called_messages() -> None:
    """A data set of pairs may have a column of that name, with the answer that was preferred."""
    turns = [{"role": "user", "content": "Hi?"}]
    chosen = [*turns, {"role": "assistant", "content": "preferred"}]
    row = {"messages": chosen, "topic": "x"}
    plain, talk = as_prompts([{"prompt": "Hi?", **row}, {"prompt": turns, **row}])
    assert reward_columns([plain]) == {"topic": ["x"]}
    assert reward_columns([plain, talk]) == {"topic": ["x", "x"], "messages": [None, turns]}


def test_scores_can_be_whitened() -> None:
    generation = generation_of_lengths([4, 1, 2, 2], [True] * 4)
    scores = torch.tensor([3.0, 1.0, -0.5, 7.0])
    rewards = score_to_rewards(scores, generation, RewardSettings(whiten=True), lambda x: x)
    found = rewards.sum(1)
    torch.testing.assert_close(found, (scores - scores.mean()) / scores.std(correction=0))


def test_taking_rows_cuts_columns_that_are_all_padding() -> None:
    generation = generation_of_lengths([4, 1, 2], [True] * 3)
    prompt_mask = torch.tensor([[True, True], [False, True], [False, True]])
    sequences = Sequences.of(
        Generation(
            generation.prompt_ids,
            prompt_mask,
            generation.response_ids,
            generation.response_mask,
            generation.finished,
        )
    )
    cut = sequences.select(torch.tensor([1, 2]))
    assert cut.response_mask.tolist() == [[True, False], [True, True]]
    assert cut.attention_mask.tolist() == [[True, True, False], [True, True, True]]
    assert cut.input_ids.shape == (2, 3)
