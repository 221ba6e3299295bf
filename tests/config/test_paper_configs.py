"""configs/paper: the numbers of the table, and two steps with a tiny model of the same family."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from support.presets import MAKERS, save_jsonl
from support.tiny_models import (
    BYTES_VOCAB,
    byte_tokenizer,
    tiny_causal_lm,
    tiny_sequence_classifier,
)

from marlhf.cli import JOBS, _imported
from marlhf.config.loading import load_config

REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / "configs" / "paper"
FILES = sorted(FOLDER.glob("*.yaml"))

ON_TLDR_HH_WEBGPT = [
    (task, size) for task in ("tldr", "hh", "webgpt") for size in ("2b", "7b", "27b")
]
APPS = [("apps", "2b"), ("apps", "7b")]


def script() -> Any:
    spec = importlib.util.spec_from_file_location(
        "paper_configs", REPOSITORY / "scripts" / "paper_configs.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def loaded(path: Path, *overrides: str) -> Any:
    return load_config(_imported(JOBS[path.name.partition("_")[0]][0]), path, overrides)


def config_of(job: str, task: str, size: str) -> Any:
    return loaded(FOLDER / f"{job}_{task}_{size}.yaml")


def test_the_files_are_what_the_script_writes():
    written = dict(script().files())
    assert written == {path.name: path.read_text(encoding="utf-8") for path in FILES}


def test_there_is_a_file_for_every_task_size_and_job():
    expected = {
        f"{job}_{task}_{size}.yaml"
        for task, size in [*ON_TLDR_HH_WEBGPT, *APPS]
        for job in ("sft", "reward", "ppo")
        if (task, job) != ("apps", "reward")
    }
    assert {path.name for path in FILES} == expected


# batch size, epochs, learning rate, read off the released README's table once more, by column
SFT = {
    "2b": {"tldr": (512, 3, 5e-5), "hh": (512, 3, 5e-5), "webgpt": (64, 3, 1e-4)},
    "7b": {"tldr": (128, 1, 2e-5), "hh": (128, 1, 2e-5), "webgpt": (128, 5, 2e-5)},
    "27b": dict.fromkeys(("tldr", "hh", "webgpt"), (128, 3, 5e-6)),
}
SFT["2b"]["apps"], SFT["7b"]["apps"] = (16, 1, 5e-6), (32, 1, 2e-6)
REWARD = {
    "2b": {"tldr": (64, 1, 1e-5), "hh": (64, 1, 1e-5), "webgpt": (32, 1, 2e-5)},
    "7b": {"tldr": (128, 1, 1e-6), "hh": (64, 1, 1e-6), "webgpt": (32, 1, 1e-6)},
    "27b": dict.fromkeys(("tldr", "hh", "webgpt"), (128, 1, 8e-6)),
}


@pytest.mark.parametrize(("job", "table"), [("sft", SFT), ("reward", REWARD)])
def test_numbers_of_supervised_jobs(job, table):
    for size, column in table.items():
        for task, (batch, epochs, rate) in column.items():
            config = config_of(job, task, size)
            assert (config.batch_size, config.epochs) == (batch, epochs)
            optimizer = config.optimizer
            assert (optimizer.learning_rate, optimizer.schedule) == (rate, "cosine")
            rows = {"tldr": 92858, "hh": 112052, "webgpt": 18599, "apps": 0}[task]
            steps = epochs * rows * (0.2 if job == "sft" else 0.4) / batch
            assert abs(optimizer.warmup_steps - 0.1 * steps) <= 0.6


# learning rates of policy and critic, KL coefficient, warm-up
PPO = {"2b": (1.5e-5, 1.5e-5, 0.05), "7b": (1e-6, 1e-6, 0.05), "27b": (7e-7, 1e-6, 0.1)}


def test_numbers_of_ppo():
    for task, size in [*ON_TLDR_HH_WEBGPT, *APPS]:
        config, code = config_of("ppo", task, size), task == "apps"
        rollout, optimizer = config.rollout, config.optimizer
        policy, critic, kl = (5e-7, 5e-5, 0.05) if code else PPO[size]
        if (task, size) == ("webgpt", "7b"):
            kl = 0.1
        found = (optimizer.learning_rate, optimizer.critic_learning_rate, config.kl.coef)
        assert found == (policy, critic, kl)
        assert rollout.batch_size == (16 if code else 256)
        lengths = (rollout.max_prompt_length, rollout.max_new_tokens)
        assert lengths == ((600, 512) if code else (512, 512))
        sampling = (rollout.temperature, rollout.top_p, rollout.top_k)
        assert sampling == ((1.0, 1.0, 5) if code else (0.8, 1.0, 50))
        assert (config.ppo.gamma, config.ppo.lam, config.ppo.clip_range) == (1.0, 0.95, 0.2)
        assert (config.ppo.epochs, config.ppo.minibatches, config.preset) == (1, 1, "paper_code")
        assert config.segmenter == {"name": "ngram", "n": 10 if code else 5}
        assert config.steps == {"tldr": 145, "hh": 175, "webgpt": 29, "apps": 250}[task]


def test_the_jobs_of_a_task_fit_together():
    """Each starts from what the one before wrote, on other documents of the same data."""
    for task, size in [*ON_TLDR_HH_WEBGPT, *APPS]:
        sft, ppo = config_of("sft", task, size), config_of("ppo", task, size)
        assert ppo.model.path == f"{sft.output_dir}/final"
        assert ppo.data.preset == sft.data.preset
        assert ppo.data.part_seed == sft.data.part_seed == 1234
        if task != "apps":
            reward = config_of("reward", task, size)
            assert reward.model.path == ppo.model.path
            assert ppo.reward.models == f"{reward.output_dir}/final"
            assert reward.data.part_seed == 1234


# two steps of each


@pytest.fixture(scope="module")
def substitutes(tmp_path_factory) -> Path:
    """Tiny models of both families with a byte tokenizer, and copies of the data."""
    folder = tmp_path_factory.mktemp("substitutes")
    tokenizer = byte_tokenizer(add_bos=True)
    for family in ("gemma", "gemma2"):
        size = {"max_position_embeddings": 64, "pad_token_id": 2}
        models = {
            "lm": tiny_causal_lm(family, BYTES_VOCAB, **size),
            "reward": tiny_sequence_classifier(family, BYTES_VOCAB, seed=1, **size),
        }
        for name, model in models.items():
            model.save_pretrained(folder / family / name)
            tokenizer.save_pretrained(folder / family / name)
    for name, maker in MAKERS.items():
        save_jsonl(folder / name, name, [maker(i) for i in range(60)])
    return folder


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_two_steps_with_a_tiny_model_of_the_same_family(path, substitutes, tmp_path):
    job, task, size = path.stem.split("_")
    family = "gemma2" if size == "27b" else "gemma"
    preset = loaded(path).data.preset
    overrides = [
        f"model.path={substitutes / family / 'lm'}",
        f"data.path={substitutes / preset}",
        "data.eval_rows=0",
        f"output_dir={tmp_path / 'run'}",
        "steps=2",
        "log.tensorboard=false",
        "log.progress=false",
    ]
    if job == "ppo":
        overrides += ["rollout.batch_size=4", "rollout.micro_batch_size=4"]
        overrides += ["rollout.max_prompt_length=24", "rollout.max_new_tokens=8"]
        overrides += ["optimizer.micro_batch_size=4"]
        if task != "apps":
            overrides += [f"reward.models={substitutes / family / 'reward'}"]
    else:
        overrides += ["batch_size=4", "max_length=48"]
    config = loaded(path, *overrides)
    _imported(JOBS[job][1])(config)
    run = tmp_path / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row.get("step")][-1] == 2
    assert (run / "final" / "model.safetensors").is_file()
    saved = json.loads((run / "final" / "config.json").read_text())
    assert saved["model_type"] == family
