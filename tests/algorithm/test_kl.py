"""The adaptive KL coefficient, and the end of an update at a target KL."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import PROMPTS, tiny_config, tiny_trainer

from marlhf.algorithm.kl import KLCoefficient
from marlhf.common.types import ResponseBatch
from marlhf.config import KLSettings, LoraSettings
from marlhf.rewards import TokenReward
from marlhf.segmenters import NGram, from_lengths, from_text
from marlhf.training.ppo import PPOTrainer


def test_the_coefficient_follows_the_recurrence():
    kl = KLCoefficient(KLSettings(coef=0.1, target=6.0, horizon=1000), in_loss=False)
    found = []
    for observed in (6.0, 6.6, 5.4, 60.0, -3.0):
        kl.update(observed, responses=500)
        found.append(kl.coef)
    factors = [1.0, 1.05, 0.95, 1.1, 0.9]  # half of the error, which is at most a fifth
    wanted = [0.1]
    for factor in factors:
        wanted.append(wanted[-1] * factor)
    assert found == pytest.approx(wanted[1:], rel=1e-12)


def test_without_a_target_the_coefficient_is_fixed():
    kl = KLCoefficient(KLSettings(coef=0.1), in_loss=True)
    kl.update(100.0, responses=500)
    assert kl.coef == 0.1


@pytest.mark.parametrize("in_loss", [False, True])
def test_the_coefficient_applies_in_one_place_and_is_kept_by_its_state(in_loss: bool):
    kl = KLCoefficient(KLSettings(coef=0.1, target=1.0, horizon=8), in_loss)
    kl.update(2.0, responses=8)
    again = KLCoefficient(kl.settings, in_loss)
    again.load_state_dict(kl.state_dict())
    assert again.coef == pytest.approx(0.12)
    places = (again.in_rewards_coef, again.in_loss_coef)
    assert places == ((0.0, again.coef) if in_loss else (again.coef, 0.0))


def test_the_coefficient_brings_the_kl_down(tmp_path: Path) -> None:
    """Started far too weak for its target, the leash lets the KL grow and then tightens."""
    settings = {"coef": 0.01, "target": 0.5, "horizon": 8, "where": "loss"}
    trainer = tiny_trainer(tmp_path, steps=60, kl=settings, optimizer={"schedule": "constant"})
    rows = [trainer.step(PROMPTS) for _ in range(60)]
    coefs, kls = ([row[name] for row in rows] for name in ("kl_coef", "kl_k3_mean"))
    assert coefs[0] == 0.01
    assert min(coefs) < 0.008
    assert coefs[-1] > 1
    assert sum(kls[-10:]) / 10 < max(kls) / 3


def weights(trainer: PPOTrainer, name: str) -> list[torch.Tensor]:
    return [p.detach().clone() for p in getattr(trainer, name).parameters]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_target_kl_that_any_step_exceeds_leaves_one_step(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "a", ppo={"target_kl": 1e-9})
    critic_steps = count_steps(trainer.critic)
    rows = [trainer.step(PROMPTS) for _ in range(2)]
    assert [row["policy_steps"] for row in rows] == [1, 1]  # each update begins anew
    assert critic_steps == [8]
    assert rows[0]["approx_kl"] > 1e-9

    once = tiny_trainer(tmp_path / "b", ppo={"minibatches": 2, "epochs": 1})
    stopped = tiny_trainer(tmp_path / "c", ppo={"target_kl": 1e-9})
    once_steps = count_steps(once.policy, limit=1)
    once.step(PROMPTS)
    stopped.step(PROMPTS)
    assert once_steps == [2]
    assert same(weights(once, "policy"), weights(stopped, "policy"))


def test_a_target_kl_out_of_reach_changes_nothing(tmp_path: Path) -> None:
    runs = []
    for name, ppo in [("with", {"target_kl": 1e6}), ("without", {})]:
        trainer = tiny_trainer(tmp_path / name, ppo=ppo)
        row = trainer.step(PROMPTS)
        assert row.get("policy_steps") == (4 if ppo else None)
        runs.append(weights(trainer, "policy"))
    assert same(*runs)


def count_steps(learner: Any, limit: int | None = None) -> list[int]:
    """Counts the optimiser's steps; those after `limit` do nothing."""
    count, step = [0], learner.optimizer.step

    def counting(*arguments: Any, **more: Any) -> Any:
        count[0] += 1
        return step(*arguments, **more) if limit is None or count[0] <= limit else None

    learner.optimizer.step = counting
    return count


