"""Policy or critic with its optimiser: saved and loaded, and steps that must not be taken."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import PROMPTS, tiny_trainer

from marlhf.config import LoraSettings
from marlhf.training.learner import DivergedError, Learner

ONE_STEP: dict[str, Any] = {"ppo": {"epochs": 1, "minibatches": 1}}
CASES: dict[str, dict[str, Any]] = {
    "all weights": {},
    "lora": {"model": {"lora": LoraSettings(r=2)}},
}


def trained(learner: Learner) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in learner.parameters]


def poisoned(trainer: Any, value: float, calls: set[int]) -> None:
    """Make the policy's loss `value` in these of its optimiser steps; counted from 0."""
    real, count = trainer.policy.accumulate, iter(range(1000))

    def accumulate(term: tuple[Any, Any]) -> float:
        factor, (minibatch, objective) = value if next(count) in calls else 1.0, term
        return real((minibatch, lambda *rows: objective(*rows) * factor))

    trainer.policy.accumulate = accumulate


@pytest.mark.parametrize("case", CASES)
def test_a_saved_learner_goes_on_as_if_it_had_never_stopped(case: str, tmp_path: Path) -> None:
    sections = {"steps": 4, "optimizer": {"weight_decay": 0.1, "warmup_steps": 1}, **CASES[case]}
    first = tiny_trainer(tmp_path / "run", **sections)
    first.step(PROMPTS)
    second = tiny_trainer(tmp_path / "run", **sections)
    for name in ("policy", "critic"):
        getattr(first, name).save(tmp_path / name)
        getattr(second, name).load(tmp_path / name)
    second.step_count = 1
    wanted, found = first.step(PROMPTS), second.step(PROMPTS)
    times = ("_seconds", "per_second", "memory_gb")
    assert {k: v for k, v in found.items() if not k.endswith(times)} == {
        k: v for k, v in wanted.items() if not k.endswith(times)
    }
    for name in ("policy", "critic"):
        pairs = zip(trained(getattr(first, name)), trained(getattr(second, name)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_without_the_optimiser_it_would_not(tmp_path: Path) -> None:
    """The negative control: Adam's moments matter to the next step."""
    first, second = (tiny_trainer(tmp_path / "run", steps=4) for _ in range(2))
    first.step(PROMPTS)
    first.policy.save(tmp_path / "policy")
    state = torch.load(tmp_path / "policy" / "optimizer.pt")
    state["optimizer"]["state"] = {}
    torch.save(state, tmp_path / "policy" / "optimizer.pt")
    second.policy.load(tmp_path / "policy")
    second.step_count = 1
    first.step(PROMPTS)
    second.step(PROMPTS)
    pairs = zip(trained(first.policy), trained(second.policy), strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs)


def test_the_learning_rate_is_that_of_the_schedule_now(tmp_path: Path) -> None:
    short = tiny_trainer(tmp_path / "run", steps=2)
    short.step(PROMPTS)
    short.step(PROMPTS)
    assert short.policy.learning_rate == 0
    short.policy.save(tmp_path / "policy")
    longer = tiny_trainer(tmp_path / "run", steps=8)
    longer.policy.load(tmp_path / "policy")
    assert longer.policy.learning_rate == pytest.approx(0.75e-3)
    assert longer.policy.optimizer.param_groups[0]["lr"] == longer.policy.learning_rate


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_skipped_and_counted(value: float, tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, **ONE_STEP)
    poisoned(trainer, value, {0})
    before, critic = trained(trainer.policy), trained(trainer.critic)  # type: ignore[arg-type]
    row = trainer.step(PROMPTS)
    assert row["skipped_steps"] == 1
    assert row["grad_norm_policy"] is None
    assert all(torch.equal(a, b) for a, b in zip(before, trained(trainer.policy), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(critic, trained(trainer.critic), strict=True))  # type: ignore[arg-type]
    row = trainer.step(PROMPTS)
    assert row["skipped_steps"] == 0
    assert not all(torch.equal(a, b) for a, b in zip(before, trained(trainer.policy), strict=True))


def test_too_many_in_a_row_stop_the_run_with_the_batch_saved(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, steps=9, optimizer={"max_skipped_steps": 3}, **ONE_STEP)
    poisoned(trainer, math.nan, {0, 1, 3, 4, 5})  # the third is finite: counting starts anew
    with pytest.raises(DivergedError, match=r"in 3 optimiser steps in a row .*; its batch is in"):
        trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped_steps"] for row in rows] == [1, 1, 0, 1, 1]
    (batch,) = torch.load(tmp_path / "diverged-step-6-rank-0.pt", weights_only=True)
    assert batch["input_ids"].shape[0] == batch["advantages"].shape[0] == len(PROMPTS)
    assert all(p.isfinite().all() for p in trained(trainer.policy))


def test_the_count_in_a_row_survives_a_resume(tmp_path: Path) -> None:
    first, second = (
        tiny_trainer(tmp_path / "run", optimizer={"max_skipped_steps": 2}, **ONE_STEP)
        for _ in range(2)
    )
    poisoned(first, math.nan, {0})
    first.step(PROMPTS)
    first.policy.save(tmp_path / "policy")
    second.policy.load(tmp_path / "policy")
    poisoned(second, math.nan, {0})
    with pytest.raises(DivergedError, match="2 optimiser steps in a row"):
        second.step(PROMPTS)


def test_gradients_of_several_passes_lie_in_memory_that_stays(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run", **ONE_STEP, optimizer={"micro_batch_size": 1})
    memories: dict[str, set[int]] = {"policy": set(), "critic": set()}
    for name, found in memories.items():
        for parameter in getattr(trainer, name).parameters:
            parameter.register_post_accumulate_grad_hook(
                lambda p, found=found: found.add(p.grad.untyped_storage().data_ptr())
            )
    trainer.step(PROMPTS)
    trainer.step(PROMPTS)
    assert memories["policy"] == memories["critic"]
    assert len(memories["policy"]) == 1
    assert all(p.grad is None for p in trainer.policy.parameters + trainer.critic.parameters)
