"""Memory per rank of a job, from the sizes of its models and passes.

The profiles in configs/accelerate say how weights are sharded. N ranks; bytes per parameter:

    profile         weights      optimiser    gradients               frozen models
    single          4            8            4                       4
    ddp             4            8            4, and 4 in buckets     4
    zero1           4            12/N         4, and 4/N reduced      4
    zero2           4            12/N         4/N                     4
    zero3           4/N          8/N          4/N                     4/N
    zero3_offload   host: 4/N    host: 12/N   host: 8/N               host: 4/N

Under bf16 linear layers of frozen models have 2 bytes instead of 4 (`distributed.placement`). Adam
has two fp32 moments. ZeRO-1 and 2 step an fp32 copy of this rank's shard, ZeRO-3 the shard
itself, unless that is offloaded. DeepSpeed reduces gradients in a bucket of fixed size, one each
for policy and critic (ZeRO-1 and 2: during a backward pass), counted only as far as gradients fill
it: untouched CPU pages are never resident. Adapters over weights that ZeRO-3 shards are replicated
as under DDP (see `distributed`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

Profile = Literal["single", "ddp", "zero1", "zero2", "zero3", "zero3_offload"]
PROFILES: tuple[Profile, ...] = get_args(Profile)
STAGES: dict[Profile, int] = {"zero1": 1, "zero2": 2, "zero3": 3, "zero3_offload": 3}

FP32, BF16, BITS4 = 4, 2, 0.5
_MOMENTS = 2 * FP32
# bytes that `distributed.ranks._BUFFERS` lets DeepSpeed hold
_BUCKET, _REUSED, _PREFETCHED = FP32 * 50_000_000, FP32 * 20_000_000, FP32 * 20_000_000
_STEPPED_AT_ONCE = FP32 * 1_000_000_000  # bytes of sub_group_size parameters


@dataclass(frozen=True)
class Weights:
    """Parameter counts of a model; shared parameters are counted at the first model only.

    frozen     without an optimiser
    trained    in an optimiser
    used       base parameters that a pass uses, shared ones included; eight in 4 bits count as one
    largest    size of the largest tensor among these
    adapters   whether adapters are trained, over a frozen base
    halves     of the frozen ones, in bf16
    quantized  of the frozen ones, in 4 bits
    scales     bytes of the scales of these, which every rank holds
    unsharded  whether every rank has the full model on its device, whatever the profile
    """

    frozen: int
    trained: int
    used: int
    largest: int
    adapters: bool = False
    halves: int = 0
    quantized: int = 0
    scales: int = 0
    unsharded: bool = False


@dataclass(frozen=True)
class Interval:
    """Interval up to the next complete gradient of a backward pass.

    It begins with the forward pass, or when the gradient before it is freed.

    peak      most bytes alive during the interval
    live      bytes alive at its end
    gradient  bytes of the gradient, included in both
    """

    peak: int
    live: int
    gradient: int


@dataclass(frozen=True)
class Training:
    """Forward and backward pass of the largest micro-batch of a model.

    accumulates  whether a pass adds to the gradients of earlier ones
    """

    intervals: Sequence[Interval]
    accumulates: bool


@dataclass(frozen=True)
class SamplingBytes:
    """Bytes for sampling responses.

    cache      KV cache of all sequences
    other      peak of everything else, or what an engine reserves
    gathered   the policy's weights, where ZeRO-3 gathers them for sampling
    host       the engine's weights on the host, while it sleeps
    """

    cache: int
    other: int
    gathered: int
    host: int = 0


@dataclass(frozen=True)
class RunSizes:
    """Models and passes of one rank.

    models     name -> weights: `policy`, `critic`, `reference`, reward models and those inside
               `per_segment`; or the one `model`
    training   trained model -> its largest micro-batch
    scoring    name of a model -> most bytes alive in one log-prob, value or scoring pass
    sampling   None in jobs that do not sample
    unmapped   fp32 bytes of the largest model that the first rank holds complete while it reads it
    saved      host bytes that the first rank needs to write the trained model
    in_turn    one model at a time is in memory, complete on each rank, as in `marlhf evaluate`
    offloaded  models that are on the host but in their phase, and `optimizer` for its states
    """

    models: Mapping[str, Weights]
    training: Mapping[str, Training]
    scoring: Mapping[str, int]
    sampling: SamplingBytes | None
    unmapped: int = 0
    saved: int = 0
    in_turn: bool = False
    offloaded: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Phase:
    """Bytes of one phase, in addition to those of `MemoryEstimate.permanent`.

    gathered   brought for the phase: sharded weights, and what is offloaded
    """

    gathered: int = 0
    gradients: int = 0
    activations: int = 0

    @property
    def total(self) -> int:
        """Sum of the three."""
        return self.gathered + self.gradients + self.activations


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank: on its device, and for it on the host.

    weights, optimizer, buffers   permanent on the device; buffers are gradients that stay between
                                  passes: DDP's buckets, DeepSpeed's under ZeRO-3
    phases    what each phase of an update adds to them
    loading   most bytes on the device while models are loaded, before there is an optimiser
    host      permanent on the host
    reading   what the first rank's host holds beyond that while it reads models
    saving    the same while it writes the trained model
    """

    weights: int
    optimizer: int
    buffers: int
    phases: Mapping[str, Phase] = field(repr=False)
    host: int = 0
    loading: int = 0
    reading: int = 0
    saving: int = 0

    @property
    def permanent(self) -> int:
        """Bytes on the device in every phase."""
        return self.weights + self.optimizer + self.buffers

    @property
    def moments(self) -> dict[str, int]:
        """Most bytes on the device, while loading and in each phase."""
        by_phase = {name: self.permanent + phase.total for name, phase in self.phases.items()}
        return {"load": self.loading} | by_phase

    @property
    def binding(self) -> str:
        """The moment that needs the most of the device."""
        return max(self.moments, key=self.moments.__getitem__)

    @property
    def peak(self) -> int:
        """Most bytes on the device at any time."""
        return self.moments[self.binding]

    @property
    def host_peak(self) -> int:
        """Most bytes on the host for the first rank, beyond Python and its libraries."""
        return self.host + max(self.reading, self.saving)


