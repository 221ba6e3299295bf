"""The study's measurements of gradients, on gradients whose mean and noise are known."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import tiny_trainer

sys.path.append(str(Path(__file__).parents[2] / "scripts" / "study"))

import gradient_noise
import gradient_shares


def gradients_around(mean: torch.Tensor, scale: float, count: int, seed: int = 0) -> torch.Tensor:
    noise = torch.randn((count, len(mean)), generator=torch.Generator().manual_seed(seed))
    return mean + scale * noise


def test_noise_and_cosine_of_gradients_with_known_ones():
    """Noise of N weights with standard deviation s around m: N s^2 / |m|^2."""
    mean, other = torch.zeros(400), torch.zeros(400)
    mean[:4] = 1.0  # |m|^2 = 4
    other[2:6] = 1.0  # half of it in common
    ours = gradients_around(mean, 0.3, 200)
    # the same rollouts: their noise is common to both, and must not count as agreement
    theirs = ours - mean + other
    found = gradient_noise.summary(ours, theirs)
    assert found["noise"] == pytest.approx(400 * 0.09 / 4, rel=0.15)
    assert found["cosine"] == pytest.approx(0.5, abs=0.1)
    assert abs(found["noise"] - 9.0) < 1.5 * found["noise_half"]  # type: ignore[operator]
    # the plain estimates are both far too good
    plain = ours.mean(0).square().sum()
    assert ours.var(0).sum() / plain < 0.98 * found["noise"]  # type: ignore[operator]
    few = gradient_noise.summary(ours[:10], theirs[:10])
    together = torch.nn.functional.cosine_similarity(ours[:10].mean(0), theirs[:10].mean(0), 0)
    assert few["cosine"] is None or few["cosine"] < together
    assert gradient_noise.summary(gradients_around(0 * mean, 1.0, 8), theirs[:8])["noise"] is None


def test_gradients_are_of_a_policy_that_stays(tmp_path):
    """With a macro action a token n-gram and token PPO have the same gradients; the critic learns
    at first, then stays."""
    found = []
    for name, spec in (("token", "token"), ("ngram", {"name": "ngram", "n": 1})):
        trainer = tiny_trainer(
            tmp_path / name, segmenter=spec, ppo={"minibatches": 1, "epochs": 1}, steps=4
        )
        before = [p.detach().clone() for p in trainer.policy.parameters]
        assert trainer.critic is not None
        critic = [p.detach().clone() for p in trainer.critic.parameters]
        gradients, metrics = gradient_noise.measure(trainer, critic_updates=1, rollouts=3)
        assert gradients.shape == (3, sum(p.numel() for p in before))
        assert len(metrics) == 3
        assert gradients.abs().sum(1).min() > 0
        assert not torch.equal(gradients[0], gradients[1])
        for old, new in zip(before, trainer.policy.parameters, strict=True):
            assert torch.equal(old, new)
        moved = zip(critic, trainer.critic.parameters, strict=True)
        assert any(not torch.equal(old, new) for old, new in moved)
        found.append(gradients)
    torch.testing.assert_close(found[0], found[1])


def test_one_weight_in_several_is_kept_of_each_parameter(tmp_path):
    keys: dict[str, Any] = {"ppo": {"minibatches": 1, "epochs": 1}, "steps": 3}
    whole, thin = (
        gradient_noise.measure(tiny_trainer(tmp_path / str(every), **keys), 1, 2, every)[0]
        for every in (1, 7)
    )
    sizes = [p.numel() for p in tiny_trainer(tmp_path / "sizes", **keys).policy.parameters]
    parts = [part[:, ::7] for part in whole.split(sizes, 1)]
    torch.testing.assert_close(thin, torch.cat(parts, 1))


def test_shares_of_groups_with_known_means_and_noise():
    """Means of 1, 3 and 0 along one weight, standard deviations of 0.3, 0.1 and 0.5 in all 50: of
    a signal of 4 * 4 the shares are 4, 12 and 0, of the noise those of the variances."""
    means, scales = [1.0, 3.0, 0.0], [0.3, 0.1, 0.5]
    groups = [
        gradients_around(torch.eye(50)[0] * mean, scale, 400, seed)
        for seed, (mean, scale) in enumerate(zip(means, scales, strict=True))
    ]
    weighted = groups[0] + 0.5 * groups[1]
    found = gradient_shares.summary(torch.stack([*groups, weighted], 1), edges=[0, 1, 4])
    assert [group["from"] for group in found["groups"]] == [0, 1, 4]
    signals = [group["signal"] for group in found["groups"]]
    noises = [group["noise"] for group in found["groups"]]
    assert signals == pytest.approx([0.25, 0.75, 0.0], abs=0.02)
    assert noises == pytest.approx([0.09 / 0.35, 0.01 / 0.35, 0.25 / 0.35], abs=0.02)
    assert sum(signals) == pytest.approx(1.0)
    assert sum(noises) == pytest.approx(1.0)
    assert found["noise"] == pytest.approx(50 * 0.35 / 16, rel=0.05)
    assert found["weighted"] == pytest.approx(50 * (0.09 + 0.25 * 0.01) / 2.5**2, rel=0.05)
    assert 0 < found["groups"][2]["signal_half"] < 0.05


def test_weights_of_tokens_by_hand():
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    last, near, far, weighted = gradient_shares.token_weights(mask, [0, 1, 3], 0.5)
    assert last.tolist() == [[0, 0, 0, 0, 1], [0, 1, 0, 0, 0]]
    assert near.tolist() == [[0, 0, 1, 1, 0], [1, 0, 0, 0, 0]]
    assert far.tolist() == [[1, 1, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert weighted[mask].tolist() == [0.0625, 0.125, 0.25, 0.5, 1, 0.5, 1]


def test_gradients_of_groups_add_up_to_those_of_all_tokens(tmp_path):
    """The critic, which learns from the first update, must learn once in it, not once a group."""
    ppo: dict[str, Any] = {"minibatches": 1, "epochs": 1, "lam": 1.0}
    keys: dict[str, Any] = {"segmenter": "token", "ppo": ppo, "steps": 3}
    keys["optimizer"] = {"max_grad_norm": 1e9}
    found = []
    for name in ("whole", "split"):
        trainer: Any = tiny_trainer(tmp_path / name, **keys)
        if name == "split":
            trainer.update = gradient_shares.SplitUpdate(trainer.update, 1, [0, 1, 4], lam=1.0)
        found.append(gradient_noise.measure(trainer, critic_updates=1, rollouts=2)[0])
    whole, split = found[0], found[1].unflatten(0, (2, 4))
    torch.testing.assert_close(split[:, :3].sum(1), whole)
    torch.testing.assert_close(split[:, 3], whole)  # lambda 1: every token counts the same
    assert split[:, :3].abs().sum(-1).min() > 0
