"""Disks that fill for real, folders that are closed, and two processes in one folder: one line,
status 2, and the same command goes on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.disks import fill, free, mounted
from support.evaluations import build_models, config_for
from support.runs_that_die import contents, in_child, train, trainer
from support.tiny_models import BYTES_VOCAB, byte_tokenizer, tiny_causal_lm

from marlhf.cli import main
from marlhf.commands import merge, sweep
from marlhf.common.errors import UserError
from marlhf.config import RaterSettings
from marlhf.config.loading import config_to_dict
from marlhf.evaluation import job
from marlhf.evaluation.judge import ResponsePair
from marlhf.evaluation.raters import write_file
from marlhf.models import loading, saving
from marlhf.runs import directory
from marlhf.training.learner import DivergedError, keeping_batch

FULL = "the disk is full"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """4 MB that are a file system of their own."""
    folder = tmp_path / "disk"
    if not mounted(folder):
        pytest.skip("this process may not mount a disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=False)


def written(folder: Path, models: Path, **changes: Any) -> str:
    """The configuration of a tiny evaluation into `folder`, as a file beside it."""
    plain = config_to_dict(config_for(models, output_dir=str(folder), **changes))
    file = folder.parent / f"{folder.name}.yaml"
    file.write_text(yaml.safe_dump(plain))
    return str(file)


def refused(capfd: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line by which the command line ends with status 2."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as end:
        main(words)
    error = capfd.readouterr().err
    assert end.value.code == 2, error
    assert "Traceback" not in error
    lines = [line for line in error.splitlines() if line.startswith("marlhf: ")]
    assert len(lines) == 1, error
    return lines[0]


@pytest.fixture(scope="module")
def undisturbed(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of that evaluation where there is room."""
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    keys = {"reference": str(models / "b"), "raters": {"format": "csv"}}
    main(["evaluate", written(folder, models, **keys)])
    return folder


ROOMS = (0, 4, 8, 12, 16, 20, 28)  # kB


@pytest.mark.parametrize("room", ROOMS)
def test_an_evaluation_on_a_full_disk_goes_on_as_if_it_had_not_been(
    room: int,
    disk: Path,
    models: Path,
    undisturbed: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    keys = {"reference": str(models / "b"), "raters": {"format": "csv"}}
    out = disk / "out"
    config = written(out, models, **keys)
    fill(disk, room * 1024)
    line = refused(capfd, "evaluate", config)
    assert line.startswith("marlhf: output_dir: cannot write")
    assert FULL in line or "No space left" in line
    assert not list(out.rglob("*.partial"))
    for name in ("samples.jsonl", "measures.jsonl"):
        text = (out / name).read_text() if (out / name).exists() else ""
        assert text.endswith("\n") or not text, "half of a line"
        assert text.count("\n") % 12 in (0, 5, 10), "half of a batch: they are of 5, 5 and 2"
    free(disk)
    main(["evaluate", config])
    for name in ("samples.jsonl", "measures.jsonl", "raters.csv", "raters_key.jsonl"):
        assert (out / name).read_bytes() == (undisturbed / name).read_bytes(), name
    assert json.loads((out / "results.json").read_text()) == json.loads(
        (undisturbed / "results.json").read_text()
    )


def test_the_raters_files_are_whole_or_not_there(disk: Path) -> None:
    pairs = [ResponsePair("a", row, "prompt", f"ours {row}", f"theirs {row}") for row in range(90)]
    fill(disk, 8 * 1024)  # for one of the two files
    with pytest.raises(UserError, match=FULL):
        write_file(pairs, RaterSettings(), disk, seed=1)
    key = disk / "raters_key.jsonl"
    assert not (disk / "raters.csv").exists()
    assert not key.exists() or key.read_text().count("\n") == 90
    free(disk)
    assert write_file(pairs, RaterSettings(), disk, seed=1).read_text().count("\n") == 91
    assert key.read_text().count("\n") == 90


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "PATIENCE", 0.2)