@dataclass(frozen=True)
class _Permanent:
    """Permanent bytes of one model."""

    weights: float = 0
    optimizer: float = 0
    buffers: float = 0
    host: float = 0


def estimate(run: RunSizes, profile: Profile, ranks: int) -> MemoryEstimate:
    """Memory of each of `ranks` ranks."""
    if run.in_turn:
        return _estimate_in_turn(run)
    by_model = {name: _permanent_bytes(m, profile, ranks) for name, m in run.models.items()}
    permanent = list(by_model.values())
    fetched = {name: round(m.weights) for name, m in by_model.items() if name in run.offloaded}
    states = round(_offloaded_states(permanent, profile)) if "optimizer" in run.offloaded else 0
    scorings = [
        Phase(_gathered(run.models[name], profile) + fetched.get(name, 0), 0, size)
        for name, size in run.scoring.items()
    ]
    if "reference" in fetched:  # its pass is the policy's
        scorings.append(Phase(fetched["reference"], 0, run.scoring["policy"]))
    sharded, phases = is_sharded(profile), {}
    if run.sampling is not None:
        gathered = run.sampling.gathered if sharded else 0
        phases["generate"] = Phase(gathered, 0, run.sampling.cache + run.sampling.other)
    phases |= {"score": max(scorings, key=_total)} if scorings else {}
    for name, size in run.training.items():
        phase = _training(run.models[name], size, profile, ranks)
        phases[f"train {name}"] = replace(phase, gathered=phase.gathered + states)
    largest = max(FP32 * model.largest for model in run.models.values())
    complete = FP32 * next(iter(run.models.values())).used if sharded else 0
    weights = round(sum(model.weights for model in permanent))
    on_host = sum(fetched.values()) + states
    return MemoryEstimate(
        weights=weights - sum(fetched.values()),
        optimizer=round(sum(model.optimizer for model in permanent)) - states,
        buffers=round(sum(model.buffers for model in permanent)),
        phases=phases,
        host=round(sum(m.host for m in permanent)) + on_host + _engine_host(run),
        loading=weights + largest,
        reading=max(largest, run.unmapped),
        saving=complete + run.saved,
    )


def _offloaded_states(permanent: Sequence[_Permanent], profile: Profile) -> float:
    """Bytes of Adam's moments; the fp32 copy of ZeRO-1 and 2 is not offloaded."""
    share = _MOMENTS / (FP32 + _MOMENTS) if profile in STAGES else 1
    return share * sum(model.optimizer for model in permanent)


def _engine_host(run: RunSizes) -> int:
    return 0 if run.sampling is None else run.sampling.host


def _estimate_in_turn(run: RunSizes) -> MemoryEstimate:
    """Memory of each rank if it holds one complete model at a time."""

    def held(name: str) -> int:
        model = run.models[name]
        return FP32 * model.frozen - (FP32 - BF16) * model.halves

    sampled = run.sampling
    assert sampled is not None
    scorings = [Phase(held(name), 0, size) for name, size in run.scoring.items()]
    phases = {
        "generate": Phase(held("policy"), 0, sampled.cache + sampled.other),
        "score": max(scorings, key=_total),
    }
    largest = max(FP32 * model.largest for model in run.models.values())
    loading = max(held(name) + FP32 * run.models[name].largest for name in run.models)
    reading = max(largest, run.unmapped)
    return MemoryEstimate(0, 0, 0, phases, sampled.host, loading, reading)


def is_sharded(profile: Profile) -> bool:
    """Whether each rank holds only a shard of the weights."""
    return STAGES.get(profile) == 3


