"""A run knows what it was made of: a resume on other data, weights or code is refused by name."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support.runs_that_die import in_child
from support.tiny_models import (
    BYTES_VOCAB,
    CHATML,
    byte_tokenizer,
    tiny_causal_lm,
    tiny_sequence_classifier,
)
from test_damaged_runs import reseal

from marlhf.common.errors import UserError
from marlhf.config import PPOConfig, RewardConfig, SFTConfig
from marlhf.config.loading import config_from_dict, merge
from marlhf.data.rows import fact_of
from marlhf.evaluation.records import identity
from marlhf.training import reward_model, sft
from marlhf.training.ppo import PPOTrainer

CODE = "def score(prompts, completions):\n    return [float(len(text)) for text in completions]\n"
SMALL: dict[str, Any] = {
    "output_dir": "run",
    "resume": "auto",
    "checkpoint": {"every": 1},
    "log": {"tensorboard": False, "progress": False, "eval_every": 0},
    "model": {"path": "start"},
    "data": {"path": "data.jsonl", "eval_path": "eval.jsonl"},
}
PPO: dict[str, Any] = {
    "steps": 1,
    "reward": {"models": ["scores_of_ours.score", "rm"]},
    "critic": {"path": "critic"},
    "ptx": {"path": "texts.jsonl", "batch_size": 2, "max_length": 20},
    "rollout": {"batch_size": 4, "max_new_tokens": 4, "max_prompt_length": 9},
}
ROW = {"prompt": "ab", "completion": "cd", "text": "efg", "chosen": "yes", "rejected": "no"}
ROWS = [{k: f"{v}{i}" for k, v in ROW.items()} for i in range(8)]


def write_rows(path: str, rows: list[dict[str, Any]]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_ppo(**changes: Any) -> None:
    sys.modules.pop("scores_of_ours", None)
    importlib.invalidate_caches()
    PPOTrainer(config_from_dict(PPOConfig, merge(merge(SMALL, PPO), changes))).train()


def run_sft(**changes: Any) -> None:
    sft.run(
        config_from_dict(
            SFTConfig, merge({**SMALL, "batch_size": 4, "epochs": 0.5, "max_length": 99}, changes)
        )
    )


def run_reward(**changes: Any) -> None:
    values = merge({**SMALL, "batch_size": 4, "epochs": 0.5, "max_length": 99}, changes)
    values = merge(values, {"data": {"demonstrations_path": "shown.jsonl"}})
    reward_model.run(config_from_dict(RewardConfig, values))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, data, code, and a finished run of each job, in `ppo`, `sft` and `reward`."""
    folder = tmp_path_factory.mktemp("world")
    before = os.getcwd()
    os.chdir(folder)
    sys.path.insert(0, "")
    try:
        tokenizer = byte_tokenizer(add_bos=True, chat_template=CHATML)
        for name in ("start", "rm", "critic"):
            make = tiny_causal_lm if name == "start" else tiny_sequence_classifier
            make("llama", BYTES_VOCAB).save_pretrained(name)
            tokenizer.save_pretrained(name)
        for name in ("data", "eval", "texts", "shown"):
            write_rows(f"{name}.jsonl", ROWS)
        Path("scores_of_ours.py").write_text(CODE)
        for name, run in JOBS.items():
            assert in_child(lambda run=run, name=name: run(output_dir=name)) == 0, name
        yield folder  # type: ignore[misc]
    finally:
        sys.path.remove("")
        os.chdir(before)


JOBS: dict[str, Callable[..., None]] = {"ppo": run_ppo, "sft": run_sft, "reward": run_reward}


@pytest.fixture
def here(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(world, tmp_path / "w")  # with other times and inodes: a run that was moved
    monkeypatch.chdir(tmp_path / "w")
    return tmp_path / "w"


def other_row() -> None:
    write_rows("data.jsonl", [*ROWS[:3], {k: v + "!" for k, v in ROWS[3].items()}, *ROWS[4:]])


def one_number(folder: str) -> Callable[[], None]:
    """A single weight moved, size and time of the file as they were."""

    def change() -> None:
        file = Path(folder) / "model.safetensors"
        weights, about = load_file(file), file.stat()
        name = sorted(weights)[0]
        weights[name].view(-1)[5] += 0.5
        save_file(weights, file, {"format": "pt"})
        assert file.stat().st_size == about.st_size
        os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))

    return change


def template() -> None:
    Path("start/chat_template.jinja").write_text(CHATML + " ")


def row_of(name: str) -> Callable[[], None]:
    return lambda: write_rows(f"{name}.jsonl", [*ROWS[:-1], {k: v + "!" for k, v in ROW.items()}])