def test_two_evaluations_in_one_folder_are_not_let_in(
    models: Path, tmp_path: Path, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(models, output_dir=str(tmp_path / "out"))
    said, real = tmp_path / "said", job.apply_measure

    def second() -> None:
        try:
            job.evaluate(config)
        except UserError as error:
            said.write_text(str(error))
            raise SystemExit(2) from None

    def with_company(*given: Any) -> None:
        monkeypatch.setattr(job, "apply_measure", real)
        assert in_child(second) == 2
        real(*given)

    monkeypatch.setattr(job, "apply_measure", with_company)
    job.evaluate(config)
    assert "output_dir: another process is writing in" in said.read_text()
    assert str(tmp_path / "out") in said.read_text()
    assert len((tmp_path / "out/samples.jsonl").read_text().splitlines()) == 24
    job.evaluate(config)  # the folder is free again


def test_two_sweeps_in_one_folder_are_not_let_in(
    tmp_path: Path, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "base.yaml").write_text("model: {path: some/model}\nsteps: 1\n")
    config = sweep.SweepConfig(config=str(tmp_path / "base.yaml"), output_dir=str(tmp_path / "out"))

    def second(*given: Any) -> list[Any]:
        monkeypatch.setattr(sweep, "_run_all", lambda *given: [])
        assert in_child(lambda: sweep.run(config)) == 1
        return []

    monkeypatch.setattr(sweep, "_run_all", second)
    sweep.run(config)
    sweep.run(config)


def test_a_sweep_on_a_full_disk_leaves_no_process_behind(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """The second run finds no room for its state while the first one is at work."""
    (tmp_path / "base.yaml").write_text("model: {path: some/model}\nsteps: 1\n")
    out = disk / "out"
    (tmp_path / "sweep.yaml").write_text(
        f"config: {tmp_path / 'base.yaml'}\noutput_dir: {out}\nseeds: [0, 1]\nparallel: 2\n"
    )
    started: list[int] = []
    real = sweep._start

    def start(*given: Any) -> Any:
        if started:
            fill(disk)
        one = real(*given)
        assert one is not None
        started.append(one.process.pid)
        return one

    monkeypatch.setattr(sweep, "_start", start)
    monkeypatch.setattr(sweep, "_command", lambda *_: ["sleep", "300"])
    line = refused(capfd, "sweep", str(tmp_path / "sweep.yaml"))
    assert FULL in line
    assert len(started) == 1
    with pytest.raises(ProcessLookupError):
        os.kill(started[0], 0)


@pytest.fixture
def filled_at(disk: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes a function find so many bytes of room."""

    def arrange(owner: Any, name: str, room: int) -> None:
        real = getattr(owner, name)

        def wrapped(*given: Any, **more: Any) -> Any:
            fill(disk, room)
            return real(*given, **more)

        monkeypatch.setattr(owner, name, wrapped)

    return arrange


def size_of(folder: Path, *names: str) -> int:
    return sum(file.stat().st_size for name in names for file in folder.glob(name))


def test_a_disk_that_fills_within_the_final_model(
    disk: Path, tmp_path: Path, filled_at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Config, weights and tokenizer are written by three libraries, each with words of its own."""
    train(tmp_path / "alone")
    final = tmp_path / "alone/final"
    weights = size_of(final, "*.safetensors", "*config.json")
    rooms = {"config": 0, "weights": weights // 2, "tokenizer": weights + 3 * 4096}
    for place, room in rooms.items():
        with monkeypatch.context():
            made = trainer(disk / place, steps=2, checkpoint={"every": 1, "keep": 1})
            real = saving.save_policy
            filled_at(saving, "save_policy", room)
            with pytest.raises(UserError, match=FULL) as raised:
                made.train()
            assert "resume=auto" in str(raised.value), place
            monkeypatch.setattr(saving, "save_policy", real)
        free(disk)
        train(disk / place, steps=2, checkpoint={"every": 1, "keep": 1})
        assert (disk / place / "final/tokenizer.json").stat().st_size
        shutil.rmtree(disk / place)


def test_events_that_find_no_room(
    disk: Path,
    filled_at: Any,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """TensorBoard writes in a thread of its own, whose traceback nobody needs."""
    from marlhf.runs.sinks import TensorBoard

    monkeypatch.setattr(threading, "excepthook", None)
    with pytest.raises(SystemExit):
        main([])
    made = trainer(disk / "run", steps=3, checkpoint={"every": 1, "keep": 1})
    filled_at(TensorBoard, "write", 0)
    capfd.readouterr()
    with pytest.raises(UserError, match=FULL):
        made.train()
    assert capfd.readouterr().err == ""


def test_a_batch_that_cannot_be_kept_does_not_hide_why_it_should_be(disk: Path) -> None:
    class Batch:
        def tensors(self) -> dict[str, torch.Tensor]:
            return {"x": torch.zeros(9000)}

    fill(disk)
    file = disk / "diverged.pt"
    error = DivergedError("the loss is NaN", [Batch()])  # pyright: ignore[reportArgumentType]
    lost = r"the loss is NaN; its batch is lost: it cannot"
    with pytest.raises(DivergedError, match=lost), keeping_batch(file):
        raise error
    assert not file.exists()
    free(disk)
    with pytest.raises(DivergedError, match=r"its batch is in .*diverged.pt"), keeping_batch(file):
        raise error
    assert len(torch.load(file)[0]["x"]) == 9000


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter and its base."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("adapter")
    model = tiny_causal_lm("llama", BYTES_VOCAB)
    for save in (model.save_pretrained, byte_tokenizer().save_pretrained):
        save(str(folder / "base"))
    tuned = get_peft_model(
        loading.AutoModelForCausalLM.from_pretrained(folder / "base"),
        LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]),
    )
    tuned.save_pretrained(folder / "adapter")
    return folder


@pytest.mark.parametrize("room", [0, 40_000])
def test_a_merge_on_a_full_disk_can_be_repeated(
    room: int, disk: Path, adapter: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ("merge", str(adapter / "adapter"), str(disk / "out"))
    fill(disk, room)
    line = refused(capfd, *words)
    assert line.startswith("marlhf: out: cannot write")
    assert [p.name for p in disk.iterdir()] == ["filler"]
    free(disk)
    main(words)
    assert [p.name for p in disk.iterdir()] == ["out"]


def test_two_merges_into_one_folder_are_not_let_in(
    adapter: Path, tmp_path: Path, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from marlhf.runs import checkpoint

    real = checkpoint.replace

    def merge_again() -> None:
        merge.merge(str(adapter / "adapter"), tmp_path / "out")

    def with_company(*given: Any) -> None:
        monkeypatch.setattr(checkpoint, "replace", real)
        assert in_child(merge_again) == 1
        real(*given)

    monkeypatch.setattr(checkpoint, "replace", with_company)
    merge_again()
    with pytest.raises(UserError, match="exists already"):
        merge_again()


def test_reports_and_pages_that_find_no_room(
    disk: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    rows = [{"step": s, "score_mean": 0.1 * s, "kl_mean": 0.2} for s in range(5)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = disk / "report"
    for room in (0, 60_000):  # for nothing, and for the page but not its pictures
        fill(disk, room)
        line = refused(capfd, "report", str(run), "--output", str(page))
        assert line.startswith("marlhf: --output: cannot write")
        assert "None" not in line
        free(disk)
    main(["report", str(run), "--output", str(page)])
    assert "</html>" in (page / "report.html").read_text()


def test_what_is_kept_of_a_run_that_ends_on_a_full_disk(disk: Path, tmp_path: Path) -> None:
    """A resume on a disk without room does not spoil the configuration that is there."""
    train(tmp_path / "alone", steps=3)
    train(disk / "run", steps=2)
    before = (disk / "run/config.yaml").read_bytes()
    fill(disk)
    with pytest.raises(UserError):
        train(disk / "run", steps=3)
    assert (disk / "run/config.yaml").read_bytes() == before
    free(disk)
    train(disk / "run", steps=3)
    assert len(contents(disk / "run")["metrics"]) == len(contents(tmp_path / "alone")["metrics"])
