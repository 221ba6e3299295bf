"""Updates a second and peak memory against TRL's PPO trainer.

    python -m venv trl-env && trl-env/bin/pip install torch==2.13.0 trl==1.12.0 peft transformers
    python benchmarks/against_trl.py MODEL --trl trl-env/bin/python [--case full lora mixed]

MODEL is a causal LM's directory, such as SmolLM2-135M in safetensors. Both trainers make the same
updates: fp32, the same random reward model (which the critic starts from), prompts of 64 tokens, a
critic of its own, as many optimiser steps. Each side is a process of its own; their updates
alternate, so that a ratio is taken of two updates next to each other. Cases:

  full    full fine-tuning, every response 48 tokens
  mixed   full fine-tuning, response lengths geometric with mean 24, at most 96, the same on both
          sides: the token at its end is replaced by EOS
  lora    an adapter each for policy and critic; here on one base, which the reward model's adapter
          shares too; TRL has a base for each

Seconds are the wall clock's, and in a second table the processor's (all threads together), which
other work on the machine disturbs less. Memory is the largest resident set of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PROMPT_TOKENS = 64
TEXT = (
    "The harbour was quiet in the early morning, and the boats lay still upon the water while the "
    "fishermen mended their nets and spoke of the weather, of the price of salt, of a letter that "
    "one of them had received from a daughter who had gone to study in the capital. Nobody was in "
    "a hurry, since the tide would not turn before noon, and so the old stories were told again "
)
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


@dataclass(frozen=True)
class Settings:
    """What both sides are told."""

    model: str
    reward: str
    case: str
    batch: int
    micro: int
    epochs: int
    response_tokens: int
    threads: int
    backbone: str = "own"

    def prompts(self) -> list[str]:
        """One for each row, no two alike."""
        words = TEXT.split()
        return [" ".join(words[i:] + words[:i]) for i in range(self.batch)]

    def lengths(self, update: int) -> list[int]:
        """Tokens of each response of an update."""
        if self.case != "mixed":
            return [self.response_tokens] * self.batch
        draw = random.Random(update)
        return [1 + min(95, int(draw.expovariate(1 / 24))) for _ in range(self.batch)]


def main() -> None:
    """Run both sides in turns; print tables and a line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--trl", required=True, help="python of an environment that has trl")
    parser.add_argument("--case", nargs="+", default=["full", "lora", "mixed"])
    parser.add_argument("--updates", type=int, default=3, help="timed, after one that is not")
    parser.add_argument("--epochs", type=int, nargs="+", default=[4], help="TRL's default is 4")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--micro", type=int, default=8, help="rows in a training pass")
    parser.add_argument("--response-tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--backbone", choices=["own", "policy"], default="own", help="critic.backbone"
    )
    args = parser.parse_args()
    pythons = {"marlhf": sys.executable, "trl": args.trl}
    results = []
    for case in args.case:
        for epochs in args.epochs:
            with tempfile.TemporaryDirectory() as folder:
                settings = Settings(
                    args.model,
                    str(Path(folder) / "reward"),
                    case,
                    args.batch,
                    args.micro,
                    epochs,
                    args.response_tokens,
                    args.threads,
                    args.backbone,
                )
                make_reward_model(settings)
                sides = {name: Side(python, name, settings) for name, python in pythons.items()}
                results.append(compare(sides, settings, args.updates))
    print_tables(results)
    print(json.dumps(results))


