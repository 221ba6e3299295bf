"""Ranks that were started with different configurations, data, models or code."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from support.evaluations import build_models, config_for
from support.forked_ranks import two_ranks
from support.runs import tiny_config
from support.tiny_models import CHATML, byte_tokenizer

from marlhf.config import ModelSettings
from marlhf.data.template_checks import with_template_date
from marlhf.distributed import Distributed
from marlhf.evaluation.job import evaluate
from marlhf.runs import agreement
from marlhf.runs.state import claim_run


def disk(folder: Path, seed: int) -> None:
    """A node's own disk with a model, whose weights have the same size for every seed."""
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text("{}")
    (folder / "model" / "model.safetensors").write_bytes(random.Random(seed).randbytes(2**20))


# of rank 1: sections of the configuration, rows, seed of the weights
DIFFERENT: dict[str, tuple[dict[str, Any], list[str], int, str]] = {
    "a key": ({"seed": 9}, ["a", "b"], 0, "seed (9, on rank 0 0)"),
    "a key below": ({"ppo": {"epochs": 7}}, ["a", "b"], 0, "ppo.epochs (7, on rank 0 2)"),
    "a row": ({}, ["a", "x"], 0, "train_dataset"),
    "weights": ({}, ["a", "b"], 1, "model.path 'model'"),
    "nothing": ({}, ["a", "b"], 0, ""),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_rank_that_was_started_otherwise_ends_all_with_one_line(
    name: str, tmp_path: Path
) -> None:
    """Else they would average gradients of different losses without a word."""
    sections, rows, seed, named = DIFFERENT[name]

    def work(rank: int) -> str:
        disk(tmp_path / str(rank), seed if rank else 0)
        os.chdir(tmp_path / str(rank))
        config = tiny_config(tmp_path / "run", **(sections if rank else {}))
        config = replace(config, model=ModelSettings(path="model"))
        claim_run(config, Distributed(), {"train_dataset": rows if rank else ["a", "b"]})
        return "claimed"

    outcomes = two_ranks(work, tmp_path)
    assert outcomes[0] == outcomes[1]
    if name == "nothing":
        assert outcomes[0] == "claimed"
        return
    assert outcomes[0].startswith("UserError: ranks: rank 1 differs from rank 0 in ")
    assert named in outcomes[0]
    assert "\n" not in outcomes[0]


EVALUATED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a prompt": (
        lambda disk: (disk / "data.jsonl").write_text('{"prompt": "hi", "summary": "ho"}\n' * 6),
        "data.path 'data.jsonl'",
    ),
    "a run's policy": (
        lambda disk: shutil.copytree(disk / "a", disk / "run" / "final", dirs_exist_ok=True),
        "policies.run 'run/final'",
    ),
    "a reward": (
        lambda disk: (disk / "judging.py").write_text(REWARD + "# of another day\n"),
        "rewards.0 'judging.words'",
    ),
}
REWARD = "def words(prompts, completions): return [len(text.split()) for text in completions]\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build_models(tmp_path_factory.mktemp("models"))
    (folder / "judging.py").write_text(REWARD)
    return folder


@pytest.mark.parametrize("name", EVALUATED)
def test_an_evaluation_whose_ranks_differ_ends_with_one_line(
    name: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its results would be of several data sets, policies or rewards."""
    change, named = EVALUATED[name]
    disks = [shutil.copytree(models, tmp_path / str(rank)) for rank in range(2)]
    change(disks[1])
    monkeypatch.syspath_prepend("")

    def work(rank: int) -> str:
        os.chdir(disks[rank])
        config = config_for(
            Path(),
            policies={"a": "a", "run": "run"},
            rewards=["judging.words"],
            output_dir=str(tmp_path / "out"),
        )
        evaluate(config)
        return "evaluated"

    outcomes = two_ranks(work, tmp_path)
    assert outcomes[0] == outcomes[1]
    assert outcomes[0].startswith(f"UserError: ranks: rank 1 differs from rank 0 in {named};")


def test_a_folder_that_the_ranks_do_not_share_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the first checkpoint would fail, after hours perhaps."""
    monkeypatch.setattr(agreement, "_DELAY", 0.5)

    def work(rank: int) -> str:
        disk(tmp_path / str(rank), seed=0)
        os.chdir(tmp_path / str(rank))
        config = tiny_config(Path("run"), checkpoint={"every": 1})
        config = replace(config, model=ModelSettings(path="model"))
        claim_run(config, Distributed(), {})
        return "claimed"

    first, second = two_ranks(work, tmp_path)
    line = "output_dir: 'run' of rank 0 is not that of rank 1; must be on a file system"
    assert second.startswith(f"UserError: {line}")
    assert first.startswith(f"PeerError: rank 1 failed: {line}")
    assert list((tmp_path / "0" / "run").iterdir()) == []


def test_ranks_with_other_chat_templates_meet_in_the_same_collectives(tmp_path: Path) -> None:
    """A template with a date takes a collective more, which must not meet another one."""
    dated = "{{ strftime_now('%d %b') }}" + CHATML

    def work(rank: int) -> str:
        distributed, config = Distributed(), tiny_config(tmp_path)
        tokenizer = byte_tokenizer(chat_template=dated if rank else CHATML)
        config = with_template_date(config, [tokenizer], distributed)
        return f"{distributed.gather_objects([rank])} {config.data.template_date}"

    outcomes = two_ranks(work, tmp_path)
    assert outcomes == [f"[0, 1] {date.today().isoformat()}"] * 2
