"""Undocumented parts of transformers: caches, rotary factors, weights in files, dropout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from marlhf.compat import needs

LONGROPE = "longrope"
Defer = Callable[[Tensor, Callable[[], Tensor]], nn.Parameter]


# private: Cache.layers, DynamicLayer.lazy_initialization, .is_initialized (5.0 to 5.23)
# why: DynamicLayer copies all keys and values for every token; StaticCache fixes the batch
# remove when: a cache can be given room for a number of tokens and lose finished sequences
@needs(
    "transformers.cache_utils:Cache.layers",
    "transformers.cache_utils:DynamicLayer.lazy_initialization(self, key_states, value_states)",
    "transformers.cache_utils:DynamicLayer.is_initialized",
    "transformers.cache_utils:DynamicLayer.reorder_cache(self, beam_idx)",
)
def preallocate(cache: Cache, indices: Tensor, room: int) -> None:
    """Repeat or drop sequences of a cache, and reserve `room` tokens for each.

    indices   [B] int64, for each sequence of the batch the cached one that it starts from

    Other kinds of layers, such as sliding windows, are reordered and grow by themselves.
    """
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            cache.layers[i] = _Preallocated(layer, indices, room)
        else:
            layer.reorder_cache(indices)  # pyright: ignore[reportArgumentType]


class _Preallocated(DynamicLayer):
    """Keys and values of full attention, written behind each other into a buffer."""

    def __init__(self, layer: DynamicLayer, indices: Tensor, room: int) -> None:
        super().__init__()
        assert layer.keys is not None
        assert layer.values is not None
        self.lazy_initialization(layer.keys, layer.values)
        self._length = layer.keys.shape[-2]
        self._buffers = [_with_room(x, indices, room) for x in (layer.keys, layer.values)]
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


def _with_room(x: Tensor, indices: Tensor, room: int) -> Tensor:
    buffer = x.new_empty(len(indices), *x.shape[1:-2], room, x.shape[-1])
    torch.index_select(x, 0, indices, out=buffer[..., : x.shape[-2], :])
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


# private: core_model_loading.spawn_materialize, WeightConverter.convert, .materialize_tensors,
#          .collected_tensors (5.16 to 5.23)
# why: `from_pretrained` copies all weights into one dtype, and fuses experts; files of bf16 would
#      fill the memory of the process in fp32, and what stays as in a file is mapped, and no memory
# remove when: `from_pretrained` can leave weights as files hold them, and fuse them one by one
_CONVERTER = "transformers.core_model_loading:WeightConverter."


@needs(
    "transformers.core_model_loading:spawn_materialize"
    "(thread_pool, tensor, device, dtype, sharding_op, tensor_idx)",
    f"{_CONVERTER}convert(self, layer_name, model, config, hf_quantizer, loading_info)",
    f"{_CONVERTER}materialize_tensors(self)",
    f"{_CONVERTER}collected_tensors",
)
@contextmanager
def file_dtypes(defer: Defer | None = None) -> Iterator[None]:
    """Within, `from_pretrained` leaves weights as files hold them, also where dtypes are mixed.

    Parameters that it computes from several, such as fused experts, are what `defer(like, make)`
    returns, of a tensor without values and a function that makes it. By default they are made at
    once, in the requested dtype.
    """
    from transformers import core_model_loading

    converter_class: Any = core_model_loading.WeightConverter
    materialize, convert = core_model_loading.spawn_materialize, converter_class.convert

    def as_in_file(
        pool: Any,
        tensor: Any,
        device: Any = None,
        dtype: Any = None,
        sharding_op: Any = None,
        tensor_idx: int | None = None,
    ) -> Any:
        kept = dtype if tensor_idx is not None and defer is None else None
        return materialize(pool, tensor, device, kept, sharding_op, tensor_idx)

    def deferring(converter: Any, layer_name: str, model: Any, **_: Any) -> Any:
        assert defer is not None
        mapped = converter.materialize_tensors()

        def converted(device: str) -> dict[str, Tensor]:
            for pattern, tensors in mapped.items():
                converter.collected_tensors[pattern] = [x.to(device) for x in tensors]
            weights = convert(converter, layer_name, model, model.config)
            return {k: x[0] if isinstance(x, list) else x for k, x in weights.items()}

        try:
            shapes = converted("meta")
        except Exception as error:  # of any operation: shapes that do not fit together
            raise ValueError(f"{layer_name}: {error}") from error
        parameters = dict(model.named_parameters())
        return {
            name: defer(x, lambda name=name: converted("cpu")[name])
            if name in parameters
            else converted("cpu")[name]
            for name, x in shapes.items()
        }

    core_model_loading.spawn_materialize = as_in_file
    if defer is not None:
        converter_class.convert = deferring
    try:
        yield
    finally:
        core_model_loading.spawn_materialize = materialize
        converter_class.convert = convert


# private: transformers.integrations.deepspeed.unset_hf_deepspeed_config (5.0 to 5.23)
# why: accelerate's plugin announces ZeRO-3, and `from_pretrained` would then need all ranks
# remove when: DeepSpeedPlugin can be made without announcing it
def load_complete_models() -> None:
    """Have `from_pretrained` read complete models on the rank that calls it, under ZeRO-3 too."""
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


# private: core_model_loading.revert_weight_conversion (5.23)
# why: names and shapes in files differ from those in memory for some families (fused experts), and
#      `save_pretrained` alone converts them, on a disk
# remove when: a model gives its weights as files hold them
@needs("transformers.core_model_loading:revert_weight_conversion(model, state_dict)")
def as_in_files(model: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Some of a model's weights with the names and shapes that `save_pretrained` gives them."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, weights)


# private: attributes rope_type and {layer}_inv_freq of rotary modules (instances only, so unchecked
#          here: tests/models/test_gate.py runs such a model), and ROPE_INIT_FUNCTIONS (5.0 to 5.24)
# why: the factors follow the longest sequence of each batch, and no setting fixes them
# remove when: a configuration can fix the factors for a length
@needs("transformers.modeling_rope_utils:ROPE_INIT_FUNCTIONS")
def fix_rotary(model: nn.Module, longest: int) -> None:
    """Fix LongRoPE's factors to those of sequences of `longest` tokens.

    transformers chooses them by the longest sequence of a batch: log-probabilities of a sequence
    would depend on the others, and cached keys could have other factors than the query. (vLLM fixes
    them too.)
    """

    def fixed(module: Any, kind: str, layers: str | None = None) -> str:
        if not kind.startswith(LONGROPE):
            return kind
        buffer = getattr(module, f"{layers}_inv_freq" if layers else "inv_freq")
        rope: Any = ROPE_INIT_FUNCTIONS[LONGROPE]
        buffer.copy_(rope(module.config, buffer.device, seq_len=longest, layer_type=layers)[0])
        return f"{LONGROPE}, fixed"  # a name for which transformers does not update the factors

    modules: Any = model.modules()
    for module in modules:
        kind = getattr(module, "rope_type", None)
        if isinstance(kind, dict):
            module.rope_type = {name: fixed(module, k, name) for name, k in kind.items()}
        elif isinstance(kind, str):
            module.rope_type = fixed(module, kind)
