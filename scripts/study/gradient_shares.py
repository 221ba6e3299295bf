"""Shares of the policy's gradient by tokens' distance from the end of the response.

    python scripts/study/gradient_shares.py configs/study/summaries.yaml

As in gradient_noise.py the policy stays as the task starts it, and the critic is trained first and
then frozen. The arm is token PPO with lambda 1, where every token's advantage contains all of the
reward to come. A rollout's gradient g is the sum of the g_b of the tokens at distances b from the
end, so that |E g|^2 and tr Cov(g) are sums over b too:

signal     E g_b . E g as a share of |E g|^2
noise      tr Cov(g_b, g) as a share of tr Cov(g)
weighted   noise over signal, as in gradient_noise.py, of the sum over tokens of lambda^distance
           times their gradient: GAE with that lambda and a critic that gives all states one value

Signals are means over pairs of rollouts, so that they are unbiased and may come out below 0; each
has half of a 95% interval (jackknife over rollouts). Results go to runs/study/TASK/shares.json.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from gradient_noise import (
    REFERENCE,
    build,
    covariance,
    estimate,
    measure,
    noise_of,
    parser_of,
    products,
    signal,
)
from torch import Tensor

from marlhf.algorithm.experience import Experience
from marlhf.runs.metrics import Metrics
from marlhf.training.update import PPOUpdate

EDGES = [0, 1, 4, 8, 16, 32]  # tokens from the end at which a group begins


def main() -> None:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--lam", type=float, default=0.95)
    args = parser.parse_intermixed_args()
    settings = yaml.safe_load(args.task.read_text(encoding="utf-8"))
    folder: Path = args.out / args.task.stem
    folder.mkdir(parents=True, exist_ok=True)
    updates = args.critic_updates + args.rollouts
    arm = settings["arms"][REFERENCE]
    trainer: Any = build(Path(settings["config"]), arm, args.overrides, updates, folder)
    limit = trainer.config.rollout.max_new_tokens
    edges = [edge for edge in EDGES if edge < limit]
    trainer.update = SplitUpdate(trainer.update, args.critic_updates, edges, args.lam)
    gradients, _ = measure(trainer, args.critic_updates, args.rollouts, args.every)
    shares = summary(gradients.unflatten(0, (args.rollouts, len(edges) + 1)), edges)
    keys = {"arm": REFERENCE, "lam": args.lam}
    shares |= keys | {"rollouts": args.rollouts, "critic_updates": args.critic_updates}
    (folder / "shares.json").write_text(json.dumps(shares, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(shares, indent=1))


@dataclass(frozen=True)
class SplitUpdate:
    """From update `first` on, runs one update per group of tokens.

    The last one is of all tokens, weighted by lam^distance.
    """

    update: PPOUpdate
    first: int
    edges: Sequence[int]
    lam: float

    def __call__(self, experience: Experience, update: int, metrics: Metrics) -> None:
        if update < self.first:
            return self.update(experience, update, metrics)
        for weights in token_weights(experience.response_mask, self.edges, self.lam):
            part = replace(experience, advantages=experience.advantages * weights)
            self.update(part, update, Metrics())
        return None


def token_weights(mask: Tensor, edges: Sequence[int], lam: float) -> list[Tensor]:
    """For each group of distances from the end its tokens [B,T], and lam^distance."""
    distance = mask.sum(1, keepdim=True) - 1 - torch.arange(mask.shape[1], device=mask.device)
    ends = [*edges[1:], mask.shape[1]]
    groups = [(distance >= edge) & (distance < end) for edge, end in zip(edges, ends, strict=True)]
    return [group.float() for group in groups] + [lam ** distance.clamp(min=0).float()]


def summary(gradients: Tensor, edges: Sequence[int]) -> dict[str, Any]:
    """From the gradients [K,G+1,N] of K rollouts: those of G groups of tokens, and weighted."""
    *parts, weighted = gradients.unbind(1)
    total = torch.stack(parts).sum(0)
    gg = products(total, total)
    crossed = [products(part, total) for part in parts]
    return {
        **estimate("noise", noise_of, gg),
        **estimate("weighted", noise_of, products(weighted, weighted)),
        "groups": [
            {
                "from": edge,
                **estimate("signal", signal_share, cross, gg),
                **estimate("noise", noise_share, cross, gg),
            }
            for edge, cross in zip(edges, crossed, strict=True)
        ],
    }


def signal_share(part: Tensor, total: Tensor) -> float | None:
    """E g_b . E g / |E g|^2 from g_b . g and g . g, [K,K] each."""
    return signal(part) / signal(total) if signal(total) > 0 else None


def noise_share(part: Tensor, total: Tensor) -> float | None:
    """tr Cov(g_b, g) / tr Cov(g)."""
    return covariance(part) / covariance(total) if covariance(total) > 0 else None


if __name__ == "__main__":
    main()
