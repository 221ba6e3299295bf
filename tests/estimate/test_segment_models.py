"""Reward models inside `per_segment`, which every rank loads by itself."""

from __future__ import annotations

from dataclasses import replace

from marlhf.config import PPOConfig
from marlhf.config.loading import config_from_dict
from marlhf.distributed import Distributed
from marlhf.estimate.command import counter_of
from marlhf.estimate.memory_model import PROFILES, estimate
from marlhf.rewards import build_rewards
from marlhf.rewards.segments import models_inside

BYTES = 4


def test_reward_models_of_segments_are_complete_on_every_rank(saved, monkeypatch):
    """As a run loads them: in fp32 under bf16, not sharded, not offloaded, adapters merged."""
    monkeypatch.chdir(saved)
    inner = {"name": "per_segment", "reward": ["adapter", {"name": "reward"}]}
    spec = [{"name": "per_segment", "reward": inner, "weight": 0.5}, "reward"]
    model = {"path": "policy", "precision": "bf16", "lora": {"r": 2}}
    sections = {"model": model, "reward": {"models": spec}, "offload": ["reward"]}
    run = counter_of(config_from_dict(PPOConfig, sections)).run(2)
    placement = Distributed("bf16").placement()
    built = build_rewards(spec).to("cpu").load(placement)
    *nested, flat = [model.model for _, model in models_inside(built)]
    names = ["per_segment model 1", "per_segment model 2", "reward model"]
    assert run.models.keys() == {"policy", "critic", *names}
    for name, module in zip(names, [*nested, flat], strict=True):
        size = run.models[name]
        assert BYTES * size.frozen - 2 * size.halves == sum(p.nbytes for p in module.parameters())
    assert run.offloaded == {"reward model"}
    assert run.unmapped == sum(p.nbytes for p in nested[0].parameters())
    one, two = (run.models[name] for name in names[1:])
    assert (one.halves, one.unsharded, two.unsharded) == (0, True, False)
    small = replace(run, models={k: m for k, m in run.models.items() if k != names[0]})
    small = replace(small, scoring={k: s for k, s in run.scoring.items() if k != names[0]})
    for profile in PROFILES:
        less = estimate(run, profile, 2).weights - estimate(small, profile, 2).weights
        assert less == BYTES * run.models[names[0]].frozen


def test_a_pass_has_more_segments_than_responses(saved, monkeypatch):
    """16 of them, at the longest: as many as of a batch of 16 responses."""
    monkeypatch.chdir(saved)
    model = {"path": "policy"}
    segments, few, many = (
        counter_of(
            config_from_dict(
                PPOConfig,
                {"model": model, "reward": {"models": spec}, "rollout": {"batch_size": size}},
            )
        ).run(1)
        for spec, size in (
            ({"name": "per_segment", "reward": "reward"}, 4),
            ("reward", 4),
            ("reward", 16),
        )
    )
    counted = segments.scoring["per_segment model"]
    assert counted == many.scoring["reward model"]
    assert counted > 3 * few.scoring["reward model"]
