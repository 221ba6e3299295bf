"""Write configs/paper/: the MA-RLHF paper's hyperparameters, a file for every job, task and size.

    python scripts/paper_configs.py

The numbers are in the tables below, once; a test compares the files with what this script writes.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "configs" / "paper"


@dataclass(frozen=True)
class Task:
    """A dataset, its number of training rows, and the share of each job."""

    title: str
    preset: str
    rows: int
    shares: dict[str, float]
    models: dict[str, str]
    ngram: int = 5


_GEMMA = {"2b": "google/gemma-2b", "7b": "google/gemma-7b", "27b": "google/gemma-2-27b"}
_CODEGEMMA = {"2b": "google/codegemma-2b", "7b": "google/codegemma-7b-it"}
_THREE = {"sft": 0.2, "reward": 0.4, "ppo": 0.4}

TASKS = {
    "tldr": Task("TL;DR", "openai/summarize_from_feedback", 92858, _THREE, _GEMMA),
    "hh": Task("HH-RLHF", "Dahoas/full-hh-rlhf", 112052, _THREE, _GEMMA),
    # 5% of 19578 are held out
    "webgpt": Task("WebGPT", "openai/webgpt_comparisons", 18599, _THREE, _GEMMA),
    "apps": Task("APPS", "codeparrot/apps", 5000, {"sft": 0.2, "ppo": 0.8}, _CODEGEMMA, 10),
}


@dataclass(frozen=True)
class Numbers:
    """What the table of hyperparameters says of one job, task and size. `warmup` is a share of the
    run in sft and reward, and a number of updates in ppo."""

    batch: int
    learning_rate: str
    epochs: int = 1
    warmup: float = 0.1
    critic_learning_rate: str = ""
    kl: float = 0.05


def numbers(job: str, task: str, size: str) -> Numbers:
    """The table, as in the README of the released code."""
    webgpt = task == "webgpt"
    if task == "apps":
        sft = {"2b": Numbers(16, "5.0e-6", 1, 0), "7b": Numbers(32, "2.0e-6", 1, 0)}
        return sft[size] if job == "sft" else Numbers(16, "5.0e-7", 1, 20, "5.0e-5")
    table = {
        ("sft", "2b"): Numbers(64, "1.0e-4", 3) if webgpt else Numbers(512, "5.0e-5", 3),
        ("sft", "7b"): Numbers(128, "2.0e-5", 5 if webgpt else 1),
        ("sft", "27b"): Numbers(128, "5.0e-6", 3),
        ("reward", "2b"): Numbers(32, "2.0e-5") if webgpt else Numbers(64, "1.0e-5"),
        ("reward", "7b"): Numbers({"tldr": 128, "hh": 64, "webgpt": 32}[task], "1.0e-6"),
        ("reward", "27b"): Numbers(128, "8.0e-6"),
        ("ppo", "2b"): Numbers(256, "1.5e-5", 1, 200 / 32, "1.5e-5"),
        ("ppo", "7b"): Numbers(256, "1.0e-6", 1, 200 / 32, "1.0e-6", 0.1 if webgpt else 0.05),
        ("ppo", "27b"): Numbers(256, "7.0e-7", 1, 0, "1.0e-6", 0.1),
    }
    return table[job, size]


_TITLES = {
    "sft": "supervised fine-tuning, the first of three jobs",
    "reward": "the reward model, the second of three jobs",
    "ppo": "macro-action PPO, the last job",
}
_TABLE = (
    "the table of hyperparameters in the README of the released code "
    "(github.com/ernie-research/MA-RLHF). The paper (arXiv 2410.02743) was not at hand to compare "
    "it with. From the released run_gemma.sh, which is for TL;DR and 2B:"
)
_SOURCE = "eps is the default of the optimiser that it uses."
_ORIGINS = {
    "sft": f"Batch size, epochs, learning rate, schedule and warm-up: {_TABLE} max_length, weight "
    "decay, micro-batch and seed; it says 1 epoch where the table says 3, and the table was taken. "
    f"From the source: betas, gradient clipping, the loss on all tokens; {_SOURCE}",
    "reward": f"Batch size, epochs, learning rate, schedule and warm-up: {_TABLE} max_length, "
    "weight decay, micro-batch and seed; on 8 GPUs it has a batch of 128 and a warm-up of 0.05 "
    "where the table says 64 and 0.1, and the table was taken. From the source: betas and gradient "
    f"clipping; {_SOURCE}",
    "ppo": f"Batch size, learning rates, KL, lengths and sampling: {_TABLE} the linear schedule, "
    "weight decay, micro-batch, seed and the 5-grams. From the source: the formulas (preset: "
    f"paper_code), betas and gradient clipping; {_SOURCE}",
}
_WARMUP = (
    "Warm-up: the table says 200 steps, run_gemma.sh 0.05 of the run. A run has fewer than 200 "
    "updates, so they were read as micro-batches, 32 to an update; on TL;DR that is 0.04."
)
_APPS = (
    "For APPS nothing but those numbers and the weights was released (10-grams and base models as "
    "on their pages): what comes from run_gemma.sh and the source was taken over from TL;DR. How "
    "many solutions of a problem sft is to learn from (here: all) nobody says."
)
_LARGEST = (
    "The table does not say which tasks its column of 27B is for; weights were released for TL;DR "
    "alone."
)


def _header(job: str, task: str, size: str) -> str:
    """The comment at the top: what the file is, and where its numbers come from."""
    paragraphs = [
        f"{TASKS[task].title}, {TASKS[task].models[size]}: {_TITLES[job]}.",
        _ORIGINS[job],
        *([_WARMUP] if job == "ppo" and task != "apps" and size != "27b" else []),
        *([_APPS] if task == "apps" else []),
        *([_LARGEST] if size == "27b" and task != "tldr" else []),
        f"  marlhf {job} configs/paper/{job}_{task}_{size}.yaml",
    ]
    filled = (
        textwrap.fill(text, 98, initial_indent="# ", subsequent_indent="# ") for text in paragraphs
    )
    return "\n#\n".join(filled)


def text_of(job: str, task: str, size: str) -> str:
    """One file."""
    about, run = TASKS[task], f"runs/paper/{task}_{size}"
    model = about.models[size] if job == "sft" else f"{run}/sft/final # what the job sft wrote"
    body = _ppo(task, size) if job == "ppo" else _supervised(job, task, size)
    return f"""{_header(job, task, size)}

