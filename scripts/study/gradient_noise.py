"""The variance of the policy's gradient by arm, for one policy and critic budget.

    python scripts/study/gradient_noise.py configs/study/recall.yaml --arms token "n-gram 5"

The policy stays as the task starts it. An arm's critic is trained on the policy's rollouts for
`--critic-updates` updates and then frozen. Then the gradients g_1, ..., g_K of the policy's loss
are computed on K independent rollouts, the same for all arms with as many responses per prompt.

noise    tr Cov(g) / |E g|^2: how many rollouts an update must average for a gradient that is as
         much signal as noise. |E g|^2 is the mean of g_k . g_l over k != l, which is unbiased,
         while the square of the mean gradient is too large by tr Cov(g) / K
cosine   between E g and that of the reference arm, by the same unbiased products: how far the arm's
         gradient points where the reward rises. The gradient of the default reference, token PPO
         with lambda 1, has no bias from its critic

Both have half of a 95% interval (jackknife over rollouts), and neither depends on the length of
gradients, so that whitened advantages need no account. All gradients are kept in memory; of a large
model `--every 17` keeps one weight in 17, which estimates the same two ratios. Results go to
runs/study/TASK/gradient.json, arm by arm; arms that are there are not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml
from torch import Tensor

from marlhf.config import PPOConfig
from marlhf.config.loading import apply_overrides, config_from_dict, read_yaml
from marlhf.training.ppo import PPOTrainer

REFERENCE = "token, lambda 1"


def main() -> None:
    """Measure the arms that are not measured yet."""
    parser = parser_of(__doc__)
    parser.add_argument("--arms", nargs="+", help="some of the arms")
    parser.add_argument("--reference", default=REFERENCE)
    args = parser.parse_intermixed_args()
    settings = yaml.safe_load(args.task.read_text(encoding="utf-8"))
    folder: Path = args.out / args.task.stem
    folder.mkdir(parents=True, exist_ok=True)
    file, kept = folder / "gradient.json", folder / "gradient-reference.pt"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for name in dict.fromkeys([args.reference, *(args.arms or settings["arms"])]):
        if name in results:
            continue
        total = args.critic_updates + args.rollouts
        trainer = build(
            Path(settings["config"]), settings["arms"][name], args.overrides, total, folder
        )
        gradients, rows = measure(trainer, args.critic_updates, args.rollouts, args.every)
        if name == args.reference:
            torch.save(gradients, kept)
        results[name] = {
            **summary(gradients, torch.load(kept, weights_only=True)),
            "rollouts": args.rollouts,
            "critic_updates": args.critic_updates,
            **{key: average(rows, key) for key in ("advantage_std", "explained_variance")},
        }
        file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(name, json.dumps(results[name]), flush=True)


def parser_of(doc: str) -> argparse.ArgumentParser:
    """The options for measuring gradients; `doc` is the script's docstring."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("task", type=Path, help="a file such as configs/study/recall.yaml")
    parser.add_argument("--critic-updates", type=int, default=30)
    parser.add_argument("--rollouts", type=int, default=64)
    parser.add_argument("--every", type=int, default=1, help="weights, of which one is kept")
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("overrides", nargs="*", help="keys for all arms, such as seed=3")
    return parser


def build(
    config: Path, arm: Mapping[str, Any], overrides: list[str], updates: int, folder: Path
) -> PPOTrainer:
    """A trainer of an arm, with a constant learning rate and unclipped gradients."""
    fixed = {
        "optimizer.schedule": "constant",
        "optimizer.max_grad_norm": 1e9,
        "ppo.epochs": 1,
        "ppo.minibatches": 1,
        "steps": updates,
        "log.progress": False,
        "log.samples": 0,
        "output_dir": str(folder / "gradient"),
        "overwrite": True,
    }
    words = [f"{key}={json.dumps(value)}" for key, value in {**arm, **fixed}.items()]
    values = apply_overrides(PPOConfig, read_yaml(config), [*overrides, *words])
    return PPOTrainer(config_from_dict(PPOConfig, values))


