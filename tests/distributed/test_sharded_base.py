"""Adapters on a base that ZeRO-3 shards: they do what one process does, or are refused first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.launches import (
    PROFILES,
    accelerate,
    assert_the_same,
    launch,
    run,
    sharding_everything,
)
from support.runs import tiny_config as run_config
from support.tiny_models import (
    BYTES_VOCAB,
    byte_tokenizer,
    tiny_causal_lm,
    tiny_config,
    tiny_sequence_classifier,
)

from marlhf.common.errors import UserError
from marlhf.config import LoraSettings, ModelSettings
from marlhf.models.adapters import add_adapter
from marlhf.models.sharded_base import check_adapters, check_ppo_adapters

ATTENTION = ["q_proj", "v_proj"]
RIGHT: dict[str, dict[str, Any]] = {
    "fused experts left alone, embeddings and head": {
        "family": "qwen3_moe",
        "lora": {
            "r": 4,
            "target_modules": [*ATTENTION, "embed_tokens", "lm_head"],
            "extra": {"init_lora_weights": "orthogonal"},
        },
    },
    "every key that is allowed, with transposed weights": {
        "family": "gpt2",
        "lora": {
            "r": 4,
            "target_modules": ["c_attn", "c_fc", "c_proj"],
            "extra": {
                "exclude_modules": ["mlp.c_proj"],
                "layers_to_transform": [0, 1],
                "layers_pattern": "h",
                "rank_pattern": {"c_attn": 2},
                "alpha_pattern": {"c_fc": 7},
                "use_rslora": True,
                "init_lora_weights": True,
                "lora_bias": True,
            },
        },
    },
}


@pytest.mark.parametrize("case", RIGHT)
def test_they_do_what_one_process_does(case: str, tmp_path: Path) -> None:
    sections = {"model": {"lora": RIGHT[case]["lora"]}, "family": RIGHT[case]["family"]}
    check_adapters(settings(**sections["model"]["lora"]), tiny_config(sections["family"]))
    launch(tmp_path / "one", [], sections)
    found = launch(tmp_path / "run", accelerate(sharding_everything(tmp_path)), sections)
    assert (found["ranks"], found["stage"]) == (2, 3)
    assert_the_same(tmp_path / "run", tmp_path / "one")


def settings(**lora: Any) -> ModelSettings:
    return ModelSettings(path="given", lora=LoraSettings(**lora))


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "fused experts": (
        "qwen3_moe",
        {},
        r"target_modules: given 'all-linear', which adapts the fused experts .*mlp.experts; .*"
        r"profiles single, .* target_modules: \[k_proj, o_proj, q_proj, v_proj\]",
    ),
    "named experts": (
        "qwen3_moe",
        {"target_modules": ATTENTION, "extra": {"target_parameters": ["experts.gate_up_proj"]}},
        "extra.target_parameters: given",
    ),
    "a whole module": ("llama", {"extra": {"modules_to_save": ["lm_head"]}}, "modules_to_save"),
    "DoRA": ("llama", {"extra": {"use_dora": True}}, "extra.use_dora: given True"),
    "KaSA": ("llama", {"extra": {"kasa_config": {}}}, "extra.kasa_config: given {}"),
    "VeLoRA": ("llama", {"extra": {"velora_config": {}}}, "extra.velora_config: given"),
    "aLoRA": ("llama", {"extra": {"alora_invocation_tokens": [5]}}, "extra.alora_invocation"),
    "more layers": ("llama", {"extra": {"layer_replication": [[0, 2], [1, 2]]}}, "replication"),
    "PiSSA": ("llama", {"extra": {"init_lora_weights": "pissa"}}, "extra.init_lora_weights"),
    "what no profile takes": ("llama", {"extra": {"bias": "all"}}, "extra.bias: must stay none"),
    "tokens": ("llama", {"extra": {"trainable_token_indices": [3]}}, "trainable_token_indices"),
}


@pytest.mark.parametrize("case", WRONG)
def test_others_are_refused_by_name(case: str) -> None:
    family, lora, line = WRONG[case]
    with pytest.raises(UserError, match=line):
        check_adapters(settings(**lora), tiny_config(family))


def test_what_a_key_is_without_is_allowed() -> None:
    extra = {"use_dora": False, "modules_to_save": None, "target_parameters": None}
    check_adapters(settings(extra=extra), tiny_config("llama"))


def test_critics_and_reward_models_are_checked_too(tmp_path: Path) -> None:
    """Those that get the policy's adapter, and those that are adapters of its base."""
    base, experts = tmp_path / "base", tmp_path / "experts"
    tiny_causal_lm("llama").save_pretrained(base)
    tiny_sequence_classifier("qwen3_moe").save_pretrained(experts)
    lora = LoraSettings(r=4, target_modules="all-linear")
    model = {"path": str(base), "lora": lora}
    config = run_config(tmp_path / "run", model=model, critic={"path": str(experts)})
    with pytest.raises(UserError, match="adapts the fused experts"):
        check_ppo_adapters(config, tiny_config("llama"), [])

    lm = tiny_causal_lm("llama")
    lm.name_or_path = str(base)
    dora = LoraSettings(r=4, extra={"use_dora": True})
    add_adapter(lm, dora, "reward").save_pretrained(tmp_path)
    config = run_config(tmp_path / "run", model=model)
    with pytest.raises(UserError, match=r"adapter '.*reward': adapts by PEFT's Linear"):
        check_ppo_adapters(config, tiny_config("llama"), [str(tmp_path / "reward")])
    check_ppo_adapters(config, tiny_config("llama"), [])


JOBS = {
    "sft": '{"prompt": "hello", "completion": " you"}\n',
    "reward": '{"prompt": "hello", "chosen": " you", "rejected": " me"}\n',
    "ppo": '{"prompt": "hello"}\n',
}


@pytest.mark.parametrize("job", JOBS)
def test_every_job_refuses_in_a_line(job: str, tmp_path: Path) -> None:
    tiny_causal_lm("qwen3_moe", BYTES_VOCAB).save_pretrained(tmp_path / "model")
    byte_tokenizer(add_bos=True).save_pretrained(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text(JOBS[job] * 8)
    (tmp_path / "rewards.py").write_text("def none(prompts, completions): return [0.0]\n")
    (tmp_path / "job.yaml").write_text(
        "model: {path: model, lora: {r: 4}}\n"
        "data: {path: data.jsonl, eval_rows: 2}\n"
        f"output_dir: run\n{'reward: {models: rewards.none}' if job == 'ppo' else ''}\n"
        f"{'rollout: {batch_size: 4}' if job == 'ppo' else 'batch_size: 4'}\n"
    )
    launcher = [*accelerate(PROFILES / "zero3.yaml"), "--num_processes", "1"]
    done = run([*launcher, "-m", "marlhf", job, "job.yaml"], folder=tmp_path)
    lines = [line for line in done.stderr.splitlines() if line.startswith("marlhf: ")]
    assert len(lines) == 1, done.stderr
    assert "model.lora.target_modules: given 'all-linear', which adapts the fused" in lines[0]
    assert not (tmp_path / "run").exists()
