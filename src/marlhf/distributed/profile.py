"""Checks the launch configuration of accelerate and DeepSpeed against the job's."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from accelerate import DeepSpeedPlugin
from accelerate.utils import str_to_bool
from packaging.version import Version

from marlhf.common.errors import UserError, one_line
from marlhf.compat.deepspeed import check_names, without_extension

# The versions in pyproject.toml. Before 0.19.8 a step to be discarded is applied.
DEEPSPEED = ("0.19.8", "0.20")

# keys that a DeepSpeed configuration may not set, and what sets them
_OURS = {
    "optimizer": "the optimizer section of the job's config",
    "scheduler": "optimizer.schedule of the job's config",
    "gradient_clipping": "optimizer.max_grad_norm of the job's config",
    "gradient_accumulation_steps": "optimizer.micro_batch_size of the job's config",
    "train_batch_size": "batch_size of the job's config",
    "train_micro_batch_size_per_gpu": "optimizer.micro_batch_size of the job's config",
    "fp16": "model.precision of the job's config",
    "bf16": "model.precision of the job's config",
}
_NO_ACCUMULATION = ("gradient_accumulation_steps", 1)  # accelerate's default

# number of processes, as set by launchers that do not set WORLD_SIZE
_NOT_OF_TORCH = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
_HOW_TO_START = (
    "`accelerate launch --multi_gpu --num_processes N -m marlhf ...` (without GPUs it starts CPU "
    "processes) or `torchrun --nproc_per_node N -m marlhf ...`"
)
# sharding methods of accelerate that this library does not support
_NOT_SUPPORTED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism_config",
}


def uses_cpu() -> bool:
    """Whether accelerate is configured to use no GPU. Raises UserError."""
    return _flag("ACCELERATE_USE_CPU")


def _flag(name: str) -> bool:
    try:
        return bool(str_to_bool(os.environ.get(name) or "false"))
    except ValueError:
        raise UserError(f"{name}: given {os.environ[name]!r}, must be true or false") from None


def launched_processes() -> int:
    """Number of processes that the launcher announces; 1 without a launcher. Raises UserError."""
    world = _number("WORLD_SIZE", 1)
    if world > 1:
        for name in ("RANK", "LOCAL_RANK"):
            if not 0 <= _number(name, -1) < world:
                raise UserError(
                    f"{name}: given {os.environ.get(name)!r}, must be 0 to {world - 1} where "
                    f"WORLD_SIZE is {world}; start with {_HOW_TO_START}"
                )
        if not 0 < _number("MASTER_PORT", 1) < 2**16:
            raise UserError(
                f"MASTER_PORT: given {os.environ['MASTER_PORT']!r}, must be 1 to 65535, set by the "
                "launcher"
            )
    return world


def _number(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not text.removeprefix("-").isdecimal():
        raise UserError(f"{name}: given {text!r}, must be a whole number, set by the launcher")
    if name == "WORLD_SIZE" and int(text) < 1:
        raise UserError(f"{name}: given {text}, must be at least 1")
    return int(text)


def lone_process() -> str | None:
    """A warning for the user if this process runs alone though several were requested.

    Raises UserError if others run that it is not connected to.
    """
    if "WORLD_SIZE" in os.environ:
        return None
    for name in _NOT_OF_TORCH:
        if os.environ.get(name, "1") not in ("", "1"):
            raise UserError(
                f"{name}: given {os.environ[name]}, but what started these processes does not "
                f"connect them (no WORLD_SIZE); use {_HOW_TO_START}"
            )
    # accelerate sets ACCELERATE_USE_CPU for a process that it starts alone, and MASTER_PORT if
    # several were requested
    if "ACCELERATE_USE_CPU" in os.environ and "MASTER_PORT" in os.environ:
        return (
            "one process runs, though accelerate was asked for several: without --multi_gpu or a "
            f"profile it starts several only where it finds several GPUs; use {_HOW_TO_START}"
        )
    return None


def _check_deepspeed_version() -> None:
    """Refuse versions that would train wrongly. Raises UserError."""
    lowest, beyond = DEEPSPEED
    try:
        installed = version("deepspeed")
    except PackageNotFoundError:
        installed = "none"
    if installed == "none" or not Version(lowest) <= Version(installed) < Version(beyond):
        raise UserError(
            f"DeepSpeed: installed is {installed}, must be at least {lowest} and below {beyond}: "
            f"pip install 'deepspeed>={lowest},<{beyond}'"
        )


def deepspeed_plugin(on_cpu: bool) -> DeepSpeedPlugin | None:
    """DeepSpeed's configuration as accelerate builds it; None for a launch without DeepSpeed.

    Raises UserError, also for other sharding methods of accelerate.
    """
    for name, kind in _NOT_SUPPORTED.items():
        if _flag(name):
            raise UserError(
                f"accelerate's {kind}: is not supported; models are spread by DDP or DeepSpeed "
                "ZeRO-1 to 3, as the profiles in configs/accelerate do"
            )
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return None
    _check_deepspeed_version()
    if uses_cpu():
        raise UserError(
            "ACCELERATE_USE_CPU: given true with DeepSpeed, must be left out, or accelerate "
            "leaves out DeepSpeed; without GPUs the ranks are CPU processes anyway"
        )
    if "LOCAL_RANK" not in os.environ:
        raise UserError(
            "ACCELERATE_USE_DEEPSPEED: given true, but no launcher started this process; use "
            "`accelerate launch --config_file configs/accelerate/zero3.yaml -m marlhf ...`"
        )
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        without_extension("deepspeed_shm_comm")
    check_names()
    if os.environ.get("ACCELERATE_DEEPSPEED_ZERO3_INIT", "false").lower() == "true":
        raise UserError(
            "accelerate's zero3_init_flag: given true, must be false; marlhf shards weights while "
            "it reads them, by itself"
        )
    try:
        plugin = DeepSpeedPlugin(zero3_init_flag=False)
    except Exception as error:  # accelerate's checks, a missing file, broken JSON
        raise UserError(f"accelerate's DeepSpeed configuration: {one_line(error)}") from error
    config = plugin.deepspeed_config
    for key, owner in _OURS.items():
        value = config.pop(key, "auto")
        enabled = value.get("enabled") if isinstance(value, dict) and "enabled" in value else value
        if enabled not in ("auto", False, None) and (key, value) != _NO_ACCUMULATION:
            raise UserError(f"DeepSpeed's {key}: given {value!r}, must be left to {owner}")
    stage = config["zero_optimization"]["stage"]
    if stage not in (1, 2, 3):
        raise UserError(f"DeepSpeed's zero stage: given {stage!r}, must be 1, 2 or 3")
    return plugin


def precision_note(precision: str, device: torch.device) -> str | None:
    """A line for fp32 on a GPU, or bf16 on a CPU that emulates it."""
    if precision == "fp32" and device.type == "cuda":
        return (
            "model.precision is fp32: on a GPU bf16 is about ten times as fast, and tf32 several "
            "times"
        )
    if precision == "bf16" and device.type == "cpu" and _lacks_bf16():
        return "model.precision is bf16: this CPU has no instructions for it, fp32 is faster"
    return None


def _lacks_bf16() -> bool:
    """Whether this is an x86 CPU whose matrix products in bf16 are emulated."""
    get: Callable[[], dict[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)  # torch 2.10
    can = get()
    is_x86 = can.get("architecture") == "x86_64"
    return is_x86 and not (can["avx512_bf16"] or can["amx_bf16"])


def check_precision(precision: str) -> None:
    """Check that accelerate's mixed precision is unset or the job's. Raises UserError.

    accelerate's default is "no".
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if launched not in ("no", precision):
        raise UserError(
            f"model.precision: given {precision!r}, but accelerate's mixed_precision is "
            f"{launched!r}; leave that out"
        )