model:
  path: {model}
  precision: bf16 # the released code: fp16 for 2B and 7B, bf16 for 27B
  gradient_checkpointing: true

data:
  preset: {about.preset} # {about.shares[job]:.0%} of its documents

{body}
output_dir: {run}/{job}
seed: 1234
"""


def _updates(job: str, task: str, size: str) -> int:
    """Optimiser steps of a run."""
    about, settings = TASKS[task], numbers(job, task, size)
    return round(settings.epochs * about.rows * about.shares[job] / settings.batch)


def _supervised(job: str, task: str, size: str) -> str:
    settings, updates = numbers(job, task, size), _updates(job, task, size)
    length = "1112 # a prompt of 600 tokens and an answer of 512" if task == "apps" else "1024"
    warmup = f"{round(settings.warmup * updates)} # {settings.warmup:g} of about {updates} steps"
    loss = "loss_on: all\n\n" if job == "sft" else "\n"
    return f"""\
epochs: {settings.epochs}
batch_size: {settings.batch}
max_length: {length}
{loss}optimizer:
  learning_rate: {settings.learning_rate}
  schedule: cosine
  warmup_steps: {warmup if settings.warmup else "0"}
  weight_decay: {"0.01" if job == "sft" else "0.1"}
  betas: [0.9, 0.95]
  eps: 1.0e-8
  max_grad_norm: 1.0
  micro_batch_size: 4
"""


def _ppo(task: str, size: str) -> str:
    about, settings = TASKS[task], numbers("ppo", task, size)
    prompts = round(about.rows * about.shares["ppo"])
    code = task == "apps"
    score = "code # runs the programs, in a sandbox"
    if not code:
        score = f"runs/paper/{task}_{size}/reward/final # what the job reward wrote"
    return f"""\
preset: paper_code # the formulas of the released code

segmenter:
  name: ngram
  n: {about.ngram}

reward:
  models: {score}

critic:
  init: {"policy # there is no reward model" if code else "reward"}

rollout:
  batch_size: {settings.batch}
  max_prompt_length: {600 if code else 512} # the released code leaves longer prompts out
  max_new_tokens: 512
  temperature: {"1.0" if code else "0.8"}
  top_p: 1.0
  top_k: {5 if code else 50}

kl:
  coef: {settings.kl}

ppo:
  gamma: 1.0
  lam: 0.95
  clip_range: 0.2
  epochs: 1
  minibatches: 1

optimizer:
  learning_rate: {settings.learning_rate}
  critic_learning_rate: {settings.critic_learning_rate}
  schedule: linear
  warmup_steps: {round(settings.warmup)}
  weight_decay: 0.1
  betas: [0.9, 0.95]
  eps: 1.0e-8
  max_grad_norm: 1.0
  micro_batch_size: 1

steps: {_updates("ppo", task, size)} # {settings.epochs} epoch of {prompts} prompts
"""


def files() -> Iterator[tuple[str, str]]:
    """Name and text of every file."""
    for task, about in TASKS.items():
        for size in about.models:
            for job in about.shares:
                yield f"{job}_{task}_{size}.yaml", text_of(job, task, size)


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in files():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
