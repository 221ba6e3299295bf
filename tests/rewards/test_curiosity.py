"""Curiosity against plain loops in float64; its state; its place in a run."""

from __future__ import annotations

import copy
import io
import math
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import PROMPTS, tiny_trainer
from torch import Tensor

from marlhf.rewards import Curiosity

H = 6


def rollout(seed: int, lengths: tuple[int, ...] = (4, 1, 5)) -> Any:
    """A rollout's states, embeddings and ranks, garbage outside the mask."""
    generator = torch.Generator().manual_seed(seed)
    B, T = len(lengths), max(lengths)
    mask = torch.tensor([[t < n for t in range(T)] for n in lengths])
    states = torch.randn(B, T + 1, H, generator=generator)
    for row, n in enumerate(lengths):
        states[row, n + 1 :] = math.nan
    return types.SimpleNamespace(
        responses=types.SimpleNamespace(response_mask=mask),
        extras={
            "hidden_states": states,
            "token_embeddings": torch.randn(B, T, H, generator=generator),
            "token_ranks": torch.randint(0, 3, (B, T), generator=generator),
        },
    )


def scaled(x: Tensor) -> Tensor:
    x = x.double() - x.double().mean()
    return x / (x.pow(2).mean() + 1e-5).sqrt()


def plain_errors(network: Any, r: Any) -> dict[tuple[int, int], Tensor]:
    """The error of each token, in float64 and plain loops."""
    (w1, b1), (w2, b2) = ((layer.weight, layer.bias) for layer in (network[0], network[2]))
    found = {}
    for row, token in r.responses.response_mask.nonzero().tolist():
        before, after = r.extras["hidden_states"][row, token : token + 2]
        action = r.extras["token_embeddings"][row, token]
        x = torch.cat([scaled(before), scaled(action)])
        predicted = w2.double() @ torch.relu(w1.double() @ x + b1.double()) + b2.double()
        found[row, token] = 0.5 * ((predicted - scaled(after)) ** 2).sum() / H
    return found


def no_reduce(x: Tensor) -> Tensor:
    return x


def test_rewards_and_learning_are_the_formulas() -> None:
    curiosity = Curiosity(top_k=1, learning_rate=0.01, width=8, memory=0.5)
    moments = [0.0, 0.0, 0.0]
    for step in range(4):
        r = rollout(step)
        rewards = curiosity(r)
        if step == 0:
            assert not rewards.any()
            curiosity._built(H)
        plain = copy.deepcopy(curiosity._network)
        assert plain is not None
        errors = plain_errors(plain, r)
        for (row, token), error in errors.items():
            if step == 0 or r.extras["token_ranks"][row, token] < 1:
                wanted = 0.0
            else:
                mean = moments[1] / moments[0]
                wanted = (float(error) - mean) / math.sqrt(moments[2] / moments[0] - mean**2)
            assert float(rewards[row, token]) == pytest.approx(wanted, abs=1e-4)

        metrics = curiosity.update(r, no_reduce)
        values = [float(e) for e in errors.values()]
        sums = (len(values), sum(values), sum(v**2 for v in values))
        moments = [0.5 * m + s for m, s in zip(moments, sums, strict=True)]
        assert metrics["error"] == pytest.approx(sums[1] / sums[0], rel=1e-5)
        outside = [bool(r.extras["token_ranks"][place] >= 1) for place in errors]
        assert metrics["rewarded_fraction"] == pytest.approx(sum(outside) / len(outside))
        if step == 0:  # the first step of Adam is the sign of the gradient
            gradients = torch.autograd.grad(sum(errors.values()), list(plain.parameters()))
            pairs = zip(plain.parameters(), gradients, strict=True)
            for (p, g), new in zip(pairs, curiosity._network.parameters(), strict=True):
                moved = (new - p)[g.abs() > 1e-3]
                torch.testing.assert_close(moved, -0.01 * g.sign()[g.abs() > 1e-3].float())


def test_what_is_learned_is_no_longer_rewarded() -> None:
    curiosity = Curiosity(learning_rate=0.01, top_k=0)
    errors = [curiosity.update(rollout(0), no_reduce)["error"] for _ in range(100)]
    assert errors[-1] < errors[0] / 20
    known, new = curiosity(rollout(0)), curiosity(rollout(1))
    assert float(known.sum()) < float(new.sum())


def test_two_ranks_learn_what_one_does() -> None:
    """Two halves, whose sums meet in a stand-in for the all-reduce, played twice over."""
    whole, parts = rollout(0, (4, 5)), []
    for row in range(2):
        mask = whole.responses.response_mask[row : row + 1]
        extras = {name: x[row : row + 1] for name, x in whole.extras.items()}
        responses = types.SimpleNamespace(response_mask=mask)
        parts.append(types.SimpleNamespace(responses=responses, extras=extras))
    alone = Curiosity(width=8)
    alone.update(whole, no_reduce)
    # each pass knows one more of the sums: the gradients depend on the count alone
    totals: list[Tensor] = []
    for known in range(20):
        seen: list[list[Tensor]] = [[], []]
        ranks = [Curiosity(width=8), Curiosity(width=8)]
        for rank in (0, 1):

            def all_reduce(x: Tensor, mine: list[Tensor] = seen[rank]) -> Tensor:
                mine.append(x.clone())
                at = len(mine) - 1
                return totals[at].clone() if at < len(totals) else x

            ranks[rank].update(parts[rank], all_reduce)
        if known >= len(seen[0]):
            break
        totals.append(seen[0][known] + seen[1][known])
    torch.testing.assert_close(ranks[0]._moments, alone._moments)
    for name, weight in alone.state_dict()["network"].items():
        torch.testing.assert_close(ranks[0].state_dict()["network"][name], weight)


def test_a_saved_state_goes_on_as_if_nothing_had_happened() -> None:
    first = Curiosity(width=8)
    fresh = Curiosity(width=8)
    fresh.load_state_dict(saved_and_loaded(Curiosity(width=8).state_dict()))  # before any rollout
    assert not fresh(rollout(0)).any()
    first.update(rollout(0), no_reduce)
    second = Curiosity(width=8, seed=5)
    second.load_state_dict(saved_and_loaded(first.state_dict()))
    for step in (1, 2):
        r = rollout(step)
        assert torch.equal(first(r), second(r))
        assert first.update(r, no_reduce) == second.update(r, no_reduce)


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_in_a_run_it_adds_to_the_task_rewards_and_not_to_the_score(tmp_path: Path) -> None:
    tokens = [{"name": "curiosity", "weight": 0.5}]
    trainer = tiny_trainer(tmp_path / "with", reward={"tokens": tokens})
    plain = tiny_trainer(tmp_path / "without")
    rows = [trainer.step(PROMPTS) for _ in range(2)]
    others = [plain.step(PROMPTS) for _ in range(2)]
    assert rows[0]["reward_curiosity_mean"] == 0
    assert rows[0]["policy_loss"] == others[0]["policy_loss"]
    assert abs(rows[1]["reward_curiosity_mean"]) > 0.1
    assert rows[1]["score_mean"] == others[1]["score_mean"]
    added = rows[1]["objective_mean"] - others[1]["objective_mean"]
    assert added == pytest.approx(0.5 * rows[1]["reward_curiosity_mean"], rel=1e-3)
    assert rows[1]["policy_loss"] != others[1]["policy_loss"]
    assert 0 < rows[1]["curiosity_rewarded_fraction"] <= 1
    assert rows[1]["curiosity_error"] > 0
