"""Prompts -> sampled responses.

The rest of the library knows of sampling what `Generate` says. Another engine with that signature
can stand in for `generate`: it is handed the policy, as the last update left it, with every call.

Where responses come from matters to nothing after it: log-probabilities and values are those of
forward passes over the finished sequences.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import (
    Cache,
    DynamicCache,
    LogitsProcessorList,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer

from marlhf.config import RolloutSettings
from marlhf.errors import UserError
from marlhf.models import Policy, head_of, trunk_of, use_adapter
from marlhf.packing import packed, shared_inputs
from marlhf.types import Generation

_ENDED_ROWS = 8  # rows that ended are dropped once they are this fraction of the batch: 1/8


class Generate(Protocol):
    """Samples one response to each prompt."""

    def __call__(
        self,
        policy: Policy,
        tokenizer: Any,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        settings: RolloutSettings,
    ) -> Generation:
        """prompts are token ids; seeds[i] fixes all randomness of row i, whatever batch it is in.

        Sampling settings come from `settings` alone.
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
    """Sample one response to each prompt (token ids).

    Row i is sampled by adding Gumbel noise from its own generator, seeded with seeds[i], to its
    warped logits and taking the maximum: an exact sample, the same in whatever batch the row sits.
    Of the model's generation config only its EOS ids count.

    Equal prompts are read once. Rows that have ended leave the batch.
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
                reader = Reader(lm, prompt_ids, prompt_mask)
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
    reader: Reader, logits: Tensor, sampler: _Sampler, pad_id: int
) -> tuple[Tensor, Tensor]:
    """`(response_ids [B,T], lengths [B])`, 0 the length of a row that met the limit."""
    B, limit = len(logits), sampler.settings.max_new_tokens
    response_ids = torch.full((B, limit), pad_id, device=logits.device)
    lengths = torch.zeros(B, dtype=torch.int64, device=logits.device)
    rows = torch.arange(B, device=logits.device)  # those that are still in the batch
    for t in range(limit):
        tokens = sampler(logits, rows.tolist(), t)
        response_ids[rows, t] = tokens
        done = sampler.ends(response_ids[rows, : t + 1])
        lengths[rows] = torch.where(done & (lengths[rows] == 0), t + 1, lengths[rows])
        going = (lengths[rows] == 0).nonzero().squeeze(1)
        if len(going) == 0 or t + 1 == limit:
            break
        if (len(rows) - len(going)) * _ENDED_ROWS >= len(rows):
            rows, tokens = rows[going], tokens[going]
            reader.keep(going)
        logits = reader.step(tokens)
    T = int(torch.where(lengths > 0, lengths, limit).max())
    beyond = (lengths > 0)[:, None] & (torch.arange(T, device=rows.device) >= lengths[:, None])
    return response_ids[:, :T].masked_fill(beyond, pad_id), lengths


def eos_token_ids(lm: Any, tokenizer: Any, key: str = "model.path") -> list[int]:
    """Every id that ends a response: those of the generation config and of the tokenizer.

    An id that the model has no logit for is left out. Raises UserError.
    """
    generation = getattr(lm, "generation_config", None)
    of_config = getattr(generation, "eos_token_id", None)
    ids = [] if of_config is None else of_config if isinstance(of_config, list) else [of_config]
    if any(type(i) is not int for i in ids):
        raise UserError(
            f"{key}: generation_config.json has eos_token_id {of_config!r}, must be a token id or "
            "a list of them"
        )
    of_tokenizer = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    vocabulary = range(lm.config.get_text_config().vocab_size)
    return sorted({i for i in (*ids, *of_tokenizer) if i in vocabulary})


def left_pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """`(ids [B,P] int64, mask [B,P] bool)`."""
    P = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (P - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[False] * (P - len(row)) + [True] * len(row) for row in rows])
    return ids, mask


class Reader:
    """A causal LM that has read some prompts, and reads on a token of each row at a time."""

    def __init__(self, lm: Any, prompt_ids: Tensor, prompt_mask: Tensor) -> None:
        """Read `prompt_ids [U,P]`."""
        self._lm, self._trunk, self._head = lm, trunk_of(lm), head_of(lm)
        self._cache: Cache = KeysAndValues(config=lm.config)
        taken = inspect.signature(self._trunk.forward).parameters
        # a family that is all states calls its cache so, and swallows any other name
        self._is_stateful = "cache_params" in taken and "past_key_values" not in taken
        self._mask = prompt_mask.long()
        self._next = prompt_mask.sum(1)  # position of the next token
        self._logits = self._read(prompt_ids, (self._mask.cumsum(1) - 1).clamp(min=0))

    def expand(self, prompt_of: Tensor, tokens: int) -> Tensor:
        """Give row i of a batch the prompt `prompt_of[i]`, and room for `tokens` more; returns the
        logits [B,V] of the first."""
        room = self._mask.shape[1] + tokens - 1  # the last token is not read
        for i, layer in enumerate(self._cache.layers):
            if type(layer) is DynamicLayer and layer.is_initialized:
                self._cache.layers[i] = _Buffer(layer, prompt_of, room)
            else:
                layer.reorder_cache(prompt_of)  # pyright: ignore[reportArgumentType]
        self._mask, self._next = self._mask[prompt_of], self._next[prompt_of]
        return self._logits[prompt_of]

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows of the batch."""
        self._cache.reorder_cache(rows)  # pyright: ignore[reportArgumentType]
        self._mask, self._next = self._mask[rows], self._next[rows]

    def step(self, tokens: Tensor) -> Tensor:
        """Read a token of each row [B]; returns the logits [B,V] of the one after it."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], 1)
        self._next = self._next + 1
        return self._read(tokens[:, None], self._next[:, None] - 1)

    def _read(self, ids: Tensor, positions: Tensor) -> Tensor:
        cached: dict[str, Any] = {"past_key_values": self._cache}
        if self._is_stateful:  # whose mask is that of the tokens read now
            cached = {"cache_params": self._cache}
        output = self._trunk(
            input_ids=ids,
            attention_mask=self._mask[:, -ids.shape[1] :] if self._is_stateful else self._mask,
            position_ids=positions,
            use_cache=True,
            **cached,
        )
        return self._head(output.last_hidden_state[:, -1]).float()


class KeysAndValues(DynamicCache):
    """Keys and values as attention reads them: under autocast in its precision, to which products
    would round them for every token again. A rotation of positions has made fp32 of keys."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add those of new tokens to a layer's; returns all of the layer's."""
        kind = key_states.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            key_states, value_states = key_states.to(dtype), value_states.to(dtype)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