class Side:
    """A trainer in a separate process, which runs an update on request."""

    def __init__(self, python: str, name: str, settings: Settings) -> None:
        threads = str(settings.threads)
        self._process = subprocess.Popen(
            [python, __file__, name, json.dumps(asdict(settings))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"},
        )

    def update(self) -> dict[str, Any]:
        """Seconds, processor seconds and the peak so far in GB."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("update\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("RESULT "):
                return json.loads(line.removeprefix("RESULT "))
        sys.exit(f"a side ended with status {self._process.wait()}")

    def end(self) -> None:
        """Stop the process."""
        self._process.kill()
        self._process.wait()


def compare(sides: dict[str, Side], settings: Settings, updates: int) -> dict[str, Any]:
    """Time updates of both sides in turn; the first update of each is not timed."""
    rounds = [{name: side.update() for name, side in sides.items()} for _ in range(updates + 1)]
    for side in sides.values():
        side.end()
    figures: dict[str, Any] = {"case": settings.case, "epochs": settings.epochs}
    figures["backbone"] = settings.backbone
    for what in ("seconds", "processor_seconds"):
        for name in sides:
            figures[f"{name}_{what}"] = [round[name][what] for round in rounds[1:]]
        pairs = zip(figures[f"trl_{what}"], figures[f"marlhf_{what}"], strict=True)
        figures[f"{what}_ratios"] = [theirs / ours for theirs, ours in pairs]
    peaks = {name: rounds[-1][name]["peak_gb"] for name in sides}
    figures |= {"peak_gb": peaks, "memory_ratio": peaks["marlhf"] / peaks["trl"]}
    return figures | {"marlhf_phases": rounds[-1]["marlhf"]["phases"]}


def print_tables(results: list[dict[str, Any]]) -> None:
    """Print seconds per update by two clocks, and memory."""
    for what, clock in (("seconds", "wall clock"), ("processor_seconds", "processor time")):
        print(f"\n{clock:<16}{'TRL s':>9}{'marlhf s':>10}{'times as fast':>15}   spread")
        for r in results:
            theirs, ours = (statistics.median(r[f"{n}_{what}"]) for n in ("trl", "marlhf"))
            ratios = r[f"{what}_ratios"]
            print(
                f"{r['case'] + ', epochs ' + str(r['epochs']):<16}{theirs:>9.1f}{ours:>10.1f}"
                f"{statistics.median(ratios):>15.2f}   {min(ratios):.2f} to {max(ratios):.2f}"
            )
    print(f"\n{'peak memory':<16}{'TRL GB':>9}{'marlhf GB':>10}{'share':>15}")
    for r in results:
        theirs, ours = (r["peak_gb"][name] for name in ("trl", "marlhf"))
        label = f"{r['case']}, epochs {r['epochs']}"
        print(f"{label:<16}{theirs:>9.2f}{ours:>10.2f}{r['memory_ratio']:>15.2f}")


# -- what runs in the processes of the sides -----------------------------------------------------


def make_reward_model(settings: Settings) -> None:
    """A classifier: the policy's backbone, a random head; for `lora`, an adapter and a head."""
    code = f"""
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
torch.manual_seed(0)
model = AutoModelForSequenceClassification.from_pretrained(
    {settings.model!r}, num_labels=1, dtype=torch.float32)
model.config.pad_token_id = 0
tokenizer = AutoTokenizer.from_pretrained({settings.model!r})
if {settings.case == "lora"}:
    from peft import LoraConfig, get_peft_model
    model.config.save_pretrained({settings.reward!r})
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", **{LORA!r}))
model.save_pretrained({settings.reward!r})
tokenizer.save_pretrained({settings.reward!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL)


def serve(update: Callable[[int], Any]) -> None:
    """Make an update for every line on standard input, and print what it took."""
    for number, _ in enumerate(sys.stdin):
        began, worked = time.perf_counter(), time.process_time()
        phases = update(number)
        seconds, processor = time.perf_counter() - began, time.process_time() - worked
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        row = {"seconds": seconds, "processor_seconds": processor, "peak_gb": peak}
        print("RESULT " + json.dumps(row | {"phases": phases or {}}), flush=True)


def marlhf_side(settings: Settings) -> None:
    """This library."""
    from marlhf.config import PPOConfig
    from marlhf.config.loading import config_from_dict
    from marlhf.rollout.transformers_engine import Sampler
    from marlhf.training.ppo import PPOTrainer

    lora = {"r": LORA["r"], "alpha": float(LORA["lora_alpha"])} if settings.case == "lora" else None
    longest = 96 if settings.case == "mixed" else settings.response_tokens
    config = config_from_dict(
        PPOConfig,
        {
            "model": {"path": settings.model, "lora": lora},
            "output_dir": tempfile.mkdtemp(),
            "reward": {"models": settings.reward},
            "rollout": {
                "batch_size": settings.batch,
                "max_prompt_length": PROMPT_TOKENS,
                "max_new_tokens": longest,
                "min_new_tokens": 0 if settings.case == "mixed" else longest,
            },
            "critic": {"backbone": settings.backbone},
            "ppo": {"epochs": settings.epochs},
            "optimizer": {"micro_batch_size": settings.micro},
            "log": {"progress": False, "tensorboard": False, "samples": 0},
        },
    )
    prompts = settings.prompts()
    trainer = PPOTrainer(config, train_dataset=prompts)
    lengths: list[int] = []
    sampler: Any = Sampler
    sample = sampler.__call__

    def sample_until_lengths(self: Any, logits: Any, rows: Any, t: int) -> Any:
        eos = trainer.tokenizer.eos_token_id
        logits[:, eos] = float("-inf")
        tokens, logprobs = sample(self, logits, rows, t)
        for i, row in enumerate(rows):
            if lengths[row] == t + 1:
                tokens[i] = eos
        return tokens, logprobs

    if settings.case == "mixed":
        sampler.__call__ = sample_until_lengths

    def update(number: int) -> dict[str, float]:
        lengths[:] = settings.lengths(number)
        row = trainer.step(prompts)
        return {name: row[name] for name in row if name.endswith("_seconds")}

    serve(update)


def trl_side(settings: Settings) -> None:
    """TRL."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        LogitsProcessorList,
        TrainerCallback,
    )
    from trl.experimental.ppo import (  # pyright: ignore[reportMissingImports]
        PPOConfig,
        PPOTrainer,
    )

    mixed, lora = settings.case == "mixed", settings.case == "lora"
    tokenizer = AutoTokenizer.from_pretrained(settings.model, padding_side="left")
    tokenizer.pad_token_id = 0

    def classifier() -> Any:
        if not lora:
            return AutoModelForSequenceClassification.from_pretrained(
                settings.reward, num_labels=1, dtype=torch.float32
            )
        base = AutoModelForSequenceClassification.from_pretrained(
            settings.model, num_labels=1, dtype=torch.float32
        )
        return PeftModel.from_pretrained(base, settings.reward).merge_and_unload()

    policy: Any = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)
    reference = (
        None if lora else AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)
    )
    reward, value = classifier(), classifier()
    if lora:
        value = get_peft_model(value, LoraConfig(task_type="SEQ_CLS", **LORA))
    ids = [row[-PROMPT_TOKENS:] for row in tokenizer(settings.prompts())["input_ids"]]
    rows = 1000 * settings.batch
    arguments = PPOConfig(
        output_dir=tempfile.mkdtemp(),
        bf16=False,
        use_cpu=True,
        per_device_train_batch_size=settings.micro,
        gradient_accumulation_steps=settings.batch // settings.micro,
        num_ppo_epochs=settings.epochs,
        total_episodes=rows,
        response_length=96 if mixed else settings.response_tokens,
        stop_token="eos" if mixed else None,
        temperature=1.0,
        learning_rate=1e-6,
        num_sample_generations=0,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = PPOTrainer(
        args=arguments,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": ids * 1000}),
        eval_dataset=Dataset.from_dict({"input_ids": ids}),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA) if lora else None,
    )
    lengths: list[int] = []
    if mixed:
        generate = policy.generate

        def end_at_lengths(input_ids: Any, scores: Any) -> Any:
            token = input_ids.shape[1] - PROMPT_TOKENS + 1
            scores[:, tokenizer.eos_token_id] = float("-inf")
            ends = torch.tensor([length == token for length in lengths])
            scores[ends] = float("-inf")
            scores[ends, tokenizer.eos_token_id] = 0.0
            return scores

        def generate_mixed(*args: Any, **kwargs: Any) -> Any:
            processor = LogitsProcessorList([end_at_lengths])
            return generate(
                *args,
                logits_processor=processor,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                **kwargs,
            )

        policy.generate = generate_mixed

    # the trainer's own loop makes the updates: it waits for its turn at the end of each
    turns = iter_turns(lengths, settings)

    class Turns(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            next(turns)

    trainer.add_callback(Turns())
    next(turns)
    trainer.train()


def iter_turns(lengths: list[int], settings: Settings) -> Any:
    """As `serve`, for a loop that is not ours: an update is what happens between two `next`s."""
    for number, _ in enumerate(sys.stdin):
        lengths[:] = settings.lengths(number)
        began, worked = time.perf_counter(), time.process_time()
        yield
        seconds, processor = time.perf_counter() - began, time.process_time() - worked
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        row = {"seconds": seconds, "processor_seconds": processor, "peak_gb": peak, "phases": {}}
        print("RESULT " + json.dumps(row), flush=True)


if __name__ == "__main__":
    if sys.argv[1] in ("marlhf", "trl"):
        side = {"marlhf": marlhf_side, "trl": trl_side}[sys.argv[1]]
        side(Settings(**json.loads(sys.argv[2])))
    else:
        main()
