"""A custom estimator in ten lines: the return less the median of the prompt's responses.

    python examples/custom_estimator.py

Prints the advantages that it, RLOO and GRPO give to four responses to one prompt. In a training run
the same function is named in YAML, by import path:
`ppo: {estimator: my_package.my_module.MedianBaseline}`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from marlhf import Credit, CreditInputs
from marlhf.algorithm.estimators import build_estimator
from marlhf.algorithm.experience import TokenData, macro_batch
from marlhf.config import MacroSettings, PPOSettings

SCORES = [0.0, 0.1, 0.2, 5.0]  # one of four responses is an outlier
TOKENS = 6


@dataclass(frozen=True)
class MedianBaseline:
    """Return less the median of the group's returns, which an outlier does not move."""

    requires = frozenset({"groups"})

    def __call__(self, inputs: CreditInputs) -> Credit:
        returns_GK = inputs.returns_B.reshape(-1, inputs.group_size)
        relative_B = (returns_GK - returns_GK.median(1, keepdim=True).values).flatten()
        return Credit(relative_B[:, None].expand_as(inputs.rewards_BM))


def main() -> None:
    mask = torch.ones(len(SCORES), TOKENS, dtype=torch.bool)
    rewards = torch.zeros(len(SCORES), TOKENS)
    rewards[:, -1] = torch.tensor(SCORES)
    tokens = TokenData(mask, torch.zeros_like(rewards), rewards, None, None, mask[:, 0])
    starts = torch.zeros_like(mask)
    starts[:, ::3] = True  # two macro actions of three tokens
    print(f"scores          {SCORES}")
    for estimator in (MedianBaseline(), "rloo", "grpo"):
        built = build_estimator(estimator)
        group_size, name = len(SCORES), getattr(estimator, "__name__", type(built).__name__)
        batch = macro_batch(
            starts, tokens, MacroSettings(), PPOSettings(), group_size, estimator=built
        )
        advantages = [round(float(x), 2) for x in batch.advantages_BM[:, 0]]
        print(f"{name:<15} {advantages}")


if __name__ == "__main__":
    main()