class _Buffer(DynamicLayer):
    """Keys and values with room for all that will come, where transformers' own layer copies all
    that there are for every token."""

    def __init__(self, layer: DynamicLayer, rows: Tensor, room: int) -> None:
        """Some rows of a layer's keys and values, repeated or left out."""
        super().__init__()
        assert layer.keys is not None
        assert layer.values is not None
        self.lazy_initialization(layer.keys, layer.values)
        self._length = layer.keys.shape[-2]
        self._buffers = [_with_room(x, rows, room) for x in (layer.keys, layer.values)]
        self._show()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write behind what is there; returns all keys and values, as views."""
        end = self._length + key_states.shape[-2]
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., self._length : end, :] = new
        self._length = end
        return self._show()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these rows."""
        room = self._buffers[0].shape[-2]
        views = self._show()
        self._buffers = [_with_room(x, beam_idx, room) for x in views]
        self._show()

    def _show(self) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (x[..., : self._length, :] for x in self._buffers)
        return self.keys, self.values


def _with_room(x: Tensor, rows: Tensor, room: int) -> Tensor:
    buffer = x.new_empty(len(rows), *x.shape[1:-2], room, x.shape[-1])
    torch.index_select(x, 0, rows, out=buffer[..., : x.shape[-2], :])
    return buffer


class _Sampler:
    """Draws each row's next token, and knows when a row ends."""

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
        """Response token t of each row [B], from logits [B,V], which change."""
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
    """[V] in float64: in float32 the smallest draws are too coarse for a large vocabulary."""
    return torch.rand(like.shape[1], generator=generator, dtype=torch.float64, device=like.device)
