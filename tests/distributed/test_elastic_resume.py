"""Runs that resume on another number of ranks, and in another ZeRO stage, as if never stopped."""

from __future__ import annotations

import importlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.forked_ranks import ranks
from support.launches import metrics
from support.memory_of_ranks import LARGEST, WEIGHTS, peaks
from support.runs import tiny_trainer
from support.runs_that_die import die
from support.tiny_models import BYTES_VOCAB, byte_tokenizer, tiny_causal_lm
from torch import Tensor

from marlhf.config import LoraSettings, RewardConfig, SFTConfig
from marlhf.config.loading import config_from_dict
from marlhf.distributed import fragments, trained
from marlhf.distributed.fragments import FragmentFiles, ReplicatedFiles
from marlhf.runs import checkpoint
from marlhf.training import reward_model, sft

ZERO_2: dict[str, Any] = {"stage": 2}
# shards the small weights too, all that a tiny model has, in several parts
ZERO_3: dict[str, Any] = {
    "stage": 3,
    "stage3_param_persistence_threshold": 0,
    "sub_group_size": 1000,
}
SECTIONS: dict[str, Any] = {
    "overwrite": False,
    "resume": "auto",
    "checkpoint": {"every": 10, "keep": 9},
    "kl": {"coef": 0.05, "target": 3.0, "horizon": 100},
    "optimizer": {"schedule": "constant", "weight_decay": 0.1, "eps": 0.1, "learning_rate": 0.01},
    "reward": {"tokens": {"name": "curiosity", "weight": 0.5, "learning_rate": 0.01, "width": 8}},
    "segmenter": {"name": "phrases"},
}
LORA = {"model": {"lora": LoraSettings(r=2)}}

Launch = tuple[int, dict[str, Any] | None]  # ranks, DeepSpeed's section


@pytest.fixture(scope="module", autouse=True)
def deepspeed() -> None:
    """Imports DeepSpeed once, for all ranks that are forked."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    importlib.import_module("deepspeed")


def train(folder: Path, launch: Launch, steps: int, **sections: Any) -> None:
    """Begin or resume a run and train it to its end, on these ranks."""

    def work(_: int) -> str:
        tiny_trainer(folder / "run", steps=steps, **{**SECTIONS, **sections}).train()
        return "done"

    assert ranks(launch[0], work, folder, launch[1]) == ["done"] * launch[0]


def state(folder: Path) -> dict[str, Tensor]:
    """Weights and moments in a part of a checkpoint, from whatever files."""
    about = json.loads((folder / "learner.json").read_text())
    if about["layout"] == "fragments":
        files: Any = FragmentFiles(folder, about["ranks"])
    else:
        saved = torch.load(folder / "optimizer.pt")
        files = ReplicatedFiles(folder, saved["names"])
    return {
        f"{key}/{name}": files.read(name, key, 0, shape.numel())
        for name, shape in files.shapes.items()
        for key in ("weight", "exp_avg", "exp_avg_sq")
    }


def assert_the_same(
    run: Path, like: Path, step: int, parts: Sequence[str] = ("policy", "critic")
) -> None:
    """Two runs have the same metrics and, in a checkpoint, weights and moments, up to rounding."""
    for row, wanted in zip(metrics(run), metrics(like), strict=True):
        numbers = {
            name: value
            for name, value in wanted.items()
            if value is not None and not name.endswith("per_second")
        }
        assert {name for name in row if row[name] is None} == {
            name for name in wanted if wanted[name] is None
        }
        got = {name: row[name] for name in numbers}
        assert got == pytest.approx(numbers, rel=1e-5, abs=5e-6)
    for part in parts:
        folders = [path / "checkpoints" / f"step-{step}" / part for path in (run, like)]
        tensors, expected = map(state, folders)
        assert tensors.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(tensors[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that went from two ranks to one and back, through the files of every kind of launch."""
    folder = tmp_path_factory.mktemp("resumed")
    launches: list[tuple[int, Launch]] = [
        (2, (2, ZERO_2)),
        (3, (1, None)),
        (5, (2, ZERO_3)),
        (6, (1, None)),
    ]
    for steps, launch in launches:
        train(folder, launch, steps)
    return folder / "run"


def test_a_run_resumes_on_other_ranks(resumed: Path, tmp_path: Path) -> None:
    train(tmp_path, (1, None), 6)
    assert_the_same(resumed, tmp_path / "run", 6)