def _stage_of_trained(model: Weights, profile: Profile) -> int:
    """ZeRO stage of the trained parameters: adapters over sharded weights are replicated."""
    stage = STAGES.get(profile, 0)
    return 0 if model.adapters and stage == 3 else stage


def _permanent_bytes(model: Weights, profile: Profile, ranks: int) -> _Permanent:
    """Permanent bytes of one model, on the device and on the host."""
    frozen = FP32 * model.frozen - (FP32 - BF16) * model.halves - (FP32 - BITS4) * model.quantized
    sharded = is_sharded(profile) and not model.unsharded
    frozen /= ranks if sharded else 1
    trained, share = model.trained, model.trained / ranks
    on_host = frozen if sharded and profile == "zero3_offload" else 0.0
    on_device = frozen - on_host + model.scales
    bucket = min(_BUCKET, FP32 * trained)
    if model.adapters and is_sharded(profile):
        profile = "ddp"
    match profile:
        case "single":
            return _Permanent(on_device + FP32 * trained, _MOMENTS * trained)
        case "ddp":
            return _Permanent(
                on_device + FP32 * trained, _MOMENTS * trained, FP32 * trained, host=on_host
            )
        case "zero1" | "zero2":
            return _Permanent(on_device + FP32 * trained, (FP32 + _MOMENTS) * share)
        case "zero3":
            return _Permanent(on_device + FP32 * share, _MOMENTS * share, FP32 * share + bucket)
        case "zero3_offload":  # weights, their copy, moments, two copies of gradients
            return _Permanent(on_device, 0, bucket, on_host + (4 * FP32 + _MOMENTS) * share)


def _gathered(model: Weights, profile: Profile) -> int:
    """Bytes of unsharded weights on this rank in the middle of a pass."""
    alive = min(FP32 * model.used, _REUSED + _PREFETCHED + FP32 * model.largest)
    return alive if is_sharded(profile) and not model.unsharded else 0


def _training(model: Weights, size: Training, profile: Profile, ranks: int) -> Phase:
    """Bytes for training one model: the larger of backward pass and optimiser step."""
    trained = FP32 * model.trained
    part = round(trained / ranks)
    slice_ = FP32 * min(model.largest, model.trained // ranks)  # of one tensor, on one rank
    gathered = _gathered(model, profile)
    match _stage_of_trained(model, profile):
        case 0:
            return Phase(gathered, trained, _peak_of_all_gradients(size) - trained)
        case 1:
            gradients = trained + min(trained, _BUCKET)
            return Phase(0, gradients, max(_peak_of_all_gradients(size) - gradients, part))
        case 2:
            backward = _reduced(size.intervals, _BUCKET, part, size.accumulates)
            # a flat copy of the part; before that, its norm in float64
            step = part + max(part, 2 * slice_)
            gradients = min(part * (1 + size.accumulates), backward)
            return max(Phase(0, gradients, backward - gradients), Phase(0, step), key=_total)
        case _:
            stepped = min(trained, _STEPPED_AT_ONCE) // ranks
            step = max(2 * FP32 * model.largest // ranks, stepped)
            backward = Phase(gathered, 0, _reduced(size.intervals, _BUCKET))
            return max(backward, Phase(0, 0 if profile == "zero3_offload" else step), key=_total)


def _peak_of_all_gradients(size: Training) -> int:
    """Most bytes alive if all gradients stay until the optimiser step."""
    accumulated = sum(interval.gradient for interval in size.intervals) if size.accumulates else 0
    peak = 0
    for interval in size.intervals:
        peak = max(peak, accumulated + interval.peak)
        accumulated += 0 if size.accumulates else interval.gradient
    return max(peak, accumulated)


def _reduced(
    intervals: Sequence[Interval], bucket: int, part: int | None = None, accumulates: bool = False
) -> int:
    """Most bytes alive if DeepSpeed reduces gradients through a bucket of `bucket` bytes.

    It reduces a full bucket by a flat copy. A gradient larger than the bucket stays where it is.

    part   bytes of the reduced gradients kept on this rank, allocated during the pass, as is the
           bucket; None: both are allocated already
    """
    is_new = part is not None
    part = part or 0
    held = part * accumulates
    peak = waiting = in_bucket = too_large = 0
    for interval in intervals:
        peak = max(peak, held + in_bucket + too_large + interval.peak)
        if waiting and waiting + interval.gradient > bucket:
            held = part * (1 + accumulates)
            peak = max(peak, held + in_bucket + too_large + waiting + interval.live)
            waiting = too_large = 0
        waiting += interval.gradient
        if interval.gradient > bucket:
            too_large = interval.gradient
        elif is_new:
            in_bucket = max(in_bucket, waiting)
    return max(peak, part * (1 + accumulates) + in_bucket + too_large + waiting)


def _total(phase: Phase) -> int:
    return phase.total
