"""What lowers the memory of each phase of a job, in words of its configuration."""

from __future__ import annotations

from typing import Any

from marlhf.common.memory_errors import Phase
from marlhf.common.paths import local_path
from marlhf.runs import checkpoint
from marlhf.runs.state import ENGINE_SIZE, MAY_DIFFER

# keys in order of what they cost; those that a job does not have are left out
_KEYS: dict[Phase, tuple[str, ...]] = {
    "sampling": (
        *(ENGINE_SIZE, "rollout.max_new_tokens", "rollout.max_prompt_length"),
        *("rollout.responses_per_prompt", "rollout.batch_size"),
    ),
    "segmenting": ("rollout.max_new_tokens",),
    "scoring": ("rollout.micro_batch_size", "rollout.max_new_tokens", "rollout.max_prompt_length"),
    "training": (
        *("optimizer.micro_batch_size", "model.gradient_checkpointing", "model.lora"),
        *("model.precision", "rollout.max_new_tokens", "rollout.max_prompt_length", "max_length"),
    ),
    "loading": ("model.lora", "model.precision"),
    "saving": (),
}


def memory_advice(config: Any, phase: Phase) -> str:
    """The keys that lower a phase's memory, and how to resume the run."""
    hints = {key: hint for key in _KEYS[phase] if (hint := _hint(config, key)) is not None}
    parts = [f"lower it by {', '.join(hints.values())}"] if hints else []
    if phase == "scoring":
        parts.append("reward models have a batch_size and a max_length")
    if phase in ("loading", "training") and hasattr(config, "optimizer"):
        parts.append("the profiles zero2 and zero3 share it among GPUs")
    parts.append("`marlhf estimate` counts what a run needs")
    folders = checkpoint.steps(local_path(config.output_dir, "output_dir") / "checkpoints")
    if folders and not (config.overwrite and phase == "loading"):  # those are of an older run
        kept = [key for key in hints if key in (ENGINE_SIZE, *MAY_DIFFER)]
        others = f", where {' and '.join(kept)} may differ" if kept else ""
        command = f"resume=auto{' overwrite=false' if config.overwrite else ''}"
        parts.append(f"{command} continues from {folders[0].name}{others}")
    return "".join(f"; {part}" for part in parts)


def _hint(config: Any, key: str) -> str | None:
    """How to change a key; None if that would lower nothing."""
    value: Any = config
    for name in key.split("."):
        if name == "batch_size" and value == "transformers":
            return "rollout.engine={name: transformers, batch_size: ...}"
        if not isinstance(value, dict) and not hasattr(value, name):
            return None
        value = value.get(name, 0) if isinstance(value, dict) else getattr(value, name)
    if key == "rollout.micro_batch_size" and value is None and hasattr(config, "optimizer"):
        value = config.optimizer.micro_batch_size  # the default
    if value is None or value is False:
        return key if value is None else f"{key}=true"
    if key == "model.precision":
        return None if value == "bf16" else f"{key}=bf16"
    return f"{key} (now {value})" if isinstance(value, int) and value > 1 else None