CHANGES: dict[str, tuple[list[str], Callable[[], Any], str]] = {
    "a row": ([*JOBS], other_row, r"data\.path 'data\.jsonl' \(rows\)"),
    "fewer rows": (
        [*JOBS],
        lambda: write_rows("data.jsonl", ROWS[:6]),
        r"data\.path 'data\.jsonl'",
    ),
    "a row held out": ([*JOBS], row_of("eval"), r"data\.eval_path 'eval\.jsonl' \(rows\)"),
    "weights": ([*JOBS], one_number("start"), r"model\.path 'start' \(model\.safetensors\)"),
    "template": ([*JOBS], template, r"model\.path 'start' \(chat_template\.jinja\)"),
    "reward model": (["ppo"], one_number("rm"), r"reward\.models\.1 'rm' \(model\.saf"),
    "critic": (["ppo"], one_number("critic"), r"critic\.path 'critic' \(model\.saf"),
    "texts": (["ppo"], row_of("texts"), r"ptx\.path 'texts\.jsonl' \(rows\)"),
    "code": (
        ["ppo"],
        lambda: Path("scores_of_ours.py").write_text(CODE + "\n"),
        r"reward\.models\.0 'scores_of_ours\.score' \(scores_of_ours\.py\)",
    ),
    "shown": (["reward"], row_of("shown"), r"data\.demonstrations_path 'shown\.jsonl' \(rows\)"),
}


@pytest.mark.parametrize(
    ("change", "job"), [(change, job) for change, (jobs, *_) in CHANGES.items() for job in jobs]
)
def test_a_resume_on_something_else_is_refused_by_name(
    change: str, job: str, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _, arrange, names = CHANGES[change]
    arrange()
    was = (here / job / "metrics.jsonl").read_bytes()
    with pytest.raises(
        UserError, match=rf"step-\d these have changed: {names}.*resume_changed=true"
    ) as e:
        JOBS[job](output_dir=job)
    assert "\n" not in str(e.value)
    assert (here / job / "metrics.jsonl").read_bytes() == was
    if change in ("a row", "weights"):
        JOBS[job](output_dir=job, resume_changed=True)
        said = capfd.readouterr().err
        assert "resume_changed: resuming although these have changed" in said


@pytest.mark.parametrize("job", JOBS)
def test_what_was_only_moved_goes_on(
    job: str, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (here / "start" / "README.md").write_text("what nobody reads")
    rows = [dict(reversed(list(row.items()))) for row in ROWS]
    write_rows("data.jsonl", rows)
    JOBS[job](output_dir=job)
    assert "changed" not in capfd.readouterr().err


def test_checkpoints_of_before_go_on_and_say_so(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder,) = (here / "sft" / "checkpoints").iterdir()
    reseal(folder, lambda contents: contents["facts"].pop("made_of"))
    other_row()
    run_sft(output_dir="sft")
    assert "has no digests of the run's inputs" in capfd.readouterr().err


def test_the_base_of_an_adapter_counts(here: Path) -> None:
    base: Any = tiny_sequence_classifier("llama", BYTES_VOCAB)
    base.save_pretrained("base")
    adapted = get_peft_model(base, LoraConfig(task_type="SEQ_CLS"))  # type: ignore[arg-type]
    adapted.peft_config["default"].base_model_name_or_path = "base"
    adapted.save_pretrained("adapter")
    base.config.save_pretrained("adapter")
    byte_tokenizer(add_bos=True).save_pretrained("adapter")
    changes: dict[str, Any] = {"reward": {"models": "adapter"}}
    before = identity("adapter")
    run_ppo(output_dir="new", **changes)
    one_number("base")()
    with pytest.raises(UserError, match=r"reward\.models 'adapter' \(base: model\.safetensors\)"):
        run_ppo(output_dir="new", **changes)
    os.utime("base/model.safetensors")
    assert identity("adapter") != before


def test_rows_are_told_apart_by_content_and_order() -> None:
    rows = [{"a": 1, "b": "x"}, {"a": None, "b": b"\xff"}]
    digest = fact_of(rows)
    assert digest == fact_of([dict(reversed(list(row.items()))) for row in rows])
    assert digest != fact_of(rows[::-1])
    assert digest != fact_of([rows[0]])
    assert fact_of([["ab", "c"]]) != fact_of([["a", "bc"]])
    assert fact_of([object()]) == fact_of([object()])  # no addresses in it


def test_only_what_makes_a_model_tells_it_from_another(world: Path) -> None:
    folder = world / "critic"
    before = identity(str(folder))
    for name in ("report.html", "README.md", "training_args.bin", "optimizer.pt", "notes.txt"):
        (folder / name).write_text("new")
    assert identity(str(folder)) == before
    torch.save({}, folder / "pytorch_model.bin")  # beside safetensors nobody reads it
    assert identity(str(folder)) == before
    (folder / "chat_template.jinja").write_text("new")
    assert identity(str(folder)) != before
