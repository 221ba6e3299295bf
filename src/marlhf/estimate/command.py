"""`marlhf estimate`: memory of a job under every launch profile."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from marlhf.common.errors import Parser, UserError, at_least_one, say
from marlhf.config import EvaluateConfig, PPOConfig, RewardConfig, SFTConfig
from marlhf.config.loading import load_config
from marlhf.estimate.memory_model import (
    PROFILES,
    MemoryEstimate,
    RunSizes,
    estimate,
    is_sharded,
)
from marlhf.estimate.shapes import JOBS, JobConfig, engine_settings

if TYPE_CHECKING:
    from marlhf.estimate.allocations import PassCounter

_GB = 10**9
_TIGHT = 0.9  # share of the memory: CUDA's own and fragmentation come on top
_NOTES = """\
GB are 1e9 bytes. Prompts, responses and texts are as long as the config allows. A peak is that of
loading, or the permanent part plus the largest phase. CUDA's own memory and gaps between tensors
come on top: "tight" is more than 90%. Profiles are those of configs/accelerate. Host memory is in
addition to Python and its libraries; what the first rank reads and writes is on its node alone."""


def main(words: Sequence[str]) -> None:
    """Print the table. Reads only the models' config.json."""
    options = _parse(words)
    kind = JOBS[options.job]
    try:
        config = load_config(kind, options.config, options.overrides)
    except UserError as error:
        others = ", ".join(name for name in JOBS if name != options.job)
        raise UserError(
            f"{error} (read as a config of marlhf {options.job}; --job is for {others})"
        ) from None
    memory, gpus = round(options.gpu_memory * _GB), options.gpus
    counter = counter_of(config, memory)
    by_profile = estimates(counter, gpus)
    say(header(counter.config, counter.run(gpus), gpus, options.gpu_memory), sys.stdout)
    print(table(by_profile, memory))
    print(host_table(by_profile))
    print(_NOTES)
    fits = [profile for profile, needed in by_profile.items() if needed.peak <= memory]
    if fits:
        print(f"\nFits: {', '.join(fits)}.")
        return
    print(
        f"\nNothing fits in {options.gpu_memory:g} GB. What would help, and the profile with the "
        "lowest peak then:"
    )
    for changes, by_profile in helps(config, gpus, memory):
        profile, lowest = min(by_profile.items(), key=lambda item: item[1].peak)
        print(f"  {changes}\n    {profile}: {lowest.peak / _GB:.4g} GB{_mark(lowest, memory)}")


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="marlhf estimate",
        usage="marlhf estimate CONFIG.yaml [key.sub=value ...] --gpus N --gpu-memory GB "
        "[--job JOB]",
        description="How much memory a job needs on each GPU and on the host, without running it: "
        "only the models' config.json are read.",
    )
    add = parser.add_argument
    add("config", metavar="CONFIG.yaml", help="a config of the job")
    add("overrides", nargs="*", metavar="key.sub=value", help="as for the job")
    add("--gpus", type=at_least_one, required=True, metavar="N", help="processes, one per GPU")
    add("--gpu-memory", type=_positive, required=True, metavar="GB", help="of one GPU, 1e9 bytes")
    add("--job", choices=list(JOBS), default="ppo", help="default: ppo")
    return parser.parse_intermixed_args(list(words))


def _positive(word: str) -> float:
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"given {word}, must be a number above 0")
    return number


def counter_of(config: JobConfig, device_memory: int | None = None) -> PassCounter:
    """The `PassCounter` of a config, for devices of so many bytes. Raises UserError."""
    from marlhf.estimate.allocations import PassCounter
    from marlhf.estimate.fake_models import fake_models

    return PassCounter(config, fake_models(config), device_memory)


def estimates(counter: PassCounter, gpus: int) -> dict[str, MemoryEstimate]:
    """Memory per rank, by profile; an evaluation is the same under every profile.

    With `offload` there are none of ZeRO-3, which refuses it.
    """
    by_profile: dict[str, MemoryEstimate] = {}
    for profile in PROFILES:
        ranks = 1 if profile == "single" else gpus
        run = counter.run(ranks, is_sharded(profile))
        if is_sharded(profile) and run.offloaded:
            continue  # refused
        if run.in_turn:
            return {"any": estimate(counter.run(gpus), profile, gpus)}
        by_profile[profile] = estimate(run, profile, ranks)
    return by_profile


def helps(
    config: JobConfig, gpus: int, device_memory: int | None = None
) -> Iterable[tuple[str, dict[str, MemoryEstimate]]]:
    """Yield `(changes, estimates with them)` for settings that lower the memory.

    Changes accumulate: settings first, then more GPUs with them, then, on `gpus` GPUs again, LoRA
    and its base in 4 bits.
    """
    from marlhf.config.loading import apply_overrides, config_from_dict, config_to_dict

    values: dict[str, Any] = config_to_dict(config)
    changes: list[str] = []

    def counter() -> PassCounter:
        kind: Any = type(config)
        changed = config_from_dict(kind, apply_overrides(kind, values, changes))
        return counter_of(changed, device_memory)

    trains = not isinstance(config, EvaluateConfig)
    settings = (
        ("model.gradient_checkpointing=true", "optimizer.micro_batch_size=1")
        if trains
        else ("rollout.micro_batch_size=1", f"rollout.batch_size={gpus}")
    )
    for change in settings:
        if not _has(values, change):
            changes.append(change)
            yield " ".join(changes), estimates(counter(), gpus)
    if not trains:
        return
    last = counter()
    for count in (2 * gpus, 8 * gpus):
        yield " ".join([*changes, f"--gpus {count}"]), estimates(last, count)
    is_set = {
        "model.lora.r=16": config.model.lora is not None,
        "model.quantization.bits=4": config.model.quantization is not None,
    }
    for change in (change for change in is_set if not is_set[change]):
        changes.append(change)
        try:
            changed = estimates(counter(), gpus)
        except UserError:  # not for this family, this file, or with another key
            return
        yield " ".join(changes), changed


