"""Processes and devices: the only module that knows accelerate and DeepSpeed.

The configuration of `accelerate launch` decides how a model is spread over the ranks:

  one process     nothing is spread
  DDP             one replica per rank; gradients are summed
  ZeRO-1, ZeRO-2  one replica per rank; optimiser states (2: and gradients) are sharded
  ZeRO-3          weights are sharded too, including those of frozen models

Policy and critic are two engines. Their gradients are never in memory together, each is clipped by
its own norm, and an update that trains the critic alone leaves the policy's optimiser untouched:
one engine over both would step Adam's moments of weights that have no gradient.

With LoRA under ZeRO-3 only the frozen base is sharded, once for all models on it. Two engines
cannot share sharded weights, and sharding adapters, a hundredth of the model, would gain nothing:
they stay replicated, and DDP sums their gradients.
"""

from marlhf.common.errors import PeerError
from marlhf.distributed.offload import in_use, keep_on_host
from marlhf.distributed.placement import ALONE, Placement, matmul_parameters
from marlhf.distributed.quantized import (
    QUANTIZATION_CONFIG,
    QuantizedLinear,
    is_quantized,
    plain_copy,
    quantizable_layers,
    quantizable_share,
    replace_layers,
    round_to_four_bits,
)
from marlhf.distributed.ranks import Distributed
from marlhf.distributed.shutdown import lost_peer
from marlhf.distributed.zero import in_bf16, linear_layers, replaced_parameters

__all__ = [
    "ALONE",
    "QUANTIZATION_CONFIG",
    "Distributed",
    "PeerError",
    "Placement",
    "QuantizedLinear",
    "in_bf16",
    "in_use",
    "is_quantized",
    "keep_on_host",
    "linear_layers",
    "lost_peer",
    "matmul_parameters",
    "plain_copy",
    "quantizable_layers",
    "quantizable_share",
    "replace_layers",
    "replaced_parameters",
    "round_to_four_bits",
]
