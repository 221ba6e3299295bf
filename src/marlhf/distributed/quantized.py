"""Linear layers in 4 bits (NF4 of QLoRA, arXiv 2305.14314), for frozen bases of adapters.

A weight is held in blocks of 64: 4 bits per parameter, and per block a scale in 8 bits, which have
scales of their own in blocks of 256. So a parameter takes 0.516 bytes. A product computes with the
dequantised weight: in fp32, or rounded to bf16 where autocast is enabled.

The layer is our own, on bitsandbytes' functions: its own layer may change its weight and round its
scales in evaluation on CPUs, so that a policy's ratio to itself would not be 1.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

TYPE = "nf4"
_BLOCK, _SCALES_BLOCK = 64, 256

QUANTIZATION_CONFIG = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": TYPE,
    "bnb_4bit_use_double_quant": True,
}
"""The same quantisation as transformers' `BitsAndBytesConfig`."""


class QuantizedLinear(nn.Linear):
    """A frozen linear layer in 4 bits, without values before `quantize`.

    weight        uint8 [out*in/2, 1], two parameters per byte
    scales        uint8 [blocks], an index in `scales_code`
    scales_scale  fp32 [blocks/256]
    scales_code   fp32 [256]
    scales_mean   fp32 []
    """

    scales: Tensor
    scales_scale: Tensor
    scales_code: Tensor
    scales_mean: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(1, 1, bias=False, device="meta")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        blocks, device = math.ceil(self.size / _BLOCK), linear.weight.device
        one = torch.zeros((), dtype=torch.uint8, device=device)
        packed = one.expand(math.ceil(self.size / 2), 1)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = linear.bias
        buffers = {
            "scales": torch.zeros(blocks, dtype=torch.uint8, device=device),
            "scales_scale": torch.zeros(math.ceil(blocks / _SCALES_BLOCK), device=device),
            "scales_code": torch.zeros(256, device=device),
            "scales_mean": torch.zeros((), device=device),
        }
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer, persistent=False)  # frozen, as the weight
        self.train(linear.training)

    def quantize(self, weight: Tensor) -> None:
        """Take over the values of `weight [out,in]`, on its device."""
        weight = weight.float() if weight.dtype == torch.float64 else weight
        packed, state = _library().functional.quantize_4bit(
            weight.contiguous(), blocksize=_BLOCK, compress_statistics=True, quant_type=TYPE
        )
        self.weight.data = packed
        self.scales, self.scales_mean = state.absmax, state.offset
        self.scales_scale, self.scales_code = state.state2.absmax, state.state2.code

    @property
    def size(self) -> int:
        """Number of parameters of the weight."""
        return self.in_features * self.out_features

    @property
    def quantized(self) -> list[Tensor]:
        """All tensors that `quantize` sets."""
        tensors = (self.weight, self.scales, self.scales_scale, self.scales_code, self.scales_mean)
        return [tensor.data for tensor in tensors]

    def allocate(self, device: torch.device) -> None:
        """Make room for the tensors of `quantized`, to receive them."""
        self.weight.data = torch.empty(self.weight.shape, dtype=torch.uint8, device=device)
        for name, buffer in self.named_buffers():
            setattr(self, name, torch.empty_like(buffer, device=device))

    def dequantized(self) -> Tensor:
        """The weight `[out,in]` that products compute with, fp32, on the weight's device."""
        weight = self.weight.data
        return _library().functional.dequantize_4bit(
            weight, self._state(torch.float32, weight.device)
        )

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in] -> [..., out]`, in autocast's dtype where that is enabled."""
        kind, dtype = input.device.type, input.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        bias = None if self.bias is None else self.bias.to(dtype)
        return _library().matmul_4bit(
            input.to(dtype), self.weight, self._state(dtype, None), bias=bias
        )

    def _state(self, dtype: torch.dtype, device: torch.device | None) -> Any:
        """What bitsandbytes' functions need besides the weight, to dequantise it to `dtype`."""
        state = _library().functional.QuantState
        names = ("scales", "scales_mean", "scales_scale", "scales_code")
        scales, mean, scale, code = (getattr(self, name).to(device) for name in names)
        return state(
            absmax=scales,
            shape=torch.Size((self.out_features, self.in_features)),
            blocksize=_BLOCK,
            quant_type=TYPE,
            dtype=dtype,
            offset=mean,
            state2=state(absmax=scale, code=code, blocksize=_SCALES_BLOCK, dtype=torch.float32),
        )

    def plain(self) -> nn.Linear:
        """A linear layer with the dequantised weight, fp32, on the CPU; shares no memory."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.dequantized().cpu(), requires_grad=False)
        if self.bias is not None:
            bias = self.bias.detach().to("cpu", torch.float32, copy=True)  # merging adds to it
            linear.bias = nn.Parameter(bias, requires_grad=False)
        return linear.train(self.training)


def _library() -> Any:
    import bitsandbytes  # optional, and seconds to import

    return bitsandbytes


def quantizable_layers(backbone: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of a backbone with a weight of their own, by name.

    Embeddings, norms and heads stay as they are, and so does a weight that several modules share.
    """
    owners: dict[Tensor, int] = {}
    for module in backbone.modules():
        for parameter in module.parameters(recurse=False):
            owners[parameter] = owners.get(parameter, 0) + 1
    return {
        name: module
        for name, module in backbone.named_modules()
        if type(module) is nn.Linear and owners[module.weight] == 1
    }


def quantizable_share(backbone: nn.Module) -> float:
    """Share of a backbone's parameters, embeddings excluded, that are in `quantizable_layers`."""
    layers = sum(layer.weight.numel() for layer in quantizable_layers(backbone).values())
    embeddings = {
        p for m in backbone.modules() if isinstance(m, nn.Embedding) for p in m.parameters()
    }
    return layers / max(1, sum(p.numel() for p in backbone.parameters() if p not in embeddings))


def replace_layers(backbone: nn.Module) -> dict[nn.Parameter, tuple[QuantizedLinear, Tensor]]:
    """Replace the linear layers of a backbone by empty ones in 4 bits.

    Returns, for the new weight of each, the layer and the weight that it replaces.
    """
    replaced = {}
    for name, linear in quantizable_layers(backbone).items():
        owner, _, attribute = name.rpartition(".")
        layer = QuantizedLinear(linear)
        setattr(backbone.get_submodule(owner), attribute, layer)
        replaced[layer.weight] = layer, linear.weight
    return replaced


def is_quantized(module: nn.Module) -> bool:
    """Whether any layer of a module is in 4 bits."""
    return any(isinstance(part, QuantizedLinear) for part in module.modules())


def plain_copy(model: Any) -> Any:
    """A copy of a model on the CPU, in fp32, without layers in 4 bits."""
    memo: dict[int, Any] = {}
    for part in model.modules():
        if isinstance(part, QuantizedLinear):
            memo[id(part)] = part.plain()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            data = parameter.detach().to("cpu", torch.float32, copy=True)
            memo[id(parameter)] = nn.Parameter(data, parameter.requires_grad)
    return copy.deepcopy(model, memo)


def round_to_four_bits(layers: Iterable[nn.Linear]) -> None:
    """Round weights in place, to fp32, as a base in 4 bits holds them."""
    for linear in layers:
        layer = QuantizedLinear(linear)
        layer.quantize(linear.weight.detach())
        linear.weight.data = layer.dequantized()