def _has(values: dict[str, Any], change: str) -> bool:
    key, _, proposed = change.partition("=")
    section, name = key.split(".")
    return str(values[section][name]).lower() == proposed


def header(config: JobConfig, run: RunSizes, gpus: int, gpu_memory: float) -> str:
    """Sizes of the models, and shapes of their batches."""
    models = [
        f"{name} {_millions(model.frozen + model.trained)}"
        + (f" ({_millions(model.trained)} trained)" if model.trained and model.frozen else "")
        for name, model in run.models.items()
    ]
    lines = [f"Parameters: {', '.join(models)}.", f"{gpus} GPUs of {gpu_memory:g} GB"]
    if isinstance(config, PPOConfig | EvaluateConfig):
        rollout = config.rollout
        copies = rollout.responses_per_prompt if isinstance(config, PPOConfig) else 1
        when = "per update" if isinstance(config, PPOConfig) else "at a time"
        lines[-1] += (
            f"; {rollout.batch_size * copies} responses {when}, prompts of "
            f"{rollout.max_prompt_length} and responses of {rollout.max_new_tokens} tokens; "
            f"{_sampling_words(config, run)}"
        )
    else:
        unit = "sequences" if isinstance(config, SFTConfig) else "pairs"
        lines[-1] += (
            f"; {config.batch_size} {unit} of {config.max_length} tokens per optimiser step"
        )
    if not isinstance(config, EvaluateConfig):
        unit = "pairs" if isinstance(config, RewardConfig) else "sequences"
        lines[-1] += f"; micro-batches of {config.optimizer.micro_batch_size} {unit}"
    return "\n".join(lines) + f" in {config.model.precision}.\n"


def _sampling_words(config: PPOConfig | EvaluateConfig, run: RunSizes) -> str:
    """What is counted for sampling."""
    assert run.sampling is not None
    if run.sampling.cache:
        return f"KV cache of a rank's responses {run.sampling.cache / _GB:.1f} GB"
    name, _ = engine_settings(config.rollout)
    if run.sampling.other:
        return f"{run.sampling.other / _GB:.1f} GB reserved by the engine {name}"
    return f"what the engine {name} needs is not counted"


def _millions(count: int) -> str:
    return f"{count / 1e6:,.{0 if count >= 1e7 else 2}f}M"


def table(by_profile: Mapping[str, MemoryEstimate], memory: int) -> str:
    """One line per profile, in GB."""
    first = next(iter(by_profile.values()))
    phases = list(first.phases)
    heads = ["profile", "weights", "optimiser", "buffers", *phases, "load", "peak", "in", "fits"]
    above = ["", "permanent:", "", "", "plus one of:", *[""] * (len(phases) - 1), "", "", "", ""]
    rows, details = [above, heads], []
    for profile, needed in by_profile.items():
        permanent = [needed.weights, needed.optimizer, needed.buffers]
        extra = [phase.total for phase in needed.phases.values()]
        sizes = (*permanent, *extra, needed.loading, needed.peak)
        numbers = [f"{size / _GB:.2f}" for size in sizes]
        rows.append([profile, *numbers, needed.binding, _verdict(needed, memory)])
        parts = [
            f"{name}: {_parts(phase)}"
            for name, phase in needed.phases.items()
            if phase.gathered or phase.gradients
        ]
        if parts:
            details.append(f"  {profile:<14} {'; '.join(parts)}")
    heading = (
        ["", "Of these, gathered or fetched from the host + gradients + activations:"]
        if details
        else []
    )
    return "\n".join([*_aligned(rows), *heading, *details, ""])


def host_table(by_profile: Mapping[str, MemoryEstimate]) -> str:
    """Host memory of each rank, and of the first at its moments, in GB."""
    rows = [["host memory:", "each rank", "first, to read", "to write final/", "first's peak"]]
    for profile, needed in by_profile.items():
        sizes = (needed.host, needed.reading, needed.saving, needed.host_peak)
        rows.append([profile, *(f"{size / _GB:.2f}" for size in sizes)])
    return "\n".join([*_aligned(rows), ""])


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _parts(phase: Any) -> str:
    sizes = (phase.gathered, phase.gradients, phase.activations)
    return " + ".join(f"{size / _GB:.2f}" for size in sizes)


def _verdict(needed: MemoryEstimate, memory: int) -> str:
    if needed.peak > memory:
        return "cannot load" if needed.loading > memory else "no"
    return "tight" if needed.peak > _TIGHT * memory else "yes"


def _mark(needed: MemoryEstimate, memory: int) -> str:
    return {"no": "", "cannot load": "", "tight": ", fits tightly", "yes": ", fits"}[
        _verdict(needed, memory)
    ]
