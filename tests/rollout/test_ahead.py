"""Sampling one update ahead: which weights sample what, equality at rate 0, and exact resumes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rollout.test_engine import Copying, CopyingEngine, responses, rows
from support.runs import PROMPTS, tiny_config, vowels
from support.tiny_models import BYTES_VOCAB, byte_tokenizer, tiny_causal_lm

from marlhf import PPOTrainer
from marlhf.common.errors import UserError
from marlhf.common.types import Generation, Sequences
from marlhf.config import ImportanceSettings, RolloutSettings
from marlhf.distributed import Distributed
from marlhf.models.policy import forward
from marlhf.rewards.calls import RewardError
from marlhf.rollout.ahead import Ahead, Request
from marlhf.rollout.engine import EngineContext

AHEAD = {"ahead": 1, "importance": ImportanceSettings()}
WEIGHTED = {"importance": ImportanceSettings()}


@dataclass(frozen=True)
class Beside(Copying):
    """An engine beside the trainer: it samples from the weights that it has when it is asked."""

    samples_ahead = True

    def __call__(self, context: EngineContext) -> BesideEngine:
        return BesideEngine(context, self.updated)


class BesideEngine(CopyingEngine):
    def begin(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], settings: RolloutSettings
    ) -> Callable[[], Generation]:
        self.calls.append("begin")
        generation = CopyingEngine.generate(self, prompts, seeds, settings)
        self.calls.pop()

        def wait() -> Generation:
            self.calls.append("wait")
            return generation

        return wait


def trainer(folder: Path, engine: Any, reward: Any = vowels, **sections: Any) -> PPOTrainer:
    return PPOTrainer(
        tiny_config(folder, **{"steps": 4, **sections}),
        reward=reward,
        engine=engine,
        train_dataset=PROMPTS,
        model=tiny_causal_lm("llama", BYTES_VOCAB),
        tokenizer=byte_tokenizer(add_bos=True),
    )


def trained(folder: Path, engine: Any = None, **sections: Any) -> PPOTrainer:
    made = trainer(folder, engine or Beside(), **sections)
    made.train()
    return made


def untimed(made: PPOTrainer) -> list[dict[str, Any]]:
    """Rows of metrics without what a clock says."""
    measured = ("_seconds", "_per_second", "_gb")
    return [{k: v for k, v in row.items() if not k.endswith(measured)} for row in rows(made)]


def test_the_next_update_is_sampled_before_this_one_trains(tmp_path: Path) -> None:
    """The responses of update 2 come from the first weights, those of 3 from the next."""
    ahead = trained(tmp_path / "ahead", rollout=AHEAD)
    frozen = trained(tmp_path / "frozen", Copying(updated=False), rollout=WEIGHTED)
    update = ["begin", "wait", "update_weights"]
    calls = ["update_weights", "generate", *update, *update, *update, "update_weights", "close"]
    assert ahead.engine.calls == calls
    assert responses(ahead)[:4] == responses(frozen)[:4]  # two samples an update
    assert responses(ahead)[4:] != responses(frozen)[4:]
    lags, gaps = ([row[key] for row in rows(ahead)] for key in ("sampling_lag", "engine_kl"))
    assert lags == [0, 1, 1, 1]
    assert gaps[0] < 1e-7 < min(gaps[1:])
    assert all(row["loss_weight_mean"] == pytest.approx(1, abs=0.1) for row in rows(ahead))


def test_weights_and_ratio_are_to_the_policy_before_the_update(tmp_path: Path) -> None:
    """Old log-probabilities are the policy's of now, and weights lead to them from the stale."""
    made = trainer(tmp_path / "run", Beside(), rollout=AHEAD, optimizer={"learning_rate": 0.02})
    update, policies = made.update, [copy.deepcopy(made.worker.policy)]
    gaps: list[float] = []

    def watched(experience: Any, *arguments: Any) -> None:
        policies.append(copy.deepcopy(made.worker.policy))
        parts = (experience.input_ids, experience.attention_mask, experience.response_mask)
        with torch.no_grad():
            stale, now = (forward(p, Sequences(*parts)).logprobs for p in policies[-2:])
        mask = experience.response_mask
        torch.testing.assert_close(experience.logprobs[mask], now[mask])
        weights = (now - stale).exp().clamp(max=2)[mask]
        torch.testing.assert_close(experience.weights[mask], weights)
        gaps.append(float((weights - 1).abs().max()))
        update(experience, *arguments)

    made.update = watched
    made.train()
    assert gaps[0] < 1e-6 < 0.01 < min(gaps[1:])


