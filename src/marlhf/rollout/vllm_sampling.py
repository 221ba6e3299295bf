"""What vLLM's engines share: sampling parameters, responses as a batch, and tied weights."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from marlhf.common.types import Generation
from marlhf.config import RolloutSettings
from marlhf.models.loading import position_limit
from marlhf.models.policy import Policy, unwrapped
from marlhf.rollout.engine import EngineContext
from marlhf.rollout.transformers_engine import left_pad, pad_token_id


@dataclass(frozen=True)
class Sampled:
    """A response.

    logprobs   of its tokens, nats, under the distribution that they were drawn from
    versions   names of the weights that it was sampled with, if they have any
    """

    tokens: Sequence[int]
    logprobs: Sequence[float]
    finished: bool
    versions: Collection[str] = ()


@dataclass(frozen=True)
class PolicyFacts:
    """What sampling needs to know of a policy.

    longest   tokens of a sequence, prompt and response: the run's limit, or the model's if smaller
    tied      names of tied parameters, by the name of the first parameter with that tensor
    """

    eos_ids: Sequence[int]
    pad_id: int
    device: torch.device
    longest: int
    tied: dict[str, list[str]] = field(repr=False)

    @staticmethod
    def of(context: EngineContext) -> PolicyFacts:
        """The facts of a context's policy."""
        policy: Policy = context.distributed.unwrap(context.policy)
        pad_id = pad_token_id(context.tokenizer, policy.eos_ids)
        lm = unwrapped(policy.model)
        longest = min(context.longest, position_limit(lm.config) or context.longest)
        device = context.distributed.device
        return PolicyFacts(policy.eos_ids, pad_id, device, longest, _tied_names(lm))

    def parameters(self, seed: int, settings: RolloutSettings) -> dict[str, Any]:
        """Arguments of vLLM's SamplingParams, for one response."""
        return {
            "seed": seed % 2**63,
            "temperature": settings.temperature,
            "top_k": settings.top_k,
            "top_p": settings.top_p,
            "max_tokens": settings.max_new_tokens,
            "min_tokens": settings.min_new_tokens,
            "stop": list(settings.stop_strings),
            "include_stop_str_in_output": True,
            "stop_token_ids": list(self.eos_ids),
            "ignore_eos": True,  # EOS ids are ours: those of the model and of the tokenizer
            "detokenize": bool(settings.stop_strings),
            "logprobs": 0,
        }

    def generation(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sampled]
    ) -> Generation:
        """Responses to prompts as a batch."""
        T = max(len(response.tokens) for response in responses)
        response_ids = torch.full((len(responses), T), self.pad_id)
        logprobs = torch.zeros(len(responses), T)
        for i, response in enumerate(responses):
            length = len(response.tokens)
            response_ids[i, :length] = torch.tensor(response.tokens, dtype=torch.int64)
            logprobs[i, :length] = torch.tensor(response.logprobs)
        lengths = torch.tensor([len(response.tokens) for response in responses])
        finished = torch.tensor([response.finished for response in responses])
        prompt_ids, prompt_mask = left_pad(prompts, self.pad_id)
        response_mask = torch.arange(T) < lengths[:, None]
        tensors = prompt_ids, prompt_mask, response_ids, response_mask, finished, logprobs
        return Generation(*(x.to(self.device) for x in tensors))

    def with_tied(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The weights, tied ones under every name: vLLM may pack each separately."""
        for name, weight in weights:
            yield name, weight
            for other in self.tied.get(name, ()):
                yield other, weight


def _tied_names(lm: Any) -> dict[str, list[str]]:
    """Names of tied parameters, by the name of the first parameter with that tensor."""
    first: dict[int, str] = {}
    tied: dict[str, list[str]] = {}
    for name, parameter in lm.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            tied.setdefault(first[id(parameter)], []).append(name)
        first.setdefault(id(parameter), name)
    return tied
