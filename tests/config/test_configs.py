"""Every configuration that ships is read without complaint, and its names mean something."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tiny_models import CHATML, byte_tokenizer

from marlhf.commands import sweep
from marlhf.config import EvaluateConfig, PPOConfig, RewardConfig, SFTConfig, SweepConfig
from marlhf.config.loading import load_config
from marlhf.data.demonstrations import as_examples
from marlhf.data.prompts import as_prompts
from marlhf.rewards import build_rewards
from marlhf.segmenters import build_segmenter

FOLDER = Path(__file__).parents[2] / "configs"
JOBS = {
    "evaluate": EvaluateConfig,
    "ppo": PPOConfig,
    "reward": RewardConfig,
    "sft": SFTConfig,
    "sweep": SweepConfig,
}  # a file is named after its job: ppo_summaries.yaml


def job_files() -> list[Path]:
    files = sorted(FOLDER.glob("*.yaml"))
    return [f for f in files if f.stem.partition("_")[0] in JOBS]


@pytest.mark.parametrize("path", job_files(), ids=lambda p: p.name)
def test_a_shipped_configuration_is_read_and_its_parts_are_built(path, monkeypatch):
    monkeypatch.chdir(FOLDER.parent)
    config = load_config(JOBS[path.name.partition("_")[0]], path)
    if isinstance(config, PPOConfig):
        build_segmenter(config.segmenter)
        build_rewards(config.reward.models)
    elif isinstance(config, EvaluateConfig):
        build_rewards(config.rewards)
    elif isinstance(config, SweepConfig):
        assert sweep.plan(config)


def test_the_summaries_configuration_fits_its_data():
    config = load_config(PPOConfig, FOLDER / "ppo_summaries.yaml")
    (prompt,) = as_prompts([{"document": "A long text.", "summary": "text"}], config.data)
    assert prompt.messages is not None
    assert prompt.text.endswith("\n\nA long text.")
    build_rewards(config.reward.models).check_columns(prompt.columns)


def test_the_summaries_configuration_of_sft_fits_its_data():
    config = load_config(SFTConfig, FOLDER / "sft_summaries.yaml")
    tokenizer = byte_tokenizer(chat_template=CHATML)
    rows = [{"document": "A long text.", "summary": "text"}]
    (example,) = as_examples(rows, config, tokenizer).rows
    trained = [i for i, t in zip(example.ids, example.trained, strict=True) if t]
    assert tokenizer.decode(trained) == "text</s>"
    assert "\n\nA long text.</s>" in tokenizer.decode(example.ids)
