"""Rollout to macro advantages, put together, against token-level PPO and hand-made numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.oracles import token_gae

from marlhf.algorithm.experience import Experience, TokenData, macro_batch
from marlhf.config import MacroSettings, PPOSettings

LENGTHS = [6, 1, 4, 0]


def token_rewards(finished: bool = True) -> TokenData:
    generator = torch.Generator().manual_seed(0)
    B, T = len(LENGTHS), max(LENGTHS)
    mask = torch.arange(T) < torch.tensor(LENGTHS)[:, None]

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    kl, values = draw(B, T), draw(B, T)
    last = torch.arange(T) == torch.tensor(LENGTHS)[:, None] - 1
    task = torch.where(last, draw(B, T), 0.0)
    nan = torch.full((B, T), torch.nan, dtype=torch.float64)
    return TokenData(
        response_mask=mask,
        kl_rewards=torch.where(mask, kl, 0.0),
        task_rewards=task,
        values=torch.where(mask, values, nan),
        last_values=draw(B),
        finished=torch.full((B,), finished),
    )


def oracle_of_row(
    tokens: TokenData, row: int, gamma: float, lam: float, last_value: float
) -> list[float]:
    """The oracle's token-level GAE of one row."""
    n = LENGTHS[row]
    assert tokens.values is not None
    rewards = (tokens.kl_rewards + tokens.task_rewards)[row, :n].tolist()
    return token_gae(rewards, tokens.values[row, :n].tolist(), gamma, lam, last_value)


@pytest.mark.parametrize("bootstrap", [False, True])
@pytest.mark.parametrize("finished", [False, True])
def test_every_token_a_macro_action_is_token_level_ppo(bootstrap: bool, finished: bool) -> None:
    tokens = token_rewards(finished)
    ppo = PPOSettings(gamma=0.9, lam=0.8, bootstrap_truncated=bootstrap)
    batch = macro_batch(tokens.response_mask, tokens, MacroSettings(whiten="none"), ppo)
    assert tokens.last_values is not None
    for row, n in enumerate(LENGTHS):
        at_end = float(tokens.last_values[row]) if bootstrap and not finished else 0.0
        wanted = torch.tensor(oracle_of_row(tokens, row, 0.9, 0.8, at_end), dtype=torch.float64)
        torch.testing.assert_close(batch.advantages_BT[row, :n], wanted)
        assert not batch.advantages_BT[row, n:].any()
        assert batch.returns_BT is not None
        assert tokens.values is not None
        returns = wanted + tokens.values[row, :n]
        torch.testing.assert_close(batch.returns_BT[row, :n], returns)


def test_one_macro_action_is_the_bandit() -> None:
    tokens = token_rewards()
    none = torch.zeros_like(tokens.response_mask)
    starts = none.clone()
    starts[:, 0] = tokens.response_mask[:, 0]
    macro = MacroSettings(whiten="none", value="first")
    batch = macro_batch(starts, tokens, macro, PPOSettings(gamma=0.9))
    assert tokens.values is not None
    for row, n in enumerate(LENGTHS):
        rewards = (tokens.kl_rewards + tokens.task_rewards)[row, :n]
        discounted = sum(0.9**t * float(r) for t, r in enumerate(rewards))
        for t in range(n):
            wanted = discounted - float(tokens.values[row, 0])
            assert float(batch.advantages_BT[row, t]) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize(("whiten", "weighted"), [("macro", False), ("token", True)])
def test_whitening_counts_macro_actions_or_their_tokens(whiten: str, weighted: bool) -> None:
    tokens = token_rewards()
    starts = torch.tensor([[1, 0, 0, 0, 1, 1], [1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [0] * 6])
    raw = macro_batch(starts.bool(), tokens, MacroSettings(whiten="none"), PPOSettings())
    done = macro_batch(starts.bool(), tokens, MacroSettings(whiten=whiten), PPOSettings())
    weights = raw.lengths_BM[raw.mask_BM].double() if weighted else torch.ones(6).double()
    x, found = raw.advantages_BM[raw.mask_BM], done.advantages_BM[raw.mask_BM]
    mean = (weights * x).sum() / weights.sum()
    std = ((weights * (x - mean) ** 2).sum() / weights.sum()).sqrt()
    torch.testing.assert_close(found, (x - mean) / std, atol=1e-6, rtol=1e-6)


def test_without_a_critic_all_macro_actions_share_one_advantage() -> None:
    tokens = replace(token_rewards(), values=None, last_values=None)
    starts = tokens.response_mask
    ppo = PPOSettings(estimator="rloo")
    batch = macro_batch(starts, tokens, MacroSettings(), ppo, group_size=2)
    returns = (tokens.kl_rewards + tokens.task_rewards).sum(1)
    assert batch.returns_BM is None
    for row, other in [(0, 1), (1, 0), (2, 3)]:
        wanted = float(returns[row] - returns[other])
        found = batch.advantages_BT[row, : LENGTHS[row]].tolist()
        assert found == pytest.approx([wanted] * LENGTHS[row])


def test_mean_rewards_average_the_kl_but_not_the_score() -> None:
    tokens = token_rewards()
    starts = torch.zeros_like(tokens.response_mask)
    starts[:, 0] = tokens.response_mask[:, 0]
    macro = MacroSettings(whiten="none", reward="mean", discount="per_macro")
    batch = macro_batch(starts, tokens, macro, PPOSettings())
    assert batch.values_BM is not None
    for row in range(3):
        n = LENGTHS[row]
        reward = tokens.kl_rewards[row, :n].mean() + tokens.task_rewards[row].sum()
        found = batch.advantages_BM[row, 0] + batch.values_BM[row, 0]
        torch.testing.assert_close(found, reward)


def test_rows_of_an_experience_lose_columns_of_padding_alone() -> None:
    mask = torch.tensor([[True, True, True], [True, False, False]])
    attention = torch.cat([torch.tensor([[True, True], [False, True]]), mask], 1)
    ids = torch.arange(10).view(2, 5)
    x = torch.arange(6.0).view(2, 3)
    experience = Experience(ids, attention, mask, ids[:, 2:], x, x, x, None, None)
    row = experience.select(torch.tensor([1]))
    assert row.input_ids.tolist() == [[6, 7]]
    assert row.attention_mask.tolist() == [[True, True]]
    assert row.logprobs.tolist() == [[3.0]]
    assert row.values is None
    assert len(row) == 1
    both = experience.select(torch.tensor([1, 0]))
    assert both.input_ids.tolist() == ids[[1, 0]].tolist()
