"""Incremental decoding of a causal LM with a KV cache, and its EOS ids."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from marlhf.common.errors import UserError
from marlhf.common.tokenization import Tokenizer
from marlhf.compat.transformers import preallocate
from marlhf.models.policy import backbone_of, head_of


def eos_token_ids(lm: Any, tokenizer: Tokenizer, key: str = "model.path") -> list[int]:
    """All EOS ids of the generation config and the tokenizer.

    Ids without a logit in the model are omitted. Raises UserError.
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


class Decoder:
    """Incremental decoding with a KV cache: prefill, then one token per call."""

    def __init__(self, lm: Any, prompt_ids: Tensor, prompt_mask: Tensor) -> None:
        """Prefill `prompt_ids [U,P]`, left-padded according to `prompt_mask`."""
        self._lm, self._backbone, self._head = lm, backbone_of(lm), head_of(lm)
        self._cache: Cache = KeysAndValues(config=lm.config)
        parameters = inspect.signature(self._backbone.forward).parameters
        # recurrent families have a name of their own for the cache (`cache` in transformers 5.24)
        # and silently ignore any other
        layers = getattr(lm.config.get_text_config(), "layer_types", None) or ()
        self._cache_name = "past_key_values"
        if "cache_params" in parameters and "past_key_values" not in parameters:
            self._cache_name = "cache_params"
        elif "cache" in parameters and set(layers) == {"linear_attention"}:
            self._cache_name = "cache"
        self._is_stateful = self._cache_name != "past_key_values"
        self._mask = prompt_mask.long()
        self._next = prompt_mask.sum(1)  # position of the next token
        self._logits = self._forward(prompt_ids, (self._mask.cumsum(1) - 1).clamp(min=0))

    def expand(self, prompt_of: Tensor, tokens: int) -> Tensor:
        """Start sequence i of a batch after the prompt `prompt_of[i]`.

        tokens   the maximum number of tokens to decode, for which memory is reserved

        Returns the logits [B,V] of the first token.
        """
        room = self._mask.shape[1] + tokens - 1  # the last token is never an input
        preallocate(self._cache, prompt_of, room)
        self._mask, self._next = self._mask[prompt_of], self._next[prompt_of]
        return self._logits[prompt_of]

    def keep(self, indices: Tensor) -> None:
        """Continue with the sequences at `indices`; drop the others."""
        self._cache.reorder_cache(indices)  # pyright: ignore[reportArgumentType]
        self._mask, self._next = self._mask[indices], self._next[indices]

    def step(self, tokens: Tensor) -> Tensor:
        """Decode one token per sequence [B]; returns the logits [B,V] of the next one."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], 1)
        self._next = self._next + 1
        return self._forward(tokens[:, None], self._next[:, None] - 1)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the KV cache."""
        layers: Any = self._cache.layers
        return sum(x.nbytes for layer in layers for x in (layer.keys, layer.values))

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        # the mask of recurrent families covers the current tokens alone
        mask = self._mask[:, -ids.shape[1] :] if self._is_stateful else self._mask
        output = self._backbone(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            **{self._cache_name: self._cache},
        )
        return self._head(output.last_hidden_state[:, -1]).float()


class KeysAndValues(DynamicCache):
    """KV cache in the autocast dtype.

    Rotary embeddings return keys in fp32, which attention would cast again for every token.
    """

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values to a layer's cache, and return its full keys and values."""
        kind = key_states.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            key_states, value_states = key_states.to(dtype), value_states.to(dtype)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)