@pytest.mark.parametrize(
    ("sections", "fault"),
    [
        ({"kl": {"horizon": 500}}, r"kl\.horizon: given 500, but without kl\.target"),
        ({"kl": {"target": 6.0, "coef": 0.0}}, r"kl\.coef: given 0 with kl\.target"),
        ({"kl": {"target": 6.0, "horizon": 7}}, r"kl\.horizon: given 7, must be at least the 8"),
        (
            {"ppo": {"target_kl": 0.1, "epochs": 1, "minibatches": 1}},
            r"ppo\.target_kl: given 0\.1, but an update has one policy step",
        ),
    ],
)
def test_keys_that_would_do_nothing_are_refused(
    sections: dict[str, Any], fault: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=fault):
        tiny_config(tmp_path, **sections)


class Silent(TokenReward):
    """Zeros, from one that says nothing of what it requires."""

    def __call__(self, rollout: Any) -> torch.Tensor:
        return torch.zeros_like(rollout.responses.entropy)


def every_third(batch: ResponseBatch) -> torch.Tensor:
    """What `ngram` does, from a function that does not say what it requires."""
    assert batch.ref_logprobs is not None
    return NGram(3)(batch)


halves = from_text(lambda text: [len(text) // 2])
pairs = from_lengths(lambda tokens: [2] * (len(tokens) // 2) + [1] * (len(tokens) % 2))
NO_KL: dict[str, Any] = {"kl": {"coef": 0.0}}
CASES: dict[str, dict[str, Any]] = {
    "full": NO_KL,
    "lora": {**NO_KL, "model": {"lora": LoraSettings(r=2)}},
    "grpo": {
        **NO_KL,
        "ppo": {"estimator": "grpo"},
        "rollout": {"batch_size": 4, "responses_per_prompt": 2},
    },
}


@pytest.mark.parametrize("case", CASES)
def test_without_a_penalty_the_reference_is_left_out_and_nothing_else_changes(
    case: str, tmp_path: Path
) -> None:
    rows, trained = [], []
    for segmenter in ({"name": "ngram", "n": 3}, "test_kl.every_third"):
        folder = tmp_path / str(len(rows))
        sections = {**CASES[case], "segmenter": segmenter, "log": {"eval_every": 1, "samples": 2}}
        trainer = tiny_trainer(folder, **sections)
        assert (trainer.reference is None) == isinstance(segmenter, dict)
        trainer.eval_prompts = list(trainer.stream.prompts[:3])
        trainer.train()
        lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
        lines += [json.loads(x) for x in (folder / "samples.jsonl").read_text().splitlines()]
        rows.append(lines)
        modules = [learner.model for learner in (trainer.policy, trainer.critic) if learner]
        trained.append([weight for module in modules for weight in module.state_dict().values()])
    of_kl = ("kl_mean", "kl_k3_mean", "eval_kl_mean", "kl")
    for without, with_reference in zip(*rows, strict=True):
        assert without.keys() == with_reference.keys()
        assert all(with_reference[key] is not None for key in of_kl if key in with_reference)
        for key in without:
            if key in of_kl:
                assert without[key] is None
            elif not key.endswith(("_seconds", "_per_second", "_gb")):
                assert without[key] == with_reference[key], key
    assert all(torch.equal(a, b) for a, b in zip(*trained, strict=True))


@pytest.mark.parametrize(
    ("arguments", "needed"),
    [
        ({}, False),
        ({"segmenter": "perplexity"}, True),
        ({"segmenter": {"name": "perplexity", "logprobs": "policy"}}, False),
        ({"segmenter": {"name": "union", "of": ["word", "perplexity"]}}, True),
        ({"segmenter": {"name": "union", "of": ["word", "entropy_jump", "phrases"]}}, False),
        ({"segmenter": "test_kl.halves"}, False),
        ({"segmenter": "test_kl.pairs"}, False),
        ({"token_reward": "curiosity"}, False),
        ({"token_reward": Silent()}, True),
    ],
)
def test_what_reads_the_reference_has_it_without_a_penalty(
    arguments: dict[str, Any], needed: bool, tmp_path: Path
) -> None:
    trainer = tiny_trainer(tmp_path, **NO_KL, **arguments)
    row = trainer.step(PROMPTS)
    assert (row["kl_mean"] is not None) == needed
    assert row["objective_mean"] is not None
