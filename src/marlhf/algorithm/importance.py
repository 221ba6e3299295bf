"""Importance weights: probabilities under the policy over those under the sampling distribution.

An engine rounds differently from the trainer, and top-p or top-k sampling excludes tokens, so that
responses come from a distribution mu other than the policy pi. Weighting by pi / mu corrects for
it; truncating the weights bounds their variance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from marlhf.algorithm.losses import Ratio
from marlhf.algorithm.macro import expand, reduce


def importance_weights(
    logprobs_BT: Tensor,
    sampling_logprobs_BT: Tensor,
    mask_BT: Tensor,
    cap: float,
    ratio: Ratio = "token",
    segment_ids: Tensor | None = None,
) -> Tensor:
    """min(pi / mu, cap) of each term of the policy loss, [B,T], 0 outside the mask.

    logprobs_BT            log pi of the sampled tokens, nats
    sampling_logprobs_BT   log mu of them
    cap                    at least 1
    ratio                  as in `policy_loss`: `macro_product` has one term per macro action, whose
                           weight is that of all its tokens together; the others one per token
    segment_ids            [B,T], needed by `macro_product`

    Source: truncated importance sampling, Ionides 2008; between sampler and trainer of language
    models, Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
    training".
    """
    assert logprobs_BT.shape == sampling_logprobs_BT.shape == mask_BT.shape
    zeros = torch.zeros_like(logprobs_BT)
    log_weights = torch.where(mask_BT, logprobs_BT - sampling_logprobs_BT, zeros)
    if ratio == "macro_product":
        assert segment_ids is not None
        log_weights = expand(reduce(log_weights, segment_ids, "sum"), segment_ids)
    return torch.where(mask_BT, log_weights.exp().clamp(max=cap), zeros)
