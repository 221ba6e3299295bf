"""What a PPO run keeps in memory on each rank, from the sizes of its models and passes: arithmetic.

How weights are spread is what the profiles in configs/accelerate say. N ranks; bytes a parameter:

    profile         weights      optimiser    gradients               frozen models
    single          4            8            4                       4
    ddp             4            8            4, and 4 in buckets     4
    zero1           4            12/N         4, and 4/N reduced      4
    zero2           4            12/N         4/N                     4
    zero3           4/N          8/N          4/N                     4/N
    zero3_offload   host: 4/N    host: 12/N   host: 8/N               host: 4/N

Adam has two fp32 moments. ZeRO-1 and 2 step an fp32 copy of this rank's part, ZeRO-3 the part
itself, unless that is offloaded. DeepSpeed reduces gradients in a buffer of fixed size, one for
policy and critic each (ZeRO-1 and 2: while a backward pass lasts). Adapters over weights that
ZeRO-3 shards are replicated as under DDP (see `distributed`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

Profile = Literal["single", "ddp", "zero1", "zero2", "zero3", "zero3_offload"]
PROFILES: tuple[Profile, ...] = get_args(Profile)
STAGES: dict[Profile, int] = {"zero1": 1, "zero2": 2, "zero3": 3, "zero3_offload": 3}

FP32 = 4
REDUCE_BUCKET = 500_000_000  # parameters, DeepSpeed's default
_MOMENTS = 2 * FP32
# ZeRO-3 keeps a weight that is read again within stage3_max_reuse_distance = 1e9 parameters: at the
# turn from forward to backward those are the last half; and it prefetches 5e7
_REUSED, _PREFETCHED = 500_000_000, 50_000_000
_STEPPED_AT_ONCE = FP32 * 1_000_000_000  # bytes of sub_group_size parameters


@dataclass(frozen=True)
class Weights:
    """Parameters of a model; what it shares with another is counted there.

    frozen     read only
    trained    in an optimiser
    reads      base parameters that a pass goes through, shared ones included
    largest    of the tensors among these
    adapters   the trained ones are adapters, their base is frozen
    """

    frozen: int
    trained: int
    reads: int
    largest: int
    adapters: bool = False


@dataclass(frozen=True)
class Training:
    """Forward and backward passes of a model.

    peak         most bytes alive beside weights and what stays, with gradients, and with
                 DeepSpeed's buffers of them where it has some
    accumulates  a pass finds the gradients of others before it
    """

    peak: int
    accumulates: bool


@dataclass(frozen=True)
class Generation:
    """Bytes of sampling responses: keys and values of all rows, and all else at its peak."""

    cache: int
    rest: int


@dataclass(frozen=True)
class Run:
    """Models and passes of one rank.

    models     name -> weights, of `policy`, `critic`, `reference` and reward models
    training   `policy` and `critic` -> their micro-batches
    scoring    name of a model -> most bytes alive in one scoring pass
    """

    models: Mapping[str, Weights]
    training: Mapping[str, Training]
    scoring: Mapping[str, int]
    generation: Generation


@dataclass(frozen=True)
class Phase:
    """Bytes that come on top of what stays."""

    gathered: int = 0
    gradients: int = 0
    activations: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.gathered + self.gradients + self.activations


@dataclass(frozen=True)
class Estimate:
    """Bytes on one rank: what stays on the device, what each phase adds, what is on the host.

    buffers   of gradients, which stay between passes: DDP's buckets, DeepSpeed's under ZeRO-3
    """

    weights: int
    optimizer: int
    buffers: int
    phases: Mapping[str, Phase] = field(repr=False)
    host: int = 0

    @property
    def stays(self) -> int:
        """What is there in every phase."""
        return self.weights + self.optimizer + self.buffers

    @property
    def peak(self) -> int:
        """Most bytes on the device at any time."""
        return self.stays + max(phase.total for phase in self.phases.values())


@dataclass(frozen=True)
class _Held:
    """Bytes of one model that stay."""

    weights: float = 0
    optimizer: float = 0
    buffers: float = 0
    host: float = 0


def estimate(
    run: Run, profile: Profile, ranks: int, reduce_bucket: int = REDUCE_BUCKET
) -> Estimate:
    """The memory of each of `ranks` ranks.

    reduce_bucket   parameters in DeepSpeed's buffer of gradients, its `reduce_bucket_size`
    """
    held = [_held(model, profile, ranks, reduce_bucket) for model in run.models.values()]
    scorings = [
        Phase(_gathered(run.models[name], profile), 0, size) for name, size in run.scoring.items()
    ]
    whole = FP32 * run.models["policy"].reads if is_sharded(profile) else 0
    sampling = Phase(whole, 0, run.generation.cache + run.generation.rest)
    phases = {"generate": sampling, "score": max(scorings, key=_total)} | {
        f"train {name}": _training(run.models[name], size, profile, ranks, reduce_bucket)
        for name, size in run.training.items()
    }
    return Estimate(
        weights=round(sum(each.weights for each in held)),
        optimizer=round(sum(each.optimizer for each in held)),
        buffers=round(sum(each.buffers for each in held)),
        phases=phases,
        host=round(sum(each.host for each in held)),
    )


def is_sharded(profile: Profile) -> bool:
    """Whether each rank has a part of the weights alone."""
    return STAGES.get(profile) == 3


def spread_of_trained(adapters: bool, profile: Profile) -> Profile:
    """The profile that the trained parameters are under."""
    return "ddp" if adapters and is_sharded(profile) else profile


def _held(model: Weights, profile: Profile, ranks: int, bucket: int) -> _Held:
    """What stays of one model, on the device and on the host."""
    frozen = FP32 * model.frozen / (ranks if is_sharded(profile) else 1)
    trained, each = model.trained, model.trained / ranks
    on_host = frozen if profile == "zero3_offload" else 0.0
    on_device = frozen - on_host
    buffers = FP32 * bucket if trained else 0
    match spread_of_trained(model.adapters, profile):
        case "single":
            return _Held(on_device + FP32 * trained, _MOMENTS * trained)
        case "ddp":
            return _Held(
                on_device + FP32 * trained, _MOMENTS * trained, FP32 * trained, host=on_host
            )
        case "zero1" | "zero2":
            return _Held(on_device + FP32 * trained, (FP32 + _MOMENTS) * each)
        case "zero3":
            return _Held(on_device + FP32 * each, _MOMENTS * each, FP32 * each + buffers)
        case "zero3_offload":  # weights, their copy, moments, two copies of gradients
            return _Held(on_device, 0, buffers, on_host + (4 * FP32 + _MOMENTS) * each)


def _gathered(model: Weights, profile: Profile) -> int:
    """Weights that are whole on this rank in the middle of a pass."""
    alive = min(model.reads, _REUSED + _PREFETCHED + model.largest)
    return FP32 * alive if is_sharded(profile) else 0


def _training(model: Weights, size: Training, profile: Profile, ranks: int, bucket: int) -> Phase:
    """What training one model adds: the larger of a backward pass and of the step after it."""
    trained, each = FP32 * model.trained, round(FP32 * model.trained / ranks)
    gathered = _gathered(model, profile)
    match spread_of_trained(model.adapters, profile):
        case "single" | "ddp":
            return Phase(gathered, trained, size.peak - trained)
        case "zero1":
            gradients = trained + FP32 * bucket
            backward = Phase(0, gradients, max(0, size.peak - gradients))
            return max(backward, Phase(0, gradients + each), key=_total)
        case "zero2":
            before = each if size.accumulates else 0
            gradients = FP32 * bucket + each
            return Phase(0, gradients + before, max(0, size.peak - gradients))
        case _:
            stepped = 0 if profile == "zero3_offload" else min(trained, _STEPPED_AT_ONCE) // ranks
            return max(Phase(gathered, 0, size.peak), Phase(0, stepped), key=_total)


def _total(phase: Phase) -> int:
    return phase.total
