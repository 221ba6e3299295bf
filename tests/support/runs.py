"""Tiny PPO runs: a random model, a byte tokenizer, a reward that counts letters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from marlhf.config import (
    CheckpointSettings,
    CriticSettings,
    DataSettings,
    KLSettings,
    LogSettings,
    MacroSettings,
    ModelSettings,
    OptimizerSettings,
    PPOConfig,
    PPOSettings,
    PTXSettings,
    RewardSettings,
    RolloutSettings,
)
from marlhf.training.ppo import PPOTrainer
from support.tiny_models import BYTES_VOCAB, byte_tokenizer, tiny_causal_lm

PROMPTS = ["ab", "hello there", "a longer prompt than the others", "x", "12", "one two", "q q", "?"]


def vowels(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """Vowels a response, less a little for its length, so that rows differ."""
    return [sum(c in "aeiou" for c in text) - 0.01 * len(text) for text in completions]


def tiny_config(folder: Path, **sections: Any) -> PPOConfig:
    """A run of two updates of 8 responses of up to 11 tokens. Sections are given as dicts."""
    defaults: dict[str, Any] = {
        "checkpoint": CheckpointSettings(every=0),
        "critic": CriticSettings(),
        "data": DataSettings(eval_rows=0),
        "rollout": RolloutSettings(batch_size=8, max_new_tokens=11, max_prompt_length=16),
        "reward": RewardSettings(),
        "kl": KLSettings(),
        "macro": MacroSettings(),
        "ppo": PPOSettings(gamma=0.97, minibatches=2, epochs=2),
        "optimizer": OptimizerSettings(learning_rate=1e-3, micro_batch_size=2),
        "ptx": PTXSettings(path="not given"),
        "log": LogSettings(progress=False, tensorboard=False, eval_every=0, samples=2),
        "model": ModelSettings(path="given in Python"),
    }
    if sections.get("ppo", {}).get("estimator", "gae") != "gae":
        defaults["ppo"] = replace(defaults["ppo"], gamma=1.0)  # there is no critic to use it
    if "ptx" not in sections:
        del defaults["ptx"]
    top = {"steps": 2, "segmenter": {"name": "ngram", "n": 3}, "overwrite": True}
    for name, value in sections.items():
        if name in defaults:
            defaults[name] = replace(defaults[name], **value)
        else:
            top[name] = value
    return PPOConfig(output_dir=str(folder), **defaults, **top)


def tiny_trainer(
    folder: Path,
    family: str = "llama",
    lm: Any = None,
    score: Any = vowels,
    token_reward: Any = None,
    **sections: Any,
) -> PPOTrainer:
    """A trainer on a tiny random model of a family, or on the one in `model.path`."""
    config = tiny_config(folder, **sections)
    if lm is None and not Path(config.model.path).is_dir():
        lm = tiny_causal_lm(family, BYTES_VOCAB)
    return PPOTrainer(
        config,
        reward=score,
        token_reward=token_reward,
        train_dataset=PROMPTS,
        model=lm,
        tokenizer=byte_tokenizer(add_bos=True),
    )


class WorkerInstead:
    """A trainer's rollout worker with another call; all else is the worker's."""

    def __init__(self, worker: Any, call: Callable[..., Any]) -> None:
        self._worker, self._call = worker, call

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._call(*arguments, **keywords)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._worker, name)
