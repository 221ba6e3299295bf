"""No job deletes what it reads, whatever names it, and `overwrite` says so by both keys."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from marlhf.cli import main
from marlhf.common.errors import UserError
from marlhf.config import EvaluateConfig, PPOConfig, RewardConfig, SFTConfig
from marlhf.config.loading import config_from_dict, config_to_dict, merge
from marlhf.config.yaml_text import dump_yaml
from marlhf.distributed import Distributed
from marlhf.evaluation.job import _claim
from marlhf.runs.directory import run_files
from marlhf.runs.provenance import check_apart


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder `run` as a run leaves it, and others that lead to it."""
    monkeypatch.chdir(tmp_path)
    for name in ("final", "final/adapter/policy", "checkpoints/step-1", "tensorboard"):
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / "config.json").write_text("{}")
        (tmp_path / "run" / name / "model.safetensors").write_text("weights")
    for name in ("metrics.jsonl", "samples.jsonl", "config.yaml", "samples.jsonl.bad"):
        (tmp_path / "run" / name).write_text('{"prompt": "a"}\n')
    (tmp_path / "link").symlink_to("run/final")
    (tmp_path / "file.jsonl").symlink_to("run/samples.jsonl")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "config.json").write_text("{}")
    (tmp_path / "linked" / "model.safetensors").symlink_to(tmp_path / "run/final/model.safetensors")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "run/final"})
    )
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    return tmp_path / "run"


READS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "model": (PPOConfig, {"model": {"path": "run/final"}}, "model.path"),
    "model of sft": (SFTConfig, {"model": {"path": "run/final"}}, "model.path"),
    "model of reward": (RewardConfig, {"model": {"path": "run/final/"}}, "model.path"),
    "a longer way": (PPOConfig, {"model": {"path": "other/../run/final"}}, "model.path"),
    "a link": (PPOConfig, {"model": {"path": "link"}}, "model.path"),
    "linked weights": (PPOConfig, {"model": {"path": "linked"}}, "model.path"),
    "adapter's base": (PPOConfig, {"reward": {"models": "adapter"}}, "reward.models"),
    "adapter": (PPOConfig, {"critic": {"path": "run/final/adapter/policy"}}, "critic.path"),
    "a checkpoint": (PPOConfig, {"critic": {"path": "run/checkpoints/step-1"}}, "critic.path"),
    "reward model": (
        PPOConfig,
        {"reward": {"models": ["length", {"name": "run/final", "weight": 0.5}]}},
        "reward.models.1.name",
    ),
    "embeddings": (
        PPOConfig,
        {"reward": {"models": {"name": "embedding_similarity", "path": "run/final"}}},
        "reward.models.path",
    ),
    "data": (PPOConfig, {"data": {"path": "run/samples.jsonl"}}, "data.path"),
    "data by a link": (PPOConfig, {"data": {"path": "file.jsonl"}}, "data.path"),
    "a folder of data": (PPOConfig, {"data": {"path": "run"}}, "data.path"),
    "its parent": (SFTConfig, {"data": {"path": "."}}, "data.path"),
    "held-out data": (PPOConfig, {"data": {"eval_path": "run/metrics.jsonl"}}, "data.eval_path"),
    "texts": (PPOConfig, {"ptx": {"path": "run/samples.jsonl"}}, "ptx.path"),
    "demonstrations": (
        RewardConfig,
        {"data": {"demonstrations_path": "run/samples.jsonl"}},
        "data.demonstrations_path",
    ),
    "bad lines": (SFTConfig, {"data": {"path": "run/samples.jsonl.bad"}}, "data.path"),
}


def config_of(cls: Any, changes: dict[str, Any], **more: Any) -> Any:
    values: dict[str, Any] = {"model": {"path": "other"}, "output_dir": "run", "overwrite": True}
    return config_from_dict(cls, merge(values, {**changes, **more}))


