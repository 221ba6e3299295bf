"""`marlhf estimate` against measured peaks of real updates.

    python benchmarks/memory_estimates.py [--cases NAME ...] [--json FILE]

Each case runs a job with a random model, for a few updates in processes of its own, on the CPU, or
on a GPU if there is one, and reads the peak of each: the resident set on a CPU, on a GPU
`torch.cuda.max_memory_allocated`. On a CPU a tiny model's run under the same profile is subtracted:
Python, its libraries and the connection between ranks. The C library is told to give freed tensors
back to the system (MALLOC_MMAP_THRESHOLD_); the peak is counted from when the models are built:
`loading.py` measures loading. What only a CPU does is left out: copies of weights to sample from
(`marlhf.rollout.packed_weights`), and smaller micro-batches (`marlhf.rollout.batching`). Needs
about 14 GB; the cases with small models about 4.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROFILES = Path(__file__).parents[1] / "configs" / "accelerate"
# shapes, as of a config.json
WIDE = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
}
DEEP = WIDE | {
    "vocab_size": 2000,
    "hidden_size": 320,
    "intermediate_size": 1280,
    "num_hidden_layers": 18,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "tie_word_embeddings": False,
}
TINY = DEEP | {
    "vocab_size": 300,
    "hidden_size": 40,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
}
SMOLLM2 = WIDE | {  # SmolLM2-135M
    "vocab_size": 49152,
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
QWEN3 = WIDE | {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "num_hidden_layers": 10,
    "head_dim": 64,
}
GEMMA2 = WIDE | {
    "model_type": "gemma2",
    "vocab_size": 256000,
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 64,
}
GPT2 = {"model_type": "gpt2"}  # 124M
BRIEF = {
    "steps": 2,
    "rollout": {"max_prompt_length": 40, "max_new_tokens": 16, "min_new_tokens": 16},
}
CHECKPOINTING = {"gradient_checkpointing": True}
ACCUMULATING = {"optimizer": {"micro_batch_size": 4}}
LORA = {"lora": {"r": 16}}

# name -> profile, shape, keys of the config's section `model`, other sections
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "wide": ("single", WIDE, {}, {}),
    "deep": ("single", DEEP, {}, {}),
    "deep, accumulating": ("single", DEEP, {}, ACCUMULATING),
    "deep, checkpointing": ("single", DEEP, CHECKPOINTING, {}),
    "deep, bf16": ("single", DEEP, {"precision": "bf16"}, {}),
    "wide, LoRA": ("single", WIDE, LORA, {}),
    "wide, RLOO": (
        "single",
        WIDE,
        {},
        {"ppo": {"estimator": "rloo"}, "rollout": {"responses_per_prompt": 2, "batch_size": 4}},
    ),
    "wide, DDP": ("ddp", WIDE, {}, {}),
    "wide, ZeRO-1": ("zero1", WIDE, {}, {}),
    "wide, ZeRO-2": ("zero2", WIDE, {}, {}),
    "deep, ZeRO-2, accumulating": ("zero2", DEEP, {}, ACCUMULATING),
    "wide, ZeRO-3": ("zero3", WIDE, {}, {}),
    "deep, ZeRO-3, checkpointing": ("zero3", DEEP, CHECKPOINTING, {}),
    "wide, ZeRO-3, LoRA": ("zero3", WIDE, LORA, {}),
    "SmolLM2-135M": ("single", SMOLLM2, {}, BRIEF),
    "SmolLM2-135M, LoRA": ("single", SMOLLM2, LORA, {}),
    "SmolLM2-135M, checkpointing": ("single", SMOLLM2, CHECKPOINTING, BRIEF | ACCUMULATING),
    "SmolLM2-135M, DDP": ("ddp", SMOLLM2, {}, BRIEF),
    "SmolLM2-135M, ZeRO-2": ("zero2", SMOLLM2, {}, BRIEF),
    "SmolLM2-135M, ZeRO-3": ("zero3", SMOLLM2, {}, BRIEF),
    "Qwen3": ("single", QWEN3, {}, BRIEF),
    "Qwen3, ZeRO-2, accumulating": ("zero2", QWEN3, {}, BRIEF | ACCUMULATING),
    "Qwen3, ZeRO-3, LoRA": ("zero3", QWEN3, LORA, BRIEF),
    "Gemma 2, bf16, checkpointing": (
        "single",
        GEMMA2,
        CHECKPOINTING | {"precision": "bf16"},
        BRIEF,
    ),
    "Gemma 2, ZeRO-3": ("zero3", GEMMA2, {}, BRIEF),
    "GPT-2": ("single", GPT2, {}, BRIEF),
    "GPT-2, ZeRO-1": ("zero1", GPT2, {}, BRIEF),
    "GPT-2, ZeRO-2, LoRA": ("zero2", GPT2, {"lora": {"target_modules": ["c_attn"]}}, BRIEF),
    "sft, deep": ("single", DEEP, {}, {}),
    "sft, wide, LoRA": ("single", WIDE, LORA, {}),
    "sft, wide, ZeRO-2": ("zero2", WIDE, {}, {}),
    "reward, deep, checkpointing": ("single", DEEP, CHECKPOINTING, {}),
    "reward, wide, DDP": ("ddp", WIDE, {}, {}),
    "evaluate, SmolLM2-135M": ("single", SMOLLM2, {}, {}),
    "evaluate, Qwen3": ("single", QWEN3, {}, {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Estimated and measured peaks.")
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        run_rank(Path(options.rank))
        return
    rows, overhead = {}, {}
    print(f"{'case':<42} {'measured MB':>12} {'estimated MB':>13} {'ratio':>6}   peak in")
    for name in options.cases:
        profile, shape, model, sections = CASES[name]
        first = name.split(",")[0]
        job = first if first in ("sft", "reward", "evaluate") else "ppo"
        key = f"{profile} {job}"
        if key not in overhead:
            overhead[key] = measure(job, profile, TINY, {}, {})[0]
            print(f"{key}: {overhead[key] / 1e6:.0f} MB of a tiny model's run subtracted")
        peak, estimated, phase = measure(job, profile, shape, model, sections)
        peak -= overhead[key]
        rows[name] = {"measured": peak, "estimated": estimated, "phase": phase}
        ratio = estimated / peak
        print(
            f"{name:<42} {peak / 1e6:12.0f} {estimated / 1e6:13.0f} {ratio:6.2f}   {phase}",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def measure(
    job: str, profile: str, shape: dict[str, Any], model: dict[str, Any], sections: dict[str, Any]
) -> tuple[int, int, str]:
    """`(most bytes of any rank, estimate, phase of its peak)` of one case."""
    import torch

    from marlhf.estimate.command import counter_of
    from marlhf.estimate.memory_model import estimate

    ranks = 1 if profile == "single" else 2
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        case = {"job": job, "shape": shape, "model": model, "sections": sections, "ranks": ranks}
        (folder / "case.json").write_text(json.dumps(case))
        config(case, folder)  # writes the model's config.json, for all ranks
        done = subprocess.run(
            [sys.executable, *launcher(profile), __file__, "--rank", name],
            env={
                **os.environ,
                "MALLOC_MMAP_THRESHOLD_": "65536",
                "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks)),
                "PYTHONWARNINGS": "ignore",
            },
            capture_output=True,
            text=True,
        )
        peaks = [int(file.read_text()) for file in folder.glob("peak-*")]
        if len(peaks) < ranks:
            sys.exit(done.stderr[-3000:])
        with torch.device("cpu"):
            run = counter_of(config(case, folder)).run(ranks, profile.startswith("zero3"))
    needed = estimate(run, profile, ranks)  # pyright: ignore[reportArgumentType]
    phase = max(needed.phases, key=lambda name: needed.phases[name].total)
    return max(peaks), needed.permanent + needed.phases[phase].total, phase


def launcher(profile: str) -> list[str]:
    """What stands before the script on Python's command line."""
    if profile == "single":
        return []
    words = ["-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"]
    return [*words, "--config_file", str(PROFILES / f"{profile}.yaml")]


