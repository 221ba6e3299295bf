"""Undocumented parts of transformers: cache layers, GGUF's bar, dropout in configurations."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from marlhf.compat import needs


# private: Cache.layers, DynamicLayer.lazy_initialization, .is_initialized (5.0 to 5.23)
# why: DynamicLayer copies all keys and values for every token; StaticCache fixes the batch
# remove when: a cache can be given room for a number of tokens and lose finished sequences
@needs(
    "transformers.cache_utils:Cache.layers",
    "transformers.cache_utils:DynamicLayer.lazy_initialization(self, key_states, value_states)",
    "transformers.cache_utils:DynamicLayer.is_initialized",
    "transformers.cache_utils:DynamicLayer.reorder_cache(self, beam_idx)",
)
def preallocate(cache: Cache, rows: Tensor, room: int) -> None:
    """Repeat or drop sequences of a cache, and give it room for `room` tokens in all.

    rows   [B] int64, the sequence of the cache that each of the batch starts from

    Layers of other kinds, such as sliding windows, are reordered and grow by themselves.
    """
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            cache.layers[i] = _Preallocated(layer, rows, room)
        else:
            layer.reorder_cache(rows)  # pyright: ignore[reportArgumentType]


class _Preallocated(DynamicLayer):
    """Keys and values of full attention, written behind each other into a buffer."""

    def __init__(self, layer: DynamicLayer, rows: Tensor, room: int) -> None:
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
        """Append new tokens; returns all keys and values, as views."""
        end = self._length + key_states.shape[-2]
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., self._length : end, :] = new
        self._length = end
        return self._show()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these sequences."""
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


# private: transformers.modeling_gguf_pytorch_utils.tqdm (5.0 to 5.23)
# why: its bar obeys no setting
# remove when: it uses transformers.utils.logging.tqdm
def hide_gguf_bar() -> None:
    """Show no bar while a GGUF file is read."""
    from transformers import modeling_gguf_pytorch_utils

    gguf: Any = modeling_gguf_pytorch_utils
    if hasattr(gguf, "tqdm"):  # only a bar: nothing breaks without it
        gguf.tqdm = partial(gguf.tqdm, disable=True)


# private: transformers.integrations.deepspeed.unset_hf_deepspeed_config (5.0 to 5.23)
# why: accelerate's plugin announces ZeRO-3, and `from_pretrained` would then shard while it reads
# remove when: marlhf reads models sharded itself
def load_complete_models() -> None:
    """Have `from_pretrained` read complete models, also under ZeRO-3."""
    needs("transformers.integrations.deepspeed:unset_hf_deepspeed_config()")
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


# private: names of dropout rates and router jitter: no list of them exists (5.0 to 5.23)
# why: families call them attention_dropout, resid_pdrop, hidden_dropout_prob, ...
# remove when: transformers can load a model without random layers
def zero_noise(owner: Any) -> None:
    """Set every dropout and router jitter to zero.

    Phi-MoE's jitter stays, as its routers use the number in evaluation too.
    """
    config = getattr(owner, "config", owner)
    noise = ("drop",) if getattr(config, "model_type", "") == "phimoe" else ("drop", "jitter")
    for name, value in list(vars(owner).items()):
        if any(word in name for word in noise) and isinstance(value, float):
            setattr(owner, name, 0.0)
