"""The engine `transformers`: exact sampling, token by token, from the policy itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    LogitsProcessorList,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from marlhf.common.errors import UserError
from marlhf.common.tokenization import Tokenizer
from marlhf.common.types import Generation
from marlhf.config import RolloutSettings
from marlhf.distributed import Distributed
from marlhf.models.decoding import Decoder, eos_token_ids
from marlhf.models.policy import Policy, unwrapped, use_adapter
from marlhf.rollout.engine import EngineContext
from marlhf.rollout.packed_weights import packed, shared_inputs

_COMPACT_AT = 1 / 8  # compact the batch when this share of it has finished


@dataclass(frozen=True)
class Transformers:
    """The default engine: samples from the policy itself, in the trainer's process.

    batch_size   responses sampled at a time, which bounds the KV cache; None: all of a rank
    """

    batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise UserError(f"batch_size: given {self.batch_size}, must be at least 1")

    def __call__(self, context: EngineContext) -> TransformersEngine:
        """Start the engine."""
        policy, tokenizer, distributed = context.policy, context.tokenizer, context.distributed
        return TransformersEngine(policy, tokenizer, distributed, self.batch_size)


@dataclass(frozen=True)
class TransformersEngine:
    """Exact sampling from the policy's own weights, which need no update."""

    policy: nn.Module
    tokenizer: Tokenizer
    distributed: Distributed
    batch_size: int | None = None

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        settings: RolloutSettings,
    ) -> Generation:
        """Sample one response per prompt; under ZeRO-3 all weights are gathered meanwhile."""
        policy: Policy = self.distributed.unwrap(self.policy)
        size = self.batch_size or max(1, len(prompts))
        with self.distributed.gathered(policy), self.distributed.autocast():
            parts = [
                generate(
                    policy, self.tokenizer, prompts[i : i + size], seeds[i : i + size], settings
                )
                for i in range(0, len(prompts), size)
            ]
        return concatenated(parts, pad_token_id(self.tokenizer, policy.eos_ids))

    def update_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """No-op: nothing is copied."""

    def sleep(self) -> None:
        """No-op: the KV cache is freed after each call."""

    def close(self) -> None:
        """No-op."""


@torch.no_grad()
def generate(
    policy: Policy,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    settings: RolloutSettings,
) -> Generation:
    """Sample one response per prompt (token ids).

    Gumbel-max sampling: the next token of response i is the argmax of its warped logits plus Gumbel
    noise from a generator seeded with seeds[i]. The sample is exact, and the same in any batch.
    Only the EOS ids of the model's generation config are used.

    Prefills each distinct prompt once; drops finished sequences from the batch.
    """
    model: Any = policy.model
    lm = unwrapped(model)
    eos_ids = eos_token_ids(lm, tokenizer)
    pad_id = pad_token_id(tokenizer, eos_ids)
    distinct = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    prompt_ids, prompt_mask = (x.to(lm.device) for x in left_pad(list(distinct), pad_id))
    prompt_of = torch.tensor([distinct[tuple(prompt)] for prompt in prompts], device=lm.device)

    training = lm.training
    lm.eval()
    try:
        with use_adapter(model, policy.adapter):
            with shared_inputs(model, policy.adapter) as layers:
                decoder = Decoder(lm, prompt_ids, prompt_mask)
            logits = decoder.expand(prompt_of, settings.max_new_tokens)
            sampler = Sampler(seeds, eos_ids, settings, tokenizer, logits.device)
            with packed(layers, policy.adapter, len(prompts), settings.max_new_tokens):
                response_ids, lengths, logprobs = _decode(decoder, logits, sampler, pad_id)
    finally:
        lm.train(training)
    T = response_ids.shape[1]
    finished = lengths > 0
    lengths = torch.where(finished, lengths, T)
    response_mask = torch.arange(T, device=lengths.device) < lengths[:, None]
    return Generation(
        prompt_ids[prompt_of],
        prompt_mask[prompt_of],
        response_ids,
        response_mask,
        finished,
        logprobs,
    )


