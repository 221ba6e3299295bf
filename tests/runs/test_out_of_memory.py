"""Out of memory: recognised, explained in a line by phase, and the run resumed with less."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.runs import PROMPTS, vowels
from support.tiny_models import BYTES_VOCAB, byte_tokenizer, tiny_causal_lm

from marlhf import cli
from marlhf.common.errors import UserError
from marlhf.common.memory_errors import doing, is_memory_error, phase_of, without_noise
from marlhf.models.gate import check_model
from marlhf.rewards.learned import longest_input

TOO_MUCH = 1 << 50  # bytes; no machine has them
CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of "
    "which 1.2 GiB is free. Of the allocated memory 70 GiB is allocated by PyTorch. See (https://x)"
)


def cuda_is_full() -> None:
    raise torch.OutOfMemoryError(CUDA)


def host_is_full() -> None:
    raise OSError(errno.ENOMEM, "Cannot allocate memory")


ALLOCATIONS: list[Callable[[], Any]] = [
    lambda: torch.empty(TOO_MUCH, dtype=torch.uint8),
    lambda: np.empty(TOO_MUCH, np.uint8),
    lambda: bytearray(1 << 62),
    cuda_is_full,
    host_is_full,
]


@doing("training")
def plug_in(allocate: Callable[[], Any]) -> None:
    try:
        with doing("scoring"):
            allocate()
    except Exception as error:
        raise UserError("a plug-in failed") from error


@pytest.mark.parametrize("allocate", ALLOCATIONS)
def test_every_allocator_s_error_is_one_and_has_the_innermost_phase(allocate: Any) -> None:
    with pytest.raises(UserError) as error:
        plug_in(allocate)
    assert is_memory_error(error.value)
    assert phase_of(error.value) == "scoring"


def test_other_errors_are_none() -> None:
    with pytest.raises(RuntimeError) as error, doing("training"):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    assert not is_memory_error(error.value)
    assert phase_of(error.value) is None


def test_the_size_stays_and_the_state_of_devices_goes() -> None:
    text = without_noise(torch.OutOfMemoryError(CUDA))
    assert text == "CUDA out of memory. Tried to allocate 2.00 GiB"
    raised = without_noise(UserError(f"reward r: raised OutOfMemoryError: {CUDA} (r.py, line 3)"))
    assert raised.endswith("Tried to allocate 2.00 GiB. (r.py, line 3)")


def test_a_check_at_load_does_not_blame_the_model() -> None:
    """And the longest input is no shorter because there was no memory to try it."""

    def full(*_: Any, **__: Any) -> None:
        cuda_is_full()

    model = tiny_causal_lm("gpt2", BYTES_VOCAB)
    with pytest.raises(torch.OutOfMemoryError):
        longest_input(model, model.config.n_positions, full)
    model.forward = full
    with pytest.raises(torch.OutOfMemoryError):
        check_model(model)


CONFIG = """
model: {path: lm}
data: {path: prompts.jsonl, eval_rows: 0}
reward: {models: given}
rollout: {batch_size: 8, max_new_tokens: 6, max_prompt_length: 16}
optimizer: {micro_batch_size: 4}
checkpoint: {every: 1}
log: {tensorboard: false, progress: false, eval_every: 0}
steps: 3
resume: auto
"""
PHASES = {
    "sampling": ("marlhf.rollout.transformers_engine._decode", "rollout.engine.batch_size"),
    "training": (
        "marlhf.training.objectives.policy_loss",
        "optimizer.micro_batch_size and model.gradient_checkpointing",
    ),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a configuration, a model and data; the working folder."""
    tiny_causal_lm("llama", BYTES_VOCAB).save_pretrained(tmp_path / "lm")
    byte_tokenizer(add_bos=True).save_pretrained(tmp_path / "lm")
    (tmp_path / "ppo.yaml").write_text(CONFIG)
    rows = (json.dumps({"prompt": prompt}) for prompt in PROMPTS)
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def score(prompts: Any, completions: Any) -> Any:
    return vowels(prompts, completions)


def of_run(words: list[str], capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit status of `marlhf ppo`, and its last line on stderr."""
    status: Any = 0
    try:
        cli.main(["ppo", "ppo.yaml", f"reward.models={__name__}.score", *words])
    except SystemExit as end:
        status = end.code
    return status, (capfd.readouterr().err.splitlines() or [""])[-1]


@pytest.mark.parametrize("phase", PHASES)
def test_a_run_says_what_lowers_it_and_resumes_so(
    phase: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert of_run(["output_dir=whole"], capfd)[0] == 0
    name, may_differ = PHASES[phase]

    with monkeypatch.context() as patched:
        module, _, attribute = name.rpartition(".")
        real = getattr(__import__(module, fromlist=["x"]), attribute)

        def fails_in_the_third_update(*args: Any, **keys: Any) -> Any:
            if len(list((folder / "run" / "checkpoints").glob("step-?"))) == 2:
                torch.empty(TOO_MUCH)
            return real(*args, **keys)

        patched.setattr(name, fails_in_the_third_update)
        status, line = of_run(["output_dir=run"], capfd)
    assert status == 2
    assert line.startswith(f"marlhf: out of memory while {phase}: DefaultCPUAllocator: can't ")
    assert line.endswith(f"; resume=auto continues from step-2, where {may_differ} may differ")

    less = "{name: transformers, batch_size: 3}"
    words = ["output_dir=run", "optimizer.micro_batch_size=2", f"rollout.engine={less}"]
    assert of_run(words, capfd)[0] == 0
    for found, wanted in zip(*(rows(folder / name) for name in ("run", "whole")), strict=True):
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def rows(run: Path) -> list[dict[str, float]]:
    """Metrics that depend on no time or memory."""
    names = ("step", "score_mean", "kl_mean", "policy_loss", "grad_norm_policy")
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{name: line[name] for name in names} for line in lines]