def config(case: dict[str, Any], folder: Path) -> Any:
    """The run of a case; its model's config.json is written to the folder."""
    from marlhf.config.loading import config_from_dict, merge
    from marlhf.estimate.shapes import JOBS

    job, ranks, path = case["job"], case["ranks"], str(folder / "model")
    if not (folder / "model" / "config.json").exists():
        model_config(case).save_pretrained(path)
    lengths = {"max_prompt_length": 80, "max_new_tokens": 48, "min_new_tokens": 48}
    quiet = {
        "log": {"progress": False, "tensorboard": False, "eval_every": 0},
        "checkpoint": {"every": 0},
        "output_dir": str(folder / "run"),
        "steps": 3,
    }
    data = {"path": str(folder / "rows.jsonl"), "eval_rows": 0}
    values: dict[str, Any] = {
        "ppo": quiet
        | {
            "model": {"path": path, **case["model"]},
            "data": {"eval_rows": 0},
            "rollout": {"batch_size": 8 * ranks, **lengths},
        },
        "sft": quiet
        | {
            "model": {"path": path, **case["model"]},
            "data": data,
            "batch_size": 16 * ranks,
            "max_length": 128,
            "loss_on": "all",
        },
        "reward": quiet
        | {
            "model": {"path": path, **case["model"]},
            "data": data | {"prompt_column": "prompt"},
            "batch_size": 8 * ranks,
            "max_length": 128,
            "optimizer": {"micro_batch_size": 4},
        },
        "evaluate": {
            "policies": {"a": path},
            "model": case["model"],
            "data": data,
            "output_dir": str(folder / "run"),
            "rollout": {"batch_size": 16, **lengths},
        },
    }[job]
    return config_from_dict(JOBS[job], merge(values, case["sections"]))


