"""DeepSpeed and DDP on two real ranks, as `accelerate launch` starts them, against one process."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from support.launches import (
    PROFILES,
    accelerate,
    assert_the_same,
    launch,
    metrics,
    responses,
    run,
    sharding_everything,
)
from support.tiny_models import BYTES_VOCAB, byte_tokenizer, tiny_causal_lm

FIVE: dict[str, Any] = {"steps": 5, "resume": True}
CHECKPOINTING: dict[str, Any] = {**FIVE, "model": {"gradient_checkpointing": True}}
# an update that may be given up half-way, texts beside it that the critic's head has no part in,
# and a reward that reads embeddings
OPTIONS: dict[str, Any] = {
    "critic": {"backbone": "policy"},
    "ptx": {"batch_size": 6, "coef": 0.5, "max_length": 32},
    "kl": {"target": 0.5, "horizon": 8},
    "ppo": {"epochs": 4, "target_kl": 0.01},
    "optimizer": {"micro_batch_size": 2, "learning_rate": 0.02, "eps": 0.1},
    "reward": {"tokens": [{"name": "curiosity", "weight": 0.5, "learning_rate": 0.01}]},
}
LORA: dict[str, Any] = {**FIVE, "model": {"lora": {"r": 4}}}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five updates in one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert launch(folder, [], FIVE)["goes_on"]
    return folder


@pytest.mark.parametrize("name", [path.stem for path in sorted(PROFILES.glob("*.yaml"))])
def test_accelerate_reads_every_profile(name: str) -> None:
    config = load_config_from_file(str(PROFILES / f"{name}.yaml"))
    kind = {"single": "NO", "ddp": "MULTI_GPU"}.get(name, "DEEPSPEED")
    assert config.distributed_type == kind
    assert config.mixed_precision in (None, "no")  # `model.precision` decides
    if kind == "DEEPSPEED":
        stage = {"zero1": 1, "zero2": 2, "servers": 2}.get(name, 3)
        assert config.deepspeed_config["zero_stage"] == stage
        offloads = {config.deepspeed_config[f"offload_{x}_device"] for x in ("optimizer", "param")}
        assert offloads == {"cpu" if name.endswith("offload") else "none"}


def test_ddp_does_what_one_process_does(alone: Path, tmp_path: Path) -> None:
    found = launch(tmp_path / "run", accelerate(PROFILES / "ddp.yaml"), FIVE, warm=False)
    assert (found["ranks"], found["stage"], found["goes_on"]) == (2, 0, True)
    assert found["policy"] == found["critic"] == "DistributedDataParallel"
    assert_the_same(tmp_path / "run", alone)


def test_zero_2_does_what_one_process_does(alone: Path, tmp_path: Path) -> None:
    found = launch(tmp_path / "run", accelerate(PROFILES / "zero2.yaml"), FIVE, warm=False)
    assert (found["ranks"], found["stage"], found["goes_on"]) == (2, 2, True)
    assert found["policy"] == found["critic"] == "DeepSpeedEngine"
    assert found["reference_here"] > 0
    assert_the_same(tmp_path / "run", alone)


def test_zero_3_does_what_one_process_does(alone: Path, tmp_path: Path) -> None:
    """Here with policy, reference and critic read from files, by the first rank alone."""
    profile = sharding_everything(tmp_path)
    tiny_causal_lm("llama", BYTES_VOCAB).save_pretrained(tmp_path / "model")
    model = {**CHECKPOINTING["model"], "path": str(tmp_path / "model")}
    sections = {**CHECKPOINTING, "model": model}
    found = launch(tmp_path / "run", accelerate(profile), sections, warm=False)
    assert (found["ranks"], found["stage"], found["goes_on"]) == (2, 3, True)
    assert found["reads"] == [3, 0]
    assert found["policy"] == found["critic"] == "DeepSpeedEngine"
    assert found["reference_here"] == 0  # no rank keeps a weight of it
    assert_the_same(tmp_path / "run", alone)


OFFLOAD: dict[str, Any] = {
    "offload_optimizer": {"device": "cpu"},
    "offload_param": {"device": "cpu"},
}


@pytest.mark.parametrize("keys", [{}, OFFLOAD], ids=["on the device", "offload"])
def test_parts_that_zero_3_steps_one_after_another(
    keys: dict[str, Any], alone: Path, tmp_path: Path
) -> None:
    """DeepSpeed cuts a rank's weights into parts of `sub_group_size` (1e9 by default), each with a
    gradient norm of its own; here one part a weight, more or less."""
    profile = sharding_everything(tmp_path, sub_group_size=1000, **keys)
    found = launch(tmp_path / "run", accelerate(profile), FIVE)
    assert found["sub_groups"] > 4
    assert found["goes_on"]
    assert_the_same(tmp_path / "run", alone)


@pytest.mark.parametrize("weight", ["embed_tokens.weight", "norm.weight"])
def test_a_part_that_is_not_finite_skips_the_step(weight: str, tmp_path: Path) -> None:
    """Whichever of the parts it is, the first or another."""
    spoiled = {"spoiled": f"model.{weight}"}
    launch(tmp_path / "one", [], spoiled)
    profile = sharding_everything(tmp_path, sub_group_size=1000)
    launch(tmp_path / "run", accelerate(profile), spoiled)
    assert [row.get("skipped_steps") for row in metrics(tmp_path / "run")] == [None, 0.0, 4.0, 0.0]
    assert_the_same(tmp_path / "run", tmp_path / "one")


@pytest.mark.parametrize("case", ["tied embeddings", "lora"])
def test_zero_3_samples_in_bf16_what_one_process_does(case: str, tmp_path: Path) -> None:
    """From copies of its matrices in bf16: autocast would round them so in every product. In fp32
    stays what it leaves alone, tied embeddings too: the head reads a copy of them."""
    lora = case == "lora"
    model: dict[str, Any] = {"precision": "bf16"}
    if lora:  # of files in bf16, whose matrices stay so
        model |= {"lora": {"r": 4}, "path": str(tmp_path / "model")}
        tiny_causal_lm("qwen2", BYTES_VOCAB).bfloat16().save_pretrained(tmp_path / "model")
    sections: dict[str, Any] = {"model": model, "family": "gemma"}
    alone = launch(tmp_path / "one", [], sections)
    found = launch(tmp_path / "run", accelerate(sharding_everything(tmp_path)), sections)
    assert found["stage"] == 3
    assert responses(tmp_path / "run") == responses(tmp_path / "one")
    linear = ["bfloat16", "float32"] if lora else ["bfloat16"]  # adapters are not sharded
    assert found["sampled_in"].pop("Linear") == linear
    assert alone["sampled_in"].pop("Linear") == (linear if lora else ["float32"])
    assert {*map(tuple, found["sampled_in"].values())} == {("float32",)}


def test_options_under_zero_3(tmp_path: Path) -> None:
    launch(tmp_path / "one", [], OPTIONS)
    found = launch(tmp_path / "run", accelerate(sharding_everything(tmp_path)), OPTIONS)
    assert found["stage"] == 3
    assert_the_same(tmp_path / "run", tmp_path / "one")
    steps = [row.get("policy_steps") for row in metrics(tmp_path / "run")[1:]]
    assert any(taken < 8 for taken in steps)  # of 4 epochs with 2 minibatches


def test_adapters_on_a_base_sharded_by_zero_3(tmp_path: Path) -> None:
    launch(tmp_path / "one", [], LORA)
    profile = sharding_everything(tmp_path)
    found = launch(tmp_path / "run", accelerate(profile), LORA, warm=False)
    assert (found["stage"], found["goes_on"]) == (3, True)
    assert found["reference_here"] < 10_000  # adapters alone; the base has 25 thousand weights
    assert_the_same(tmp_path / "run", tmp_path / "one")


def test_a_base_in_4_bits_sharded_by_zero_3(tmp_path: Path) -> None:
    sections = {**LORA, "model": {**LORA["model"], "quantization": {"bits": 4}}}
    launch(tmp_path / "one", [], sections)
    found = launch(tmp_path / "run", accelerate(sharding_everything(tmp_path)), sections)
    assert (found["stage"], found["goes_on"]) == (3, True)
    assert found["sampled_in"]["QuantizedLinear"] == ["uint8"]
    assert_the_same(tmp_path / "run", tmp_path / "one")


@pytest.mark.parametrize(
    ("death", "shown"),
    [
        ('raise RuntimeError("no more")', "rank 1: reward die: row 0 (prompt 'hello'): raised"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "Signal 9 (SIGKILL) received"),
    ],
    ids=["error", "killed"],
)
def test_a_rank_that_dies_takes_the_run_down(death: str, shown: str, tmp_path: Path) -> None:
    """Under ZeRO-3, where the other rank waits for its weights, in an evaluation after an update:
    the row of the update is kept."""
    tiny_causal_lm("llama", BYTES_VOCAB).save_pretrained(tmp_path / "model")
    byte_tokenizer(add_bos=True).save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "hello"}\n' * 8)
    (tmp_path / "dying.py").write_text(
        "import itertools, os, signal\n"
        "calls = itertools.count(1)\n"
        "def die(prompts, completions):\n"
        f"    if os.environ['RANK'] == '1' and next(calls) == 3: {death}\n"
        "    return [0.0] * len(prompts)\n"
    )
    config = {
        "model": {"path": str(tmp_path / "model")},
        "data": {"path": str(tmp_path / "prompts.jsonl"), "eval_rows": 2},
        "output_dir": str(tmp_path / "run"),
        "rollout": {"batch_size": 4, "max_new_tokens": 6},
        "reward": {"models": "dying.die"},
        "log": {"tensorboard": False, "progress": False, "eval_every": 1},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    command = [*accelerate(PROFILES / "zero3.yaml"), "-m", "marlhf", "ppo"]
    began = time.monotonic()
    done = run([*command, str(tmp_path / "config.yaml")], folder=tmp_path)
    assert done.returncode != 0
    assert shown in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("marlhf: ")]
    if "SIGKILL" in death:  # the launcher may end the other rank before it says so
        possible = ("marlhf: rank 1 ended before the run did", "marlhf: SIGTERM: ")
        assert all(line.startswith(possible) for line in lines)
    else:
        assert len(lines) == 1
    assert [row["step"] for row in metrics(tmp_path / "run")] == [0, 1]
    assert "training/ppo.py" not in done.stderr  # the traceback is the launcher's
    assert time.monotonic() - began < 120  # a minute, and as long to start on a busy machine