@pytest.mark.parametrize("reads", READS)
def test_what_a_run_reads_is_not_replaced(reads: str, run: Path) -> None:
    cls, changes, key = READS[reads]
    for folder in ("run", "./other/../run", str(run)):
        config = config_of(cls, changes, output_dir=folder)
        with pytest.raises(UserError) as refusal:
            check_apart(config, run_files(config.output_dir))
        assert f"output_dir: given {folder!r}; overwrite: given true" in str(refusal.value)
        assert f", which {key} (" in str(refusal.value)
    with pytest.raises(UserError, match="it would replace"):  # at its end
        check_apart(config_of(cls, changes, overwrite=False), run_files("run"))
    elsewhere = config_of(cls, changes, output_dir="elsewhere")
    check_apart(elsewhere, run_files("elsewhere"))


def test_what_lies_beside_is_no_reason(run: Path) -> None:
    for path in ("other", "run", "."):  # in neither of the last two does a run delete a model
        check_apart(config_of(PPOConfig, {"model": {"path": path}}), run_files("run"))
    words = {"reward": {"models": {"name": "keyword", "words": ["final", "x" * 300, "a\0b", "~q"]}}}
    check_apart(config_of(PPOConfig, words), run_files("run"))


JOBS: dict[str, Callable[[Path], list[str]]] = {
    "ppo": lambda run: ["ppo", "c.yaml", "model.path=run/final", "reward.models=length"],
    "its own file": lambda run: ["ppo", "run/config.yaml", "model.path=other"],
}


@pytest.mark.parametrize("job", JOBS)
def test_the_command_line_refuses_and_deletes_nothing(
    job: str, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("c.yaml").write_text("output_dir: run\n")
    (run / "config.yaml").write_text("output_dir: run\n")
    was = sorted(map(str, run.rglob("*")))
    from marlhf.training import ppo

    monkeypatch.setattr(ppo, "run", lambda c: check_apart(c, run_files(c.output_dir)))
    with pytest.raises(SystemExit) as end:
        main([*JOBS[job](run), "overwrite=true"])
    assert end.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "overwrite: given true" in said
    assert sorted(map(str, run.rglob("*"))) == was


@pytest.mark.parametrize("job", ["ppo", "evaluate"])
def test_a_configuration_of_the_users_own_is_not_replaced(
    job: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run's resolved one may be given again, and so may any where a run's results are."""
    ran: list[Any] = []
    monkeypatch.setattr("marlhf.training.ppo.run", ran.append)
    monkeypatch.setattr("marlhf.evaluation.job.run", ran.append)
    monkeypatch.chdir(tmp_path)
    texts = {
        "ppo": "model: {path: other}\ndata: {path: a.jsonl}\nreward: {models: length}\n",
        "evaluate": "policies: other\ndata: {path: a.jsonl}\nrewards: length\n",
    }
    mine = Path("mine", "config.yaml")
    mine.parent.mkdir()
    mine.write_text(f"# my notes\n{texts[job]}output_dir: ./mine\n")
    with pytest.raises(SystemExit) as end:
        main([job, "mine/config.yaml"])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "output_dir: './mine' holds the configuration file that was given" in line
    main([job, "mine/config.yaml", "output_dir=elsewhere"])
    resolved = Path("elsewhere", "config.yaml")
    resolved.parent.mkdir()
    resolved.write_text(dump_yaml(config_to_dict(ran[0])))
    main([job, "elsewhere/config.yaml"])
    Path("mine", "samples.jsonl").touch()
    main([job, "mine/config.yaml"])
    assert [config.output_dir for config in ran] == ["elsewhere", "elsewhere", "./mine"]


def test_an_evaluation_reads_none_of_its_results(run: Path) -> None:
    os.remove(run / "metrics.jsonl")
    values = {"policies": "other", "data": {"path": "run/samples.jsonl"}, "output_dir": "run"}
    config = config_from_dict(EvaluateConfig, {**values, "overwrite": True})
    with pytest.raises(UserError, match=r"would replace .*samples\.jsonl', which data\.path"):
        _claim(config, Distributed(), ExitStack())
    assert (run / "samples.jsonl").exists()
