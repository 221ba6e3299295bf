"""A decision process small enough to list: every response, its probability and exact values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

Prefix = tuple[int, ...]
EOS = 2


@dataclass(frozen=True)
class Toy:
    """A random policy and rewards over responses of up to `longest` tokens, of three kinds.

    Token 2 is EOS. Every token has a reward that depends on all tokens before it. A response of
    `longest` tokens without EOS is cut too, but nothing would follow.

    gamma   discount per token
    limit   tokens after which responses are cut, those that begin with token 0 one earlier, so that
            a cut response is not always the longest; None: at `longest`
    """

    longest: int = 3
    seed: int = 0
    gamma: float = 1.0
    limit: int | None = None

    @property
    def description(self) -> str:
        """The toy in words, for messages."""
        words = "a toy with exact values"
        if self.gamma != 1.0:
            words += f", discounted by {self.gamma:g} per token"
        if self.limit is not None:
            words += (
                f", cut after {self.limit} tokens, one less after token 0, with the value there in "
                "bootstrap_B"
            )
        return words

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
        """Every response, complete or cut at the limit."""
        return [
            (*prefix, token)
            for prefix in self.prefixes
            for token in range(EOS + 1)
            if self.is_reached(prefix) and not self.is_reached((*prefix, token))
        ]

    def is_reached(self, prefix: Prefix) -> bool:
        """Whether a token is chosen after a prefix: it is neither complete nor cut."""
        most = self.longest if self.limit is None else self.limit - (prefix[:1] == (0,))
        return EOS not in prefix and len(prefix) < most

    def steps(self, response: Prefix) -> Iterator[tuple[int, int]]:
        """`(index of the prefix, token)` of each choice in a response."""
        for t, token in enumerate(response):
            yield self._number[response[:t]], token

    def rewards(self, response: Prefix) -> list[float]:
        """The reward of each token."""
        return [float(self.token_rewards[step]) for step in self.steps(response)]

    def logprobs(self, response: Prefix, logits: Tensor) -> Tensor:
        """[T] of the tokens of a response."""
        return torch.stack([logits[s].log_softmax(0)[a] for s, a in self.steps(response)])

    def value(self, prefix: Prefix) -> float:
        """Expected discounted sum of the rewards that follow a prefix."""
        return self._values.get(prefix, 0.0)

    @cached_property
    def _values(self) -> dict[Prefix, float]:
        values: dict[Prefix, float] = {}
        for prefix in reversed(self.prefixes):
            s = self._number[prefix]
            chances, rewards = self.logits[s].softmax(0).tolist(), self.token_rewards[s].tolist()
            after = [self.gamma * values.get((*prefix, a), 0.0) for a in range(3)]
            values[prefix] = sum(
                p * (r + v) for p, r, v in zip(chances, rewards, after, strict=True)
            )
        return values

    @cached_property
    def _number(self) -> dict[Prefix, int]:
        return {prefix: i for i, prefix in enumerate(self.prefixes)}

    def gradient(self, starts: Sequence[int]) -> Tensor:
        """Policy gradient by the logits, [prefixes, 3], from exact advantages of all tokens.

        The advantage of token t counts gamma^(t - s), s being the latest of `starts` up to t; those
        beyond the limit nothing. With gamma 1 it is the gradient of the expected sum of rewards.
        """
        gradient = torch.zeros_like(self.logits)
        for prefix, s in self._number.items():
            if not self.is_reached(prefix):
                continue
            chance = self.logprobs(prefix, self.logits).sum().exp() if prefix else 1.0
            after = [self.gamma * self.value((*prefix, a)) for a in range(3)]
            advantages = (
                self.token_rewards[s]
                + torch.tensor(after, dtype=torch.float64)
                - self.value(prefix)
            )
            latest = max(start for start in starts if start <= len(prefix))
            factor = chance * self.gamma ** (len(prefix) - latest)
            gradient[s] = factor * self.logits[s].softmax(0) * advantages
        return gradient
