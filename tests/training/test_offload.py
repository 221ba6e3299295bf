"""What waits in host memory moves to the device for its phase, and changes no result."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from support.accelerator import is_on, pretended
from support.runs import PROMPTS, tiny_config, tiny_trainer, vowels
from support.tiny_models import BYTES_VOCAB, byte_tokenizer, tiny_sequence_classifier

from marlhf.common.errors import UserError
from marlhf.config import LoraSettings
from marlhf.rewards import CombinedReward, RewardModel
from marlhf.rollout import worker
from marlhf.training.offload import check_offload, offload
from marlhf.training.ppo import PPOTrainer

ALL = ["reference", "reward", "optimizer"]


def test_without_a_gpu_a_line_says_that_nothing_moves(tmp_path: Path) -> None:
    run = tiny_trainer(tmp_path, offload=ALL)
    (note,) = (note for note in run.notes if "offload" in note)
    assert "but there is no GPU: all is in host memory" in note
    assert not run.policy.is_offloaded


def test_what_there_is_not_is_a_line(tmp_path: Path) -> None:
    config, device = tiny_config(tmp_path, offload=ALL), torch.device("cuda")
    notes = offload(config, None, CombinedReward([]), [], device)
    assert [note.split(", but ")[1] for note in notes] == [
        "nothing in this run reads a reference",
        "no reward model has a base of its own",
    ]


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="given 'reference' with model"):
        tiny_config(tmp_path, offload=["reference"], model={"lora": LoraSettings()})
    config = tiny_config(tmp_path, offload=ALL)
    check_offload(config, 2)
    with pytest.raises(UserError, match=r"offload: given \[.*\] under ZeRO-3.* zero3_offload"):
        check_offload(config, 3)


def idle(trainer: PPOTrainer) -> list[torch.Tensor]:
    """Tensors of the reference, of reward models and of both optimisers' states."""
    assert trainer.critic is not None
    assert trainer.reference is not None
    functions = [reward.function for reward in trainer.reward.rewards]
    models = [trainer.reference, *(f.model for f in functions if isinstance(f, RewardModel))]
    tensors = [x for model in models for x in (*model.parameters(), *model.buffers())]
    for learner in (trainer.policy, trainer.critic):
        states = learner.optimizer.state.values()
        tensors += [x for state in states for x in state.values() if isinstance(x, torch.Tensor)]
    return tensors


def rows(folder: Path) -> list[dict[str, Any]]:
    """Metrics of a run, without its times."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    timed = ("seconds", "per_second", "memory_gb")
    return [{k: v for k, v in row.items() if not k.endswith(timed)} for row in lines]


def test_each_is_on_the_device_in_its_phase_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for family in ("llama", "bert"):
        tiny_sequence_classifier(family, BYTES_VOCAB).save_pretrained(tmp_path / family)
        byte_tokenizer(add_bos=True).save_pretrained(tmp_path / family)

    def trainer(folder: str, **changes: Any) -> PPOTrainer:
        score = [str(tmp_path / "llama"), str(tmp_path / "bert"), vowels]
        keys = {"checkpoint": {"every": 1}, "rollout": {"max_new_tokens": 4}, **changes}
        return tiny_trainer(tmp_path / folder, score=score, **keys)

    with pretended():
        plain = trainer("plain")
        plain.train()
        assert all(map(is_on, idle(plain)))
        run = trainer("run", offload=ALL)
        at_start = len(idle(run))
        run.train()
        assert len(idle(run)) > at_start  # AdamW has states now
        checkpoint = str(tmp_path / "run" / "checkpoints" / "step-1")
        again = trainer("run", offload=ALL, overwrite=False, resume=checkpoint)
        again.train()
        assert rows(tmp_path / "run") == rows(tmp_path / "plain")
        for other in (run, again):
            assert not any(map(is_on, idle(other)))
            for x, expected in zip(idle(other), idle(plain), strict=True):
                assert torch.equal(x.cpu(), expected.cpu())
        monkeypatch.setattr(worker, "in_use", lambda module: nullcontext())
        with pytest.raises(RuntimeError, match="same device"):
            run.step(PROMPTS)
