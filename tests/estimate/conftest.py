"""Models of the estimate's tests: some with weights, one by its config.json alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import LoraConfig, TaskType, get_peft_model
from support.tiny_models import (
    byte_tokenizer,
    tiny_causal_lm,
    tiny_config,
    tiny_sequence_classifier,
)

SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 160}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's config.json, and nothing else of it."""
    folder = tmp_path_factory.mktemp("shape")
    tiny_config("llama", 300, **SHAPE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy, a reward model and a reward adapter of the policy's base, with weights."""
    folder = tmp_path_factory.mktemp("saved")
    lm, reward = tiny_causal_lm("llama", 300), tiny_sequence_classifier("llama", 300)
    for name, model in (("policy", lm), ("reward", reward)):
        model.save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    adapter = LoraConfig(r=3, target_modules=["q_proj"], task_type=TaskType.SEQ_CLS)
    reward.name_or_path = str(folder / "policy")
    adapted = get_peft_model(reward, adapter)
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "policy")
    adapted.save_pretrained(str(folder / "adapter"))
    reward.config.save_pretrained(folder / "adapter")
    byte_tokenizer().save_pretrained(folder / "adapter")
    return folder