def measure(
    trainer: PPOTrainer, critic_updates: int, rollouts: int, every: int = 1
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Gradients [K,N] of the policy on K rollouts, without optimiser steps, and their metrics.

    The critic is trained first, for `critic_updates` updates. Of each parameter, one weight in
    `every` is kept.
    """
    gradients: list[Tensor] = []

    def keep() -> None:
        gradients.append(torch.cat([_gradient(p)[::every] for p in trainer.policy.parameters]))
        trainer.policy.discard()

    _replace_step(trainer.policy, trainer.policy.discard)
    rows = []
    for update in range(critic_updates + rollouts):
        if update == critic_updates:
            _replace_step(trainer.policy, keep)
            if trainer.critic is not None:
                _replace_step(trainer.critic, trainer.critic.discard)
        size = trainer.config.rollout.batch_size
        rows.append(trainer.step(trainer.stream.batch(update, size)))
    return torch.stack(gradients), rows[critic_updates:]


def _replace_step(learner: Any, step: Callable[[], None]) -> None:
    """Replace a learner's optimiser step."""
    learner.step = lambda gradient: step()


def _gradient(parameter: Tensor) -> Tensor:
    grad = parameter.grad
    return torch.zeros_like(parameter).flatten() if grad is None else grad.detach().flatten().cpu()


def average(rows: list[dict[str, Any]], key: str) -> float | None:
    """The mean of a metric, None where it is not measured."""
    values = [row[key] for row in rows if row.get(key) is not None]
    return fmean(values) if values else None


# --- from gradients to numbers


def summary(gradients: Tensor, reference: Tensor) -> dict[str, float | None]:
    """Noise of gradients [K,N], and their cosine with a reference [K,N] of the same rollouts.

    Each with half of its 95% interval; None where the signal is too small.
    """
    gg, hh = products(gradients, gradients), products(reference, reference)
    gh = products(gradients, reference)
    return estimate("noise", noise_of, gg) | estimate("cosine", cosine_of, gg, hh, gh)


def noise_of(gg: Tensor) -> float | None:
    """tr Cov(g) / |E g|^2 from g_k . g_l [K,K]."""
    return covariance(gg) / signal(gg) if signal(gg) > 0 else None


def cosine_of(gg: Tensor, hh: Tensor, gh: Tensor) -> float | None:
    """Cosine of E g and E h from g_k . g_l, h_k . h_l and g_k . h_l [K,K]."""
    lengths = signal(gg), signal(hh)
    return signal(gh) / math.sqrt(lengths[0] * lengths[1]) if min(lengths) > 0 else None


def products(ours: Tensor, theirs: Tensor) -> Tensor:
    """g_k . h_l [K,K], float64."""
    return (ours @ theirs.T).double()


def signal(products: Tensor) -> float:
    """E g . E h: the mean over k != l."""
    count = len(products)
    return float(products.sum() - products.diagonal().sum()) / (count * (count - 1))


def covariance(products: Tensor) -> float:
    """tr Cov(g, h)."""
    return float(products.diagonal().mean()) - signal(products)


def estimate(
    name: str, statistic: Callable[..., float | None], *products: Tensor
) -> dict[str, float | None]:
    """A statistic of products [K,K], and half of its 95% interval (jackknife over rollouts)."""
    count = len(products[0])
    everything = torch.arange(count)
    value = statistic(*products)
    without = [everything[everything != i] for i in range(count)]
    left = [statistic(*(p[i][:, i] for p in products)) for i in without]
    known = [x for x in left if x is not None]
    if value is None or len(known) < count:
        return {name: None, f"{name}_half": None}
    centre = fmean(known)
    variance = (count - 1) / count * sum((x - centre) ** 2 for x in known)
    return {name: value, f"{name}_half": 1.96 * math.sqrt(variance)}


if __name__ == "__main__":
    main()