def test_without_learning_it_changes_nothing(tmp_path: Path) -> None:
    sections: Any = {"optimizer": {"learning_rate": 0.0}}
    ahead = untimed(trained(tmp_path / "ahead", rollout=AHEAD, **sections))
    usual = untimed(trained(tmp_path / "usual", rollout=WEIGHTED, **sections))
    assert [row.pop("sampling_lag") for row in ahead] == [0, 1, 1, 1]
    assert ahead == usual


def test_a_resume_takes_up_the_responses_at_hand(tmp_path: Path) -> None:
    sections: Any = {"checkpoint": {"every": 1}, "rollout": AHEAD, "overwrite": False}
    complete = trained(tmp_path / "complete", **sections)
    calls: list[int] = []

    def counted(prompts: list[str], completions: list[str]) -> list[float]:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("the end")
        return vowels(prompts, completions)

    counted.__name__ = "vowels"
    with pytest.raises(RewardError, match="the end"):
        trained(tmp_path / "stopped", reward=counted, **sections)
    resumed = trained(tmp_path / "stopped", reward=counted, resume="auto", **sections)
    assert untimed(resumed) == untimed(complete)
    assert responses(resumed) == responses(complete)
    assert resumed.engine.calls[:3] == ["update_weights", "begin", "wait"]


def test_a_resume_shares_the_responses_out_anew(tmp_path: Path) -> None:
    """What one rank sampled, each of two takes its half of."""
    made = trained(tmp_path / "run", rollout=AHEAD, checkpoint={"every": 2}, steps=3)
    file = tmp_path / "run/checkpoints/step-2/rank-0.pt"
    state = torch.load(file, weights_only=True)["parts"]["ahead"]
    whole = made.worker._upcoming(2)
    assert whole is not None
    parts = []
    for rows_of_rank in (range(8), range(4), range(4, 8)):
        ahead = Ahead(made.engine, made.config.rollout, Distributed(), 0, lambda step: None, True)
        ahead.load_state_dict(state)
        part = [[x[i] for i in rows_of_rank] for x in (whole.ids, whole.seeds)]
        generation, lag = ahead(Request(2, part[0], part[1], list(rows_of_rank)))
        assert lag == 1
        parts.append(generation)
    assert parts[1].responses + parts[2].responses == parts[0].responses
    assert parts[1].prompts + parts[2].prompts == [list(ids) for ids in whole.ids]
    assert parts[0].finished.tolist() == [*parts[1].finished.tolist(), *parts[2].finished.tolist()]


def test_other_prompts_than_the_datas_are_refused(tmp_path: Path) -> None:
    made = trainer(tmp_path / "run", Beside(), rollout=AHEAD)
    made.step(PROMPTS)
    with pytest.raises(UserError, match=r"rollout.ahead: given 1, .* use train\(\)"):
        made.step(PROMPTS)


@pytest.mark.parametrize("engine", ["transformers", Copying()])
def test_an_engine_in_the_trainers_process_is_refused(engine: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rollout.ahead: given 1, but engine .* servers can: "):
        trainer(tmp_path / "run", engine, rollout=AHEAD)


def test_a_loss_that_does_not_know_of_stale_weights_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rollout.ahead: .* set rollout.importance={cap: 2} or"):
        tiny_config(Path("run"), rollout={"ahead": 1})
