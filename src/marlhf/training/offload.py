"""The parts of a PPO run that wait in host memory between their phases."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from marlhf.common.errors import UserError
from marlhf.config import PPOConfig
from marlhf.distributed import keep_on_host
from marlhf.rewards import CombinedReward, RewardModel
from marlhf.training.learner import Learner


def check_offload(config: PPOConfig, zero_stage: int) -> None:
    """Check `offload` against the launch. Raises UserError."""
    if config.offload and zero_stage == 3:
        raise UserError(
            f"offload: given {config.offload} under ZeRO-3, must be left out: there the profile "
            "zero3_offload holds weights and optimiser in host memory"
        )


def offload(
    config: PPOConfig,
    reference: nn.Module | None,
    reward: CombinedReward,
    learners: Iterable[Learner | None],
    device: torch.device,
) -> list[str]:
    """Move to host memory what `offload` names; returns lines on what is not there."""
    if not config.offload:
        return []
    if device.type == "cpu":
        return [f"offload: given {config.offload}, but there is no GPU: all is in host memory"]
    notes = []
    if "reference" in config.offload:
        if reference is None:
            notes.append("offload: given 'reference', but nothing in this run reads a reference")
        else:
            keep_on_host(reference, device)
    if "reward" in config.offload:
        models = [r.function for r in reward.rewards if isinstance(r.function, RewardModel)]
        moved = [model.keep_on_host() for model in models]
        if not any(moved):
            notes.append("offload: given 'reward', but no reward model has a base of its own")
    for learner in learners if "optimizer" in config.offload else ():
        if learner is not None:
            learner.is_offloaded = True
    return notes
