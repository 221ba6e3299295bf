"""Policy gradients of single prompts, sketched, for the noise of a gradient under several arms.

The gradient of a prompt is that of the policy's term of the loss at ratio 1, over its responses,

    g = sum_t weight_t A_t d log pi(token t) / d parameters

without KL penalty and entropy bonus in the loss. It is linear in the advantages, so an arm costs
one forward and one backward pass over its responses.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from marlhf.algorithm.losses import aggregation
from marlhf.common.types import Sequences
from marlhf.config import PPOConfig
from marlhf.distributed import Distributed
from marlhf.models.policy import forward

BUCKETS = 4099  # a prime, so that the columns of weight matrices spread over all of them
_AT_ONCE = BUCKETS * 4096


def sketch(gradients: Iterable[Tensor], buckets: int = BUCKETS) -> Tensor:
    """Random projection of a gradient, float64 [buckets]; the same for every gradient.

    Each entry gets a random sign, and is added to one bucket: inner products of sketches are
    unbiased estimates of those of the gradients, with a relative error of about
    sqrt(2 / buckets) (the count sketch of Charikar, Chen & Farach-Colton 2002).
    """
    total, place = torch.zeros(buckets, dtype=torch.float64), 0
    generator: torch.Generator | None = None
    for gradient in gradients:
        if generator is None:
            generator = torch.Generator(gradient.device).manual_seed(0)
        for part in gradient.detach().reshape(-1).split(_AT_ONCE):
            bits = torch.randint(2, part.shape, generator=generator, device=part.device)
            signed = part.double() * (2 * bits - 1)
            first = place % buckets
            padded = torch.nn.functional.pad(
                signed, (first, -(first + len(signed)) % buckets)
            ).reshape(-1, buckets)
            total += padded.sum(0).cpu()
            place += len(part)
    return total


def prompt_gradient(
    policy: nn.Module,
    parameters: Sequence[nn.Parameter],
    sequences: Sequences,
    credit_BT: Tensor,
    config: PPOConfig,
    ranks: Distributed,
) -> list[Tensor]:
    """Gradient of one prompt's responses; a tensor for each parameter.

    credit_BT   advantages times weights
    """
    mask = sequences.response_mask
    limit = config.rollout.max_new_tokens
    weights, _ = aggregation(mask, config.ppo.aggregate, 1.0, 1.0, limit)
    credit_BT = (credit_BT if weights is None else credit_BT * weights.to(credit_BT)).where(mask, 0)
    size = config.optimizer.micro_batch_size
    total: list[Tensor] = []
    policy.train()
    for index in torch.arange(len(mask)).split(size):
        part = sequences.select(index)
        credit = credit_BT[index.to(credit_BT.device), : part.response_mask.shape[1]]
        with torch.enable_grad(), ranks.autocast():
            logprobs, _ = forward(policy, part, **config.logprob_settings)
            objective = (logprobs * credit.to(logprobs)).sum()
        of_part = torch.autograd.grad(objective, parameters, allow_unused=True)
        zeros = (
            torch.zeros_like(p) if g is None else g
            for g, p in zip(of_part, parameters, strict=True)
        )
        total = list(zeros) if not total else [a + b for a, b in zip(total, zeros, strict=True)]
    policy.eval()
    return total


def inner_products(sketches: Sequence[Tensor]) -> Tensor:
    """[P,P] of the gradients of P prompts, from their sketches."""
    stacked = torch.stack(list(sketches))
    return stacked @ stacked.T
