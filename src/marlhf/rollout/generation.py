"""Prompts -> sampled responses.

`Generate` is the only interface to sampling; implement it to plug in another engine. Every call
gets the policy as of the last update.

Nothing downstream depends on the engine: log-probabilities and values come from forward passes over
the sampled sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from marlhf.common.types import Generation
from marlhf.config import RolloutSettings
from marlhf.models.decoding import Decoder, eos_token_ids
from marlhf.models.policy import Policy, use_adapter
from marlhf.rollout.packed_weights import packed, shared_inputs

_COMPACT_AT = 1 / 8  # compact the batch when this share of it has finished


class Generate(Protocol):
    """Interface of a sampling engine: one response per prompt."""

    def __call__(
        self,
        policy: Policy,
        tokenizer: Any,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        settings: RolloutSettings,
    ) -> Generation:
        """Sample with the sampling settings of `settings` alone.

        prompts   token ids
        seeds     seeds[i] fixes all randomness of response i, whatever batch it is in
        """
        ...


@torch.no_grad()
def generate(
    policy: Policy,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    settings: RolloutSettings,
) -> Generation:
    """Sample one response per prompt (token ids).

    Gumbel-max sampling: response i takes the maximum of its warped logits plus Gumbel noise from a
    generator seeded with seeds[i]. The sample is exact, and the same in any batch.
    Only the EOS ids of the model's generation config are used.

    Prefills each distinct prompt once; drops finished sequences from the batch.
    """
    model: Any = policy.model
    lm = model.get_base_model() if hasattr(model, "peft_config") else model
    eos_ids = eos_token_ids(lm, tokenizer)
    pad_id = tokenizer.pad_token_id
    pad_id = pad_id if pad_id is not None else (eos_ids or [0])[0]
    distinct = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    prompt_ids, prompt_mask = (x.to(lm.device) for x in left_pad(list(distinct), pad_id))
    prompt_of = torch.tensor([distinct[tuple(prompt)] for prompt in prompts], device=lm.device)

    training = lm.training
    lm.eval()
    try:
        with use_adapter(model, policy.adapter):
            with shared_inputs(model, policy.adapter) as layers:
                reader = Decoder(lm, prompt_ids, prompt_mask)
            logits = reader.expand(prompt_of, settings.max_new_tokens)
            sampler = _Sampler(seeds, eos_ids, settings, tokenizer, logits.device)
            with packed(layers, policy.adapter, len(prompts), settings.max_new_tokens):
                response_ids, lengths = _decode(reader, logits, sampler, pad_id)
    finally:
        lm.train(training)
    T = response_ids.shape[1]
    finished = lengths > 0
    lengths = torch.where(finished, lengths, T)
    response_mask = torch.arange(T, device=lengths.device) < lengths[:, None]
    return Generation(
        prompt_ids[prompt_of], prompt_mask[prompt_of], response_ids, response_mask, finished
    )


def _decode(
    reader: Decoder, logits: Tensor, sampler: _Sampler, pad_id: int
) -> tuple[Tensor, Tensor]:
    """`(response_ids [B,T], lengths [B])`; length 0 marks a response that is not finished."""
    B, limit = len(logits), sampler.settings.max_new_tokens
    response_ids = torch.full((B, limit), pad_id, device=logits.device)
    lengths = torch.zeros(B, dtype=torch.int64, device=logits.device)
    rows = torch.arange(B, device=logits.device)  # sequences still in the batch
    for t in range(limit):
        tokens = sampler(logits, rows.tolist(), t)
        response_ids[rows, t] = tokens
        done = sampler.ends(response_ids[rows, : t + 1])
        lengths[rows] = torch.where(done & (lengths[rows] == 0), t + 1, lengths[rows])
        going = (lengths[rows] == 0).nonzero().squeeze(1)
        if len(going) == 0 or t + 1 == limit:
            break
        if (len(rows) - len(going)) >= len(rows) * _COMPACT_AT:
            rows, tokens = rows[going], tokens[going]
            reader.keep(going)
        logits = reader.step(tokens)
    T = int(torch.where(lengths > 0, lengths, limit).max())
    beyond = (lengths > 0)[:, None] & (torch.arange(T, device=rows.device) >= lengths[:, None])
    return response_ids[:, :T].masked_fill(beyond, pad_id), lengths


def left_pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Left-padded prompts: `(ids [B,P] int64, mask [B,P] bool)`."""
    P = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (P - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[False] * (P - len(row)) + [True] * len(row) for row in rows])
    return ids, mask


class _Sampler:
    """Next-token sampling per sequence, and detection of finished sequences."""

    def __init__(
        self,
        seeds: Sequence[int],
        eos_ids: Sequence[int],
        settings: RolloutSettings,
        tokenizer: Any,
        device: torch.device,
    ) -> None:
        self.settings = settings
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self._eos_ids = torch.tensor(list(eos_ids), dtype=torch.int64, device=device)
        self._warpers = LogitsProcessorList([TemperatureLogitsWarper(float(settings.temperature))])
        if settings.top_k:
            self._warpers.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1:
            self._warpers.append(TopPLogitsWarper(float(settings.top_p)))
        strings = list(settings.stop_strings)
        self._stop = StopStringCriteria(tokenizer, strings) if strings else None

    def __call__(self, logits: Tensor, rows: Sequence[int], t: int) -> Tensor:
        """Response token t of each sequence [B], from logits [B,V], modified in place."""
        if t < self.settings.min_new_tokens:
            logits[:, self._eos_ids] = -torch.inf
        scores: Any = self._warpers(None, logits)  # pyright: ignore[reportArgumentType]
        noise = torch.stack([_uniform(self._generators[row], logits) for row in rows])
        noise.log_().neg_()  # exponential; as float32 it keeps the precision of the smallest ones
        return scores.sub_(noise.to(torch.float32).log_()).argmax(-1)

    def ends(self, response_ids: Tensor) -> Tensor:
        """[B] bool: the last token of `response_ids [B,t]` ends the response."""
        done = torch.isin(response_ids[:, -1], self._eos_ids)
        if self._stop is not None:
            ended: Any = self._stop(response_ids, None)  # pyright: ignore[reportArgumentType]
            done = done | ended.to(done.device)
        return done


def _uniform(generator: torch.Generator, like: Tensor) -> Tensor:
    """Uniform noise [V], float64: small float32 draws are too coarse for a large vocabulary."""
    return torch.rand(like.shape[1], generator=generator, dtype=torch.float64, device=like.device)
