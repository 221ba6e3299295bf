"""A decision process small enough to list: every response, its probability and exact values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

Prefix = tuple[int, ...]
EOS = 2


@dataclass(frozen=True)
class Toy:
    """A random policy and rewards over responses of up to `longest` tokens, of three kinds.

    Token 2 is EOS. Every token has a reward that depends on all tokens before it.
    """

    longest: int = 3
    seed: int = 0

    @cached_property
    def prefixes(self) -> list[Prefix]:
        """Every prefix in which a token is chosen, the empty one first."""
        prefixes: list[Prefix] = [()]
        for prefix in prefixes:
            if len(prefix) + 1 < self.longest:
                prefixes += [(*prefix, token) for token in range(EOS)]
        return prefixes

    @cached_property
    def logits(self) -> Tensor:
        """[prefixes, 3] float64."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(len(self.prefixes), 3, generator=generator, dtype=torch.float64)

    @cached_property
    def token_rewards(self) -> Tensor:
        """[prefixes, 3] float64: of each token after each prefix."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        return torch.randn(len(self.prefixes), 3, generator=generator, dtype=torch.float64)

    @cached_property
    def responses(self) -> list[Prefix]:
        """Every complete response."""
        return [
            (*prefix, token)
            for prefix in self.prefixes
            for token in range(3)
            if token == EOS or len(prefix) + 1 == self.longest
        ]

    def steps(self, response: Prefix) -> Iterator[tuple[int, int]]:
        """`(index of the prefix, token)` of each choice in a response."""
        for t, token in enumerate(response):
            yield self.prefixes.index(response[:t]), token

    def rewards(self, response: Prefix) -> list[float]:
        """The reward of each token."""
        return [float(self.token_rewards[step]) for step in self.steps(response)]

    def logprobs(self, response: Prefix, logits: Tensor) -> Tensor:
        """[T] of the tokens of a response."""
        return torch.stack([logits[s].log_softmax(0)[a] for s, a in self.steps(response)])

    def value(self, prefix: Prefix) -> float:
        """Expected sum of the rewards that follow a prefix."""
        if prefix not in self._number:  # complete
            return 0.0
        s = self._number[prefix]
        chances = self.logits[s].softmax(0).tolist()
        return sum(
            p * (float(self.token_rewards[s, a]) + self.value((*prefix, a)))
            for a, p in enumerate(chances)
        )

    @cached_property
    def _number(self) -> dict[Prefix, int]:
        return {prefix: i for i, prefix in enumerate(self.prefixes)}

    @cached_property
    def true_gradient(self) -> Tensor:
        """Gradient of the expected sum of rewards by the logits, [prefixes, 3]."""
        logits = self.logits.clone().requires_grad_()
        expected = torch.zeros((), dtype=torch.float64)
        for response in self.responses:
            probability = self.logprobs(response, logits).sum().exp()
            expected = expected + probability * sum(self.rewards(response))
        (gradient,) = torch.autograd.grad(expected, logits)
        return gradient
