"""`marlhf estimate`: memory of a ppo run per GPU, under every launch profile."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from marlhf.common.errors import Parser, UserError, at_least_one, say
from marlhf.config import PPOConfig
from marlhf.config.loading import load_config
from marlhf.estimate.memory_model import (
    PROFILES,
    MemoryEstimate,
    Profile,
    RunSizes,
    estimate,
    is_sharded,
)

if TYPE_CHECKING:
    from marlhf.estimate.allocations import PassCounter

_GB = 10**9
_TIGHT = 0.9  # share of the memory: CUDA's own and fragmentation come on top
_NOTES = """\
GB are 1e9 bytes. Prompts and responses are as long as the config allows. A peak is the permanent
part plus the largest phase. CUDA's own memory and gaps between tensors come on top: "tight" is
more than 90%. Profiles are those of configs/accelerate; host is the CPU memory for this rank's
part of an offloaded run."""


def main(words: Sequence[str]) -> None:
    """Print the table. Reads only the models' config.json."""
    options = _parse(words)
    try:
        config = load_config(PPOConfig, options.config, options.overrides)
    except UserError as error:
        raise UserError(f"{error} (estimate takes a config of marlhf ppo)") from None
    memory = round(options.gpu_memory * _GB)
    gpus = options.gpus
    counter = counter_of(config)
    by_profile = estimates(counter, gpus)
    say(header(config, counter.run(gpus), gpus, options.gpu_memory), sys.stdout)
    print(table(by_profile, memory))
    print(loading_line(next(iter(by_profile.values()))))
    print(_NOTES)
    fits = [profile for profile, needed in by_profile.items() if needed.peak <= memory]
    if fits:
        print(f"\nFits: {', '.join(fits)}.")
        return
    print(
        f"\nNothing fits in {options.gpu_memory:g} GB. What would help, and the profile with the "
        "lowest peak then:"
    )
    for changes, by_profile in helps(config, gpus):
        profile, lowest = min(by_profile.items(), key=lambda item: item[1].peak)
        print(f"  {changes}\n    {profile}: {lowest.peak / _GB:.4g} GB{_mark(lowest, memory)}")


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="marlhf estimate",
        usage="marlhf estimate CONFIG.yaml [key.sub=value ...] --gpus N --gpu-memory GB",
        description="How much memory `marlhf ppo CONFIG.yaml` needs on each GPU, without running "
        "it: only the models' config.json are read.",
    )
    add = parser.add_argument
    add("config", metavar="CONFIG.yaml", help="a config of marlhf ppo")
    add("overrides", nargs="*", metavar="key.sub=value", help="as for marlhf ppo")
    add("--gpus", type=at_least_one, required=True, metavar="N", help="processes, one per GPU")
    add("--gpu-memory", type=_positive, required=True, metavar="GB", help="of one GPU, 1e9 bytes")
    return parser.parse_intermixed_args(list(words))


def _positive(word: str) -> float:
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"given {word}, must be a number above 0")
    return number


def counter_of(config: PPOConfig) -> PassCounter:
    """The `PassCounter` of a config. Raises UserError."""
    from marlhf.estimate.allocations import PassCounter
    from marlhf.estimate.fake_models import fake_models

    return PassCounter(config, fake_models(config))


def estimates(counter: PassCounter, gpus: int) -> dict[Profile, MemoryEstimate]:
    """Memory per rank, by profile."""
    by_profile = {}
    for profile in PROFILES:
        ranks = _ranks(profile, gpus)
        run = counter.run(ranks, is_sharded(profile))
        by_profile[profile] = estimate(run, profile, ranks)
    return by_profile


def _ranks(profile: Profile, gpus: int) -> int:
    return 1 if profile == "single" else gpus