def _decode(
    decoder: Decoder, logits: Tensor, sampler: Sampler, pad_id: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`(response_ids [B,T], lengths [B], logprobs [B,T] or None)`.

    Length 0 marks a response that is not finished; log-probs are those of the sampling.
    """
    B, limit = len(logits), sampler.settings.max_new_tokens
    response_ids = torch.full((B, limit), pad_id, device=logits.device)
    lengths = torch.zeros(B, dtype=torch.int64, device=logits.device)
    logprobs = torch.zeros(B, limit, device=logits.device)
    active = torch.arange(B, device=logits.device)  # sequences still in the batch
    for t in range(limit):
        tokens, chosen = sampler(logits, active.tolist(), t)
        response_ids[active, t] = tokens
        if chosen is not None:
            logprobs[active, t] = chosen
        ends = sampler.ends(response_ids[active, : t + 1])
        lengths[active] = torch.where(ends & (lengths[active] == 0), t + 1, lengths[active])
        unfinished = (lengths[active] == 0).nonzero().squeeze(1)
        if len(unfinished) == 0 or t + 1 == limit:
            break
        if (len(active) - len(unfinished)) >= len(active) * _COMPACT_AT:
            active, tokens = active[unfinished], tokens[unfinished]
            decoder.keep(unfinished)
        logits = decoder.step(tokens)
    T = int(torch.where(lengths > 0, lengths, limit).max())
    beyond = (lengths > 0)[:, None] & (torch.arange(T, device=active.device) >= lengths[:, None])
    sampled_logprobs = logprobs[:, :T] if sampler.settings.needs_sampling_logprobs else None
    return response_ids[:, :T].masked_fill(beyond, pad_id), lengths, sampled_logprobs


def concatenated(parts: Sequence[Generation], pad_id: int) -> Generation:
    """Responses of several calls in one batch."""
    if len(parts) == 1:
        return parts[0]

    def columns(name: str, fill: float) -> Tensor:
        tensors = [getattr(part, name) for part in parts]
        width = max(x.shape[1] for x in tensors)
        on_the_left = name.startswith("prompt")
        padded = []
        for x in tensors:
            missing = width - x.shape[1]
            padding = (missing, 0) if on_the_left else (0, missing)
            padded.append(torch.nn.functional.pad(x, padding, value=fill))
        return torch.cat(padded)

    return Generation(
        columns("prompt_ids", pad_id),
        columns("prompt_mask", False),
        columns("response_ids", pad_id),
        columns("response_mask", False),
        torch.cat([part.finished for part in parts]),
        None if parts[0].logprobs is None else columns("logprobs", 0.0),
    )


def pad_token_id(tokenizer: Tokenizer, eos_ids: Sequence[int]) -> int:
    """Id used for padding; any would do, as padding is masked."""
    pad_id = tokenizer.pad_token_id
    return pad_id if pad_id is not None else next(iter(eos_ids), 0)


def left_pad(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Left-padded prompts: `(ids [B,P] int64, mask [B,P] bool)`."""
    P = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (P - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[False] * (P - len(prompt)) + [True] * len(prompt) for prompt in prompts])
    return ids, mask


class Sampler:
    """Next-token sampling per sequence, and detection of finished sequences."""

    def __init__(
        self,
        seeds: Sequence[int],
        eos_ids: Sequence[int],
        settings: RolloutSettings,
        tokenizer: Any,
        device: torch.device | str = "cpu",
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

    def __call__(
        self, logits: Tensor, sequences: Sequence[int], t: int
    ) -> tuple[Tensor, Tensor | None]:
        """Response token t of each sequence [B], from logits [B,V], modified in place.

        sequences   their indices among the seeds

        Returns (tokens [B], their log-probs [B] fp32), the latter where the settings need them.
        """
        if t < self.settings.min_new_tokens:
            logits.index_fill_(1, self._eos_ids, -torch.inf)
        warped: Any = self._warpers(None, logits)  # pyright: ignore[reportArgumentType]
        noise = torch.stack([_uniform(self._generators[i], logits) for i in sequences])
        noise.log_().neg_()  # exponential; as float32 it keeps the precision of the smallest ones
        noise = noise.to(torch.float32).log_()
        if not self.settings.needs_sampling_logprobs:
            return warped.sub_(noise).argmax(-1), None
        tokens = (warped - noise).argmax(-1)
        logprobs = warped.float().log_softmax(-1)
        return tokens, logprobs.gather(1, tokens[:, None]).squeeze(1)

    def ends(self, response_ids: Tensor) -> Tensor:
        """[B] bool: the last token of `response_ids [B,t]` ends the response."""
        ends = torch.isin(response_ids[:, -1], self._eos_ids)
        if self._stop is not None:
            stops: Any = self._stop(response_ids, None)  # pyright: ignore[reportArgumentType]
            ends = ends | stops.to(ends.device)
        return ends


def _uniform(generator: torch.Generator, like: Tensor) -> Tensor:
    """Uniform noise [V], float64: small float32 draws are too coarse for a large vocabulary."""
    return torch.rand(like.shape[1], generator=generator, dtype=torch.float64, device=like.device)
