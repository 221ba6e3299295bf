"""The contract of token rewards: how they are named, called, checked and added up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import PROMPTS, tiny_trainer
from torch import Tensor

from marlhf.common.errors import UserError
from marlhf.rewards import RewardError, TokenReward, build_token_rewards
from marlhf.rewards.tokens import EXTRAS
from marlhf.runs.metrics import Timer


class Surprise(TokenReward):
    """1 for a token outside the likeliest ten; its state counts the rollouts."""

    requires = frozenset({"token_ranks"})

    def __init__(self, size: float = 1.0) -> None:
        self.size, self.calls, self.seen = size, 0, []

    def __call__(self, rollout: Any) -> Tensor:
        self.seen.append(rollout.extras)
        return self.size * (rollout.extras["token_ranks"] >= 10).float()

    def update(self, rollout: Any, all_reduce: Any) -> dict[str, float]:
        self.calls += 1
        return {"calls": float(self.calls)}


class Returning(TokenReward):
    def __init__(self, make: Any) -> None:
        self.make = make

    def __call__(self, rollout: Any) -> Any:
        return self.make(rollout.responses.response_mask)


def test_a_weighted_sum_lands_on_the_tokens(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "a")
    plain = trainer.worker(trainer.stream.prompts[:4], range(4), 0, Timer())
    assert plain.extras == {}
    mine = Surprise(2.0)
    combined = build_token_rewards([(mine, 0.5), (Surprise(3.0), 2.0)])
    assert combined.requires == {"token_ranks"}
    assert [r.name for r in combined.rewards] == ["Surprise", "Surprise_2"]
    object.__setattr__(trainer.worker, "requested_extras", combined.requires)
    rollout = trainer.worker(trainer.stream.prompts[:4], range(4), 0, Timer())
    assert set(rollout.extras) == {"token_ranks"}
    total, by_name = combined(rollout)
    metrics = {named.name: named.update(rollout, lambda x: x) for named in combined.rewards}
    mask = rollout.responses.response_mask
    outside = (rollout.extras["token_ranks"] >= 10) & mask
    assert 0 < int(outside.sum()) < int(mask.sum())
    assert torch.equal(total, 7.0 * outside)
    assert torch.equal(by_name["Surprise"], 2.0 * outside.sum(1))
    assert metrics == {"Surprise": {"calls": 1.0}, "Surprise_2": {"calls": 1.0}}


def test_a_run_uses_them_only_in_updates(tmp_path: Path) -> None:
    mine = Surprise()
    trainer = tiny_trainer(tmp_path, reward={"tokens": []}, token_reward=[mine])
    trainer.eval_prompts = list(trainer.stream.prompts[:2])
    trainer.evaluate()
    assert mine.seen == []
    row = trainer.step(PROMPTS)
    assert row["reward_Surprise_mean"] > 0
    assert row["Surprise_calls"] == 1
    assert [set(extras) for extras in mine.seen] == [{"token_ranks"}]


def test_names_import_paths_and_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    assert build_token_rewards([]).rewards == ()
    assert build_token_rewards([]).requires == frozenset()
    (named,) = build_token_rewards({"name": "curiosity", "weight": 0.1, "top_k": 3}).rewards
    assert (named.name, named.weight) == ("curiosity", 0.1)
    assert named.reward.requires <= EXTRAS
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    spec = {"name": "test_token_rewards.Surprise", "size": 4.0}
    (named,) = build_token_rewards([spec]).rewards
    assert (named.name, named.reward.size) == ("Surprise", 4.0)  # pyright: ignore


class Greedy(TokenReward):
    requires = frozenset({"logits", "token_ranks"})


class Nothing(TokenReward): ...


@pytest.mark.parametrize(
    ("spec", "fault"),
    [
        (Nothing(), r"Nothing: must have a method __call__\(self, rollout\)"),
        (Greedy(), "Greedy: requires logits; possible: hidden_states, ref_logprobs, token"),
        (len, "token reward len: given <built-in function len>, must be a subclass"),
        (Surprise, "token reward Surprise: given <class .*, must be a subclass"),
        ({"weight": 1}, "token reward: given .*, but a mapping needs a `name`"),
        ([(Surprise(), float("nan"))], "weight: given nan, must be a finite number"),
    ],
)
def test_what_is_no_token_reward_is_refused(spec: Any, fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        build_token_rewards(spec)


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (lambda mask: mask, "TypeError: must return a tensor of floats"),
        (lambda mask: [0.0], "TypeError: must return a tensor of floats"),
        (lambda mask: mask[:, :1].float(), r"returned the shape \[8, 1\], must be \[B,T\] = \[8,"),
        (lambda mask: mask / 0.0, "rewards for row 0 that are not finite"),
        (lambda mask: 1 / 0, "raised ZeroDivisionError: division by zero"),
    ],
)
def test_a_fault_stops_the_run_and_names_the_reward(make: Any, fault: str, tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, token_reward=Returning(make))
    with pytest.raises(RewardError, match=f"token reward Returning: raised .*{fault}|{fault}"):
        trainer.step(PROMPTS)


def test_what_lies_outside_the_mask_is_nothing(tmp_path: Path) -> None:
    def make(mask: Tensor) -> Tensor:
        return torch.where(mask, 1.0, float("nan"))

    row = tiny_trainer(tmp_path, token_reward=Returning(make)).step(PROMPTS)
    assert row["reward_Returning_mean"] == row["response_length_mean"]
