"""`marlhf estimate` for jobs other than ppo, and for engines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support.tiny_models import byte_tokenizer, tiny_config

from marlhf.cli import main
from marlhf.common.errors import UserError
from marlhf.config.loading import config_from_dict
from marlhf.estimate.allocations import PassCounter, _tokens, backward_intervals
from marlhf.estimate.command import header
from marlhf.estimate.fake_models import fake_models
from marlhf.estimate.memory_model import Interval, estimate
from marlhf.estimate.shapes import JOBS
from marlhf.models.loading import build_policy, load_model_config
from marlhf.models.reward_classifier import build_classifier
from marlhf.training.reward_model import Scorer

BYTES = 4
LORA = {"lora": {"r": 2, "target_modules": ["q_proj", "down_proj"]}}


def peak_of(intervals: Sequence[Interval]) -> int:
    return max(interval.peak for interval in intervals)


def of_job(job: str, values: dict[str, Any]) -> PassCounter:
    config: Any = config_from_dict(JOBS[job], values)
    return PassCounter(config, fake_models(config), device_memory=10**9)


@pytest.mark.parametrize("model", [{}, LORA])
@pytest.mark.parametrize("job", ["sft", "reward"])
def test_a_trained_model_is_the_one_that_the_job_builds(saved, job, model, monkeypatch):
    monkeypatch.chdir(saved)
    values = {"model": {"path": "policy", "gradient_checkpointing": True, **model}}
    counter = of_job(job, values | {"max_length": 24, "batch_size": 16})
    settings = config_from_dict(JOBS[job], values).model
    lm_config, tokenizer = load_model_config(settings), byte_tokenizer()
    if job == "sft":
        built: Any = build_policy(settings, tokenizer, lm_config, samples=False)
    else:
        built = build_classifier(settings, lm_config, tokenizer)
    built.train()  # checkpoints its layers
    trained = [p for p in built.parameters() if p.requires_grad]
    weights = counter.run(1).models["model"]
    assert weights.trained == sum(p.numel() for p in trained)
    assert weights.trained + weights.frozen == sum(p.numel() for p in built.parameters())
    ids, mask = _tokens(8 if job == "sft" else 16, 24)
    mask[0, :3] = False  # without any padding transformers makes no mask

    def loss() -> torch.Tensor:
        if job == "sft":
            return built(ids, mask, mask[:, 1:]).logprobs.sum()
        return Scorer(built)(ids, mask).sum()

    known = [*built.parameters(), *built.buffers(), ids, mask]
    original = peak_of(backward_intervals(trained, known, loss))
    counted = counter.run(1).training["model"]
    assert peak_of(counted.intervals) == pytest.approx(original, rel=0.05)
    assert counted.accumulates
    assert not counter.run(2).training["model"].accumulates


def test_an_evaluation_holds_one_model_at_a_time_whatever_the_profile(saved, monkeypatch):
    monkeypatch.chdir(saved)
    values = {"policies": {"a": "policy"}, "rewards": "reward", "rollout": {"batch_size": 8}}
    run = of_job("evaluate", values).run(2)
    lm, reward = run.models["policy"], run.models["reward model"]
    assert run.sampling is not None
    memory = estimate(run, "zero3", 2)
    assert memory == estimate(run, "single", 2)
    assert memory.permanent == memory.saving == 0
    assert memory.phases["generate"].gathered == BYTES * lm.frozen
    assert memory.phases["score"].gathered in (BYTES * lm.frozen, BYTES * reward.frozen)
    assert memory.loading == BYTES * (lm.frozen + lm.largest)
    assert run.sampling.cache > 0


def test_the_larger_of_two_policies_and_a_reference_counts(saved, folder, monkeypatch):
    monkeypatch.chdir(saved)
    rollout = {"batch_size": 4, "max_prompt_length": 8, "max_new_tokens": 8}
    small = of_job("evaluate", {"policies": "policy", "rollout": rollout}).run(1)
    values = {"policies": "policy", "reference": str(folder), "rollout": rollout}
    both = of_job("evaluate", values).run(1)
    alone = of_job("evaluate", {"policies": str(folder), "rollout": rollout}).run(1)
    assert both.models == alone.models != small.models


@pytest.mark.parametrize(
    ("engine", "reserved", "on_host"),
    [
        ("vllm", 0.4, True),
        ({"name": "vllm", "memory_fraction": 0.25, "options": {"seed": 1}}, 0.25, True),
        ({"name": "vllm", "address": ["http://localhost:8000"]}, 0, False),
        ("my_package.MyEngine", 0, False),
    ],
)
def test_an_engine_has_its_reservation_and_no_cache_of_ours(folder, engine, reserved, on_host):
    values = {"model": {"path": str(folder)}, "rollout": {"engine": engine}}
    run = of_job("ppo", values).run(2)
    assert run.sampling is not None
    assert run.sampling.cache == 0
    assert run.sampling.other == reserved * 10**9
    memory = estimate(run, "single", 1)
    assert memory.phases["generate"].total == reserved * 10**9
    assert memory.host == on_host * BYTES * run.models["policy"].used
    gathered = estimate(run, "zero3", 2).phases["generate"].gathered
    assert gathered == BYTES * run.models["policy"].largest  # weights go over one at a time


@pytest.mark.parametrize("job", ["sft", "reward", "evaluate"])
def test_the_command_takes_every_job(folder, job, tmp_path, capsys):
    text = {"policies": str(folder)} if job == "evaluate" else {"model": {"path": str(folder)}}
    (tmp_path / "c.yaml").write_text(json.dumps(text))
    words = ["estimate", str(tmp_path / "c.yaml"), "--job", job, "--gpus", "2", "--gpu-memory"]
    main([*words, "80"])
    out = capsys.readouterr().out
    assert "Fits: any" in out if job == "evaluate" else "Fits: single, ddp" in out
    main(
        ["estimate", str(tmp_path / "c.yaml"), "--job", job, "--gpus", "2", "--gpu-memory", "1e-4"]
    )
    help_key = "model.lora.r=16 model.quantization.bits=4"
    help_key = "rollout.micro_batch_size=1" if job == "evaluate" else help_key
    assert help_key in capsys.readouterr().out


def test_no_pass_is_longer_than_the_model_and_the_reward_model_admit(tmp_path):
    for name in ("gpt2", "bert"):  # both have a table of 256 positions
        tiny_config(name, 300, num_labels=1).save_pretrained(tmp_path / name)
    gpt2, bert = str(tmp_path / "gpt2"), str(tmp_path / "bert")
    long = {"max_prompt_length": 512, "max_new_tokens": 100, "batch_size": 2}
    short = {**long, "max_prompt_length": 156}
    model, ptx = {"path": gpt2}, {"path": "x.jsonl", "batch_size": 2}
    capped, exact = (
        of_job("ppo", {"model": model, "reward": {"models": bert}, "rollout": rollout, **more})
        for rollout, more in ((long, {"ptx": ptx}), (short, {"ptx": {**ptx, "max_length": 256}}))
    )
    assert header(capped.config, capped.run(1), 1, 1) == header(exact.config, exact.run(1), 1, 1)
    assert capped.run(1) == exact.run(1)
    llama = tmp_path / "llama"
    tiny_config("llama", 300, max_position_embeddings=4096).save_pretrained(llama)
    of_job("evaluate", {"policies": str(llama), "rewards": bert, "rollout": long}).run(1)
    sft = {"model": model, "batch_size": 2, "max_length": 1024}
    assert of_job("sft", sft).run(1) == of_job("sft", {**sft, "max_length": 256}).run(1)
    with pytest.raises(UserError, match="max_new_tokens: given 256, must be less than the 256"):
        of_job("ppo", {"model": model, "rollout": {"max_new_tokens": 256}})


def test_tf32_needs_what_fp32_does(folder):
    fp32, tf32 = (
        of_job("ppo", {"model": {"path": str(folder), "precision": precision}})
        for precision in ("fp32", "tf32")
    )
    assert tf32.run(2, sharded=True) == fp32.run(2, sharded=True)


@pytest.mark.parametrize(
    ("section", "values", "fault"),
    [
        ("engine", {"name": "transformers", "batch_size": "x"}, "transformers: batch_size: given"),
        ("engine", {"name": "transformers", "batch_size": -3}, "given -3, must be at least 1"),
        ("engine", {"name": "transformers", "size": 3}, "given size; its parameters are batch_"),
        ("engine", {"name": "vllm", "memory_fraction": None}, "vllm: memory_fraction: given None"),
        ("engine", {"name": "vllm", "memory_fraction": 7}, r"given 7, must be in \(0, 1\)"),
        (
            "engine",
            {"name": "vllm", "options": {"gpu_memory_utilization": 0.9}},
            "vllm: options.gpu_memory_utilization: leave it out, and set memory_fraction",
        ),
        ("engine", {"name": "vllm", "options": {"kv_cache_memory_bytes": 9}}, "set memory_frac"),
        ("engine", {"name": "vllm", "options": {"dtype": "half"}}, "and set dtype"),
        ("engine", "vlm", "no engine is called 'vlm'"),
        ("reward", {"batch_size": "x"}, "batch_size: given 'x', must be a whole number"),
        ("reward", {"max_length": 0}, "max_length: given 0, must be at least 1"),
        ("reward", {"batchsize": 4}, "given path, batchsize; its parameters are path, batch_size"),
        ("reward", {"weight": "x"}, "weight: given 'x', must be a finite number"),
        ("reward", {"name": "per_segment"}, "reward per_segment: given no argument; its"),
    ],
)
def test_arguments_are_checked_as_by_the_job(saved, section, values, fault):
    config: dict[str, Any] = {"model": {"path": str(saved / "policy")}}
    if section == "engine":
        config["rollout"] = {"engine": values}
    else:
        config["reward"] = {"models": {"name": str(saved / "reward"), **values}}
    with pytest.raises(UserError, match=fault):
        of_job("ppo", config).run(1)