def helps(config: PPOConfig, gpus: int) -> Iterable[tuple[str, dict[Profile, MemoryEstimate]]]:
    """Yield `(changes, estimates with them)` for settings that lower the memory.

    Changes accumulate: settings first, then more GPUs with them, then LoRA, on `gpus` GPUs again.
    """
    from marlhf.config.loading import apply_overrides, config_from_dict, config_to_dict

    values: dict[str, Any] = config_to_dict(config)
    changes: list[str] = []

    def counter() -> PassCounter:
        return counter_of(config_from_dict(PPOConfig, apply_overrides(PPOConfig, values, changes)))

    for change in ("model.gradient_checkpointing=true", "optimizer.micro_batch_size=1"):
        if not _has(values, change):
            changes.append(change)
            yield " ".join(changes), estimates(counter(), gpus)
    last = counter()
    for count in (2 * gpus, 8 * gpus):
        yield " ".join([*changes, f"--gpus {count}"]), estimates(last, count)
    if config.model.lora is None:
        changes.append("model.lora.r=16")
        yield " ".join(changes), estimates(counter(), gpus)


def _has(values: dict[str, Any], change: str) -> bool:
    key, _, proposed = change.partition("=")
    section, name = key.split(".")
    return str(values[section][name]).lower() == proposed


def header(config: PPOConfig, run: RunSizes, gpus: int, gpu_memory: float) -> str:
    """Sizes of the models, and shapes of their batches."""
    rollout = config.rollout
    responses = rollout.batch_size * rollout.responses_per_prompt
    models = [
        f"{name} {_millions(model.frozen + model.trained)}"
        + (f" ({_millions(model.trained)} trained)" if model.trained and model.frozen else "")
        for name, model in run.models.items()
    ]
    return (
        f"Parameters: {', '.join(models)}.\n"
        f"{gpus} GPUs of {gpu_memory:g} GB; {responses} responses per update, prompts of "
        f"{rollout.max_prompt_length} and responses of {rollout.max_new_tokens} tokens; "
        f"micro-batches of {config.optimizer.micro_batch_size} sequences in "
        f"{config.model.precision}; KV cache of a rank's responses "
        f"{run.sampling.cache / _GB:.1f} GB.\n"
    )


def _millions(count: int) -> str:
    return f"{count / 1e6:,.{0 if count >= 1e7 else 2}f}M"


def table(by_profile: Mapping[Profile, MemoryEstimate], memory: int) -> str:
    """One line per profile, in GB."""
    first = next(iter(by_profile.values()))
    phases = list(first.phases)
    heads = ["profile", "weights", "optimiser", "buffers", *phases, "peak", "fits", "host"]
    above = ["", "permanent:", "", "", "plus one of:", *[""] * (len(phases) - 1), "", "", ""]
    rows = [above, heads]
    details = []
    for profile, needed in by_profile.items():
        permanent = [needed.weights, needed.optimizer, needed.buffers]
        extra = [phase.total for phase in needed.phases.values()]
        numbers = [f"{size / _GB:.2f}" for size in (*permanent, *extra, needed.peak)]
        rows.append([profile, *numbers, _verdict(needed, memory), f"{needed.host / _GB:.1f}"])
        parts = [
            f"{name}: {_parts(phase)}"
            for name, phase in needed.phases.items()
            if phase.gathered or phase.gradients
        ]
        details.append(f"  {profile:<14} {'; '.join(parts)}")
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join(
        [*lines, "", "Of these, weights gathered + gradients + activations:", *details, ""]
    )


def loading_line(needed: MemoryEstimate) -> str:
    """What loading needs in addition to what stays, which is the same under every profile."""
    return (
        f"Loading, beyond what is permanent: {needed.loading / _GB:.2f} GB on each GPU, and "
        f"{needed.reading / _GB:.2f} GB on the host of the first rank.\n"
    )


def _parts(phase: Any) -> str:
    sizes = (phase.gathered, phase.gradients, phase.activations)
    return " + ".join(f"{size / _GB:.2f}" for size in sizes)


def _verdict(needed: MemoryEstimate, memory: int) -> str:
    if needed.peak > memory:
        return "no"
    return "tight" if needed.peak > _TIGHT * memory else "yes"


def _mark(needed: MemoryEstimate, memory: int) -> str:
    return {"no": "", "tight": ", fits tightly", "yes": ", fits"}[_verdict(needed, memory)]
