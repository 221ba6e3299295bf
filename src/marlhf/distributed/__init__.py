"""Processes and devices: the only module that knows accelerate and DeepSpeed.

How a model is spread over the ranks follows from what `accelerate launch` was told:

  one process     nothing is spread
  DDP             a copy each; gradients are summed
  ZeRO-1, ZeRO-2  a copy each; optimiser states (2: and gradients) are sharded
  ZeRO-3          weights are sharded too, those of frozen models included

Policy and critic are two engines. Their gradients are then never alive together, each is clipped
by its own norm, and an update that trains the critic alone leaves the policy's optimiser untouched:
one engine over both would step Adam's moments of weights that have no gradient.

With LoRA under ZeRO-3 the frozen base alone is sharded, once for all models on it. Two engines
cannot share sharded weights, and sharding adapters, a hundredth of the whole, would gain nothing:
they stay replicated, and DDP sums their gradients.
"""

from marlhf.distributed.ranks import Distributed, PeerError, in_bf16, linear_layers, reading

__all__ = ["Distributed", "PeerError", "in_bf16", "linear_layers", "reading"]
