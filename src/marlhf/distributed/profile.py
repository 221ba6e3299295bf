"""What `accelerate launch` was told, and what of it a job allows."""

from __future__ import annotations

import os

from accelerate import DeepSpeedPlugin

from marlhf.errors import UserError, one_line

# what a DeepSpeed configuration may not decide, and who does
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
_NO_ACCUMULATION = ("gradient_accumulation_steps", 1)  # what accelerate writes if not told


def deepspeed_plugin(on_cpu: bool) -> DeepSpeedPlugin | None:
    """DeepSpeed's configuration, as accelerate puts it together; None for a launch without."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return None
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        _without_extension("deepspeed_shm_comm")
    if os.environ.get("ACCELERATE_DEEPSPEED_ZERO3_INIT", "false").lower() == "true":
        raise UserError(
            "accelerate's zero3_init_flag: given true, must be false; weights are read whole by "
            "each rank and sharded then"
        )
    try:
        plugin = DeepSpeedPlugin(zero3_init_flag=False)
    except Exception as error:  # accelerate's checks, a missing file, broken JSON
        raise UserError(f"accelerate's DeepSpeed configuration: {one_line(error)}") from error
    config = plugin.deepspeed_config
    for key, owner in _OURS.items():
        given = config.pop(key, "auto")
        enabled = given.get("enabled") if isinstance(given, dict) and "enabled" in given else given
        if enabled not in ("auto", False, None) and (key, given) != _NO_ACCUMULATION:
            raise UserError(f"DeepSpeed's {key}: given {given!r}, must be left to {owner}")
    stage = config["zero_optimization"]["stage"]
    if stage not in (1, 2, 3):
        raise UserError(f"DeepSpeed's zero stage: given {stage!r}, must be 1, 2 or 3")
    return plugin


def _without_extension(name: str) -> None:
    """Keep DeepSpeed from compiling one of its extensions at start.

    That takes a compiler and a minute, and a process that is killed meanwhile leaves a lock for
    which every later run on the machine would wait, without end.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__[name] = False


def check_precision(precision: str) -> None:
    """accelerate's mixed precision is "no" where nothing was said."""
    given = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if given not in ("no", precision):
        raise UserError(
            f"model.precision: given {precision!r}, but accelerate's mixed_precision is {given!r}; "
            "leave that out"
        )
