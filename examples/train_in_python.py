"""Macro-action PPO from Python: a reward and a dataset of one's own.

    python examples/train_in_python.py --model HuggingFaceTB/SmolLM2-135M-Instruct

The policy learns to answer in few words, under a KL penalty to what it was.
"""

from __future__ import annotations

import argparse

from marlhf import (
    DataSettings,
    KLSettings,
    LogSettings,
    ModelSettings,
    NGram,
    OptimizerSettings,
    PPOConfig,
    PPOTrainer,
    RolloutSettings,
)

TOPICS = ["the sea", "a train station", "winter", "an old clock", "bread", "a lighthouse"]


def few_words(prompts: list[str], completions: list[str]) -> list[float]:
    """1 for an empty answer, falling to 0 at 40 words."""
    return [max(0.0, 1 - len(completion.split()) / 40) for completion in completions]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="directory or hub name")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--output", default="runs/few_words")
    options = parser.parse_args()

    config = PPOConfig(
        model=ModelSettings(path=options.model),
        data=DataSettings(eval_rows=0),
        output_dir=options.output,
        overwrite=True,
        steps=options.steps,
        rollout=RolloutSettings(batch_size=6, max_new_tokens=32),
        kl=KLSettings(coef=0.02),
        optimizer=OptimizerSettings(learning_rate=1e-5),
        log=LogSettings(eval_every=0),
    )
    trainer = PPOTrainer(
        config,
        reward=few_words,
        segmenter=NGram(5),
        train_dataset=[f"Write a sentence about {topic}." for topic in TOPICS],
    )
    trainer.train()


if __name__ == "__main__":
    main()