def test_a_shard_that_is_missing_is_named_on_all_ranks(resumed: Path, tmp_path: Path) -> None:
    """Here one that the manifest does not know; others are passed over before ranks read them."""
    shutil.copytree(resumed, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / "step-5"
    facts = checkpoint.read(folder).facts
    (folder / "critic" / "rank-1.safetensors").unlink()
    (folder / checkpoint.MANIFEST).unlink()
    folder.rename(folder.with_suffix(".partial"))
    checkpoint.commit(folder.with_suffix(".partial"), facts)

    def work(_: int) -> str:
        tiny_trainer(tmp_path / "run", steps=6, **{**SECTIONS, "resume": str(folder)})
        return "done"

    for outcome in ranks(2, work, tmp_path):
        fault = "step-5 does not fit this run: critic: rank-1.safetensors is missing"
        assert outcome.startswith("UserError: ")
        assert outcome.endswith(fault)


@pytest.mark.slow
@pytest.mark.parametrize("sections", [{}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("zero", [ZERO_2, ZERO_3], ids=["zero 2", "zero 3"])
def test_four_ranks_to_two_and_back(
    zero: dict[str, Any], sections: dict[str, Any], tmp_path: Path
) -> None:
    """As four that were never stopped."""
    for i, count in enumerate((4, 2, 4)):
        train(tmp_path, (count, zero), 2 * (i + 1), **sections)
    (tmp_path / "whole").mkdir()
    train(tmp_path / "whole", (4, zero), 6, **sections)
    assert_the_same(tmp_path / "run", tmp_path / "whole" / "run", 6)


JOBS: dict[str, Any] = {"sft": (SFTConfig, sft), "reward": (RewardConfig, reward_model)}


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_supervised_runs_resume_on_other_ranks(job: str, tmp_path: Path) -> None:
    """Two ranks, one, two; with the best model so far, which early stopping keeps."""
    kind, module = JOBS[job]
    tiny_causal_lm("llama", BYTES_VOCAB).save_pretrained(tmp_path / "lm")
    byte_tokenizer(add_bos=True).save_pretrained(tmp_path / "lm")
    rows = [
        {"prompt": f"say {i}", "completion": "a" * (1 + i % 5)}
        | {"chosen": "a" * (1 + i % 5), "rejected": "b" * (1 + i % 7)}
        for i in range(16)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def trained_for(steps: int, launch: Launch, run: str) -> None:
        values = {
            "model": {"path": str(tmp_path / "lm")},
            "data": {"path": str(tmp_path / "data.jsonl"), "eval_rows": 4},
            "output_dir": str(tmp_path / run),
            "resume": "auto",
            "steps": steps,
            "batch_size": 4,
            "max_length": 40,
            "early_stopping": 9,
            "optimizer": {"learning_rate": 1e-2, "schedule": "constant", "eps": 0.1},
            "log": {"progress": False, "tensorboard": False, "eval_every": 1},
        }

        def work(_: int) -> str:
            module.run(config_from_dict(kind, values))
            return "done"

        assert ranks(launch[0], work, tmp_path, launch[1]) == ["done"] * launch[0]

    for steps, launch in ((2, (2, ZERO_3)), (4, (1, None)), (6, (2, ZERO_2))):
        trained_for(steps, launch, "run")
    trained_for(6, (1, None), "whole")
    assert_the_same(tmp_path / "run", tmp_path / "whole", 6, ["model"])


OFFLOAD = {**ZERO_3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}


@pytest.mark.slow
@pytest.mark.parametrize("zero", [ZERO_2, ZERO_3, OFFLOAD], ids=["zero 2", "zero 3", "offload"])
def test_a_rank_killed_in_its_file_leaves_the_checkpoint_before(
    zero: dict[str, Any], tmp_path: Path
) -> None:
    """On the same ranks the run then ends as if never stopped, bit for bit; here in bf16."""
    sections: dict[str, Any] = {"model": {"precision": "bf16"}, "checkpoint": {"every": 2}}
    (tmp_path / "whole").mkdir()
    train(tmp_path / "whole", (2, zero), 4, **sections)

    def killed(rank: int) -> str:
        real = fragments.write_tensor

        def write_tensor(x: Tensor, out: Any) -> None:
            real(x, out)
            if rank == 1 and "step-4.partial/critic" in out.name:
                die()

        fragments.write_tensor = write_tensor
        tiny_trainer(tmp_path / "run", steps=4, **{**SECTIONS, **sections}).train()
        return "done"

    outcomes = ranks(2, killed, tmp_path, zero)
    assert outcomes[1] == "none"
    assert outcomes[0] != "done"
    assert [path.name for path in checkpoint.steps(tmp_path / "run" / "checkpoints")] == ["step-2"]
    train(tmp_path, (2, zero), 4, **sections)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole" / "run")


@pytest.mark.slow
def test_files_of_deepspeed_itself_resume_on_the_same_ranks(tmp_path: Path) -> None:
    """Those of an earlier version, and of NVMe offload, which is made up here."""

    def earlier(_: int) -> str:
        trained.is_on_nvme = lambda engine: True
        tiny_trainer(tmp_path / "run", steps=2, **SECTIONS).train()
        return "done"

    assert ranks(2, earlier, tmp_path, ZERO_2) == ["done", "done"]
    assert (tmp_path / "run" / "checkpoints" / "step-2" / "policy" / "engine").is_dir()
    with pytest.raises(AssertionError, match=r"'ZeRO-2 over 2 ranks', this launch is of 'repl"):
        train(tmp_path, (1, None), 4)
    train(tmp_path, (2, ZERO_2), 4)
    (tmp_path / "whole").mkdir()
    train(tmp_path / "whole", (2, ZERO_2), 4)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole" / "run")


@pytest.mark.slow
@pytest.mark.parametrize("zero", [ZERO_2, {"stage": 3}], ids=["zero 2", "zero 3"])
def test_no_rank_holds_the_optimiser_to_save_or_load_it(
    zero: dict[str, Any], tmp_path: Path
) -> None:
    """ZeRO-2 gathers the weights, as after every step; moments of all ranks are twice as much."""
    most = LARGEST if zero["stage"] == 3 else WEIGHTS
    for taken in peaks(4, zero, tmp_path):
        assert taken["save"] < 2 * LARGEST
        assert taken["load"] < most + 2 * LARGEST