def model_config(case: dict[str, Any]) -> Any:
    """The transformers configuration of a case's shape."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**case["shape"])


def tokenizer() -> Any:
    """One token for each byte."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(models.BPE({t: i for i, t in enumerate(["<s>", "</s>", *letters])}, []))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens, bos_token="<s>", eos_token="</s>", pad_token="<s>"
    )


def run_rank(folder: Path) -> None:
    """A few updates of one rank; leaves its peak in the folder."""
    case = json.loads((folder / "case.json").read_text())
    rank = int(os.environ.get("RANK", 0))
    run = run_ppo if case["job"] == "ppo" else run_job
    (folder / f"peak-{rank}").write_text(str(run(case, folder)))


def as_on_a_gpu() -> None:
    """Leave out what only CPUs do."""
    from marlhf.rollout import batching, packed_weights

    packed_weights.FEWEST_TOKENS = batching.CPU_PASS_LIMIT = sys.maxsize


def run_ppo(case: dict[str, Any], folder: Path) -> int:
    """The peak of three updates."""
    import torch
    from transformers import AutoModelForCausalLM

    from marlhf.training.ppo import PPOTrainer

    as_on_a_gpu()
    settings = config(case, folder)
    rows = settings.rollout.batch_size
    trainer = PPOTrainer(
        settings,
        reward=lambda prompts, completions: [float(len(c) % 7) for c in completions],
        train_dataset=[f"{'y' * 200}{i:03}" for i in range(rows)],
        model=AutoModelForCausalLM.from_config(model_config(case), dtype=torch.float32),
        tokenizer=tokenizer(),
    )
    reset_peak()
    for _ in range(settings.steps):
        trainer.step(trainer.stream.batch(trainer.step_count, rows))
    most = peak()
    trainer.distributed.barrier()
    return most


def run_job(case: dict[str, Any], folder: Path) -> int:
    """The peak of another job, from when its model is there until it writes the results."""
    import torch
    from transformers import AutoModelForCausalLM

    import marlhf.evaluation.sampling as sampling
    from marlhf.evaluation.job import evaluate
    from marlhf.training import reward_model, sft
    from marlhf.training.supervised import SupervisedTrainer

    as_on_a_gpu()
    is_first = os.environ.get("RANK", "0") == "0"
    if is_first:
        lm = AutoModelForCausalLM.from_config(model_config(case), dtype=torch.float32)
        lm.save_pretrained(folder / "model")
        del lm
        tokenizer().save_pretrained(folder / "model")
        row = {"prompt": "x" * 80, "completion": "y" * 60, "chosen": "y" * 60, "rejected": "z" * 60}
        (folder / "rows.jsonl").write_text((json.dumps(row) + "\n") * 48)
        (folder / "written").touch()
    while not (folder / "written").exists():
        time.sleep(0.1)
    most = 0

    def watched(work: Any) -> Any:
        def run(*arguments: Any) -> Any:
            nonlocal most
            reset_peak()
            result = work(*arguments)
            most = max(most, peak())
            return result

        return run

    settings = config(case, folder)
    if case["job"] == "evaluate":
        sampling._sampled = watched(sampling._sampled)
        evaluate(settings)
    else:
        SupervisedTrainer._train = watched(SupervisedTrainer._train)
        {"sft": sft, "reward": reward_model}[case["job"]].run(settings)
    return most


def reset_peak() -> None:
    """From now on `peak` counts."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark of the memory


def peak() -> int:
    """Most bytes in use since `reset_peak`."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


if __name__ == "__main__":
    main()
