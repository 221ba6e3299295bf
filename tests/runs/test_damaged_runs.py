"""Files of a run that somebody or something has spoilt: one line, and nothing good is lost."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.runs_that_die import in_child, train, trainer

from marlhf.common.errors import UserError
from marlhf.runs import checkpoint
from marlhf.runs.alarms import AlarmSink
from marlhf.runs.sinks import JsonLines, TensorBoard
from marlhf.views.report.runs import read_runs

DEEP = "[" * 100_000


def rows(*steps: int) -> list[str]:
    return [json.dumps({"step": step, "x": step / 2}) for step in steps]


@pytest.mark.parametrize(
    "bad",
    [
        '{"step": 4, "x": 2',
        DEEP,
        "[]",
        "7",
        "\0" * 30,
        '{"x": 1}',
        '{"step": "4"}',
        '{"step": [4]}',
        '{"step": true}',
        '{"step": NaN}',
        "\udcff\udcfe",
    ],
    ids=lambda text: ascii(text)[:14],
)
def test_a_bad_line_costs_that_line_alone(bad: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    text = "\n".join([*rows(0, 1, 2), bad, *rows(3, 4, 5, 6)]) + '\n{"step": 7, "x'
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    said: list[str] = []
    JsonLines.truncate(path, 5, said.append)
    assert path.read_text().splitlines() == rows(0, 1, 2, 3, 4, 5)
    moved = (tmp_path / "metrics.jsonl.bad").read_bytes()
    assert moved == bad.encode("utf-8", "surrogateescape") + b"\n"
    assert len(said) == 1
    assert "metrics.jsonl: line 4 is no record and moved to metrics.jsonl.bad" in said[0]


def test_rows_out_of_order_and_without_a_line_break_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join([*rows(0, 3, 1, 4), "", *rows(2)]))
    JsonLines.truncate(path, 2, pytest.fail)
    assert path.read_text() == "\n".join(rows(0, 1, 2)) + "\n"
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    """As an editor leaves it."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join([*rows(0, 1, 2), ""]), encoding="utf-8-sig")
    JsonLines.truncate(path, 1, pytest.fail)
    read_back = [json.dumps(dict(row)) for row in AlarmSink(path)._history]
    assert read_back == rows(0, 1)
    assert [json.dumps(row) for row in read_runs([str(tmp_path)])[0].rows] == rows(0, 1)


def test_events_after_a_broken_one_are_kept(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = TensorBoard(tmp_path)
    for step in range(6):
        writer.write({"step": step, "x": float(step)})
    writer.close()
    (file,) = tmp_path.iterdir()
    data, start, records = file.read_bytes(), 0, []
    while start < len(data):
        (length,) = struct.unpack("<Q", data[start : start + 8])
        records.append(data[start : start + length + 16])
        start += length + 16
    head, body = records[3][:12], b"\xff" * (len(records[3]) - 16)
    file.write_bytes(b"".join([*records[:3], head, body, records[3][-4:], *records[4:]]))
    TensorBoard.truncate(tmp_path, 4)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    kept = [event.step for event in events.Scalars("x")]
    assert kept == [0, 1, 3, 4]  # the version of the file is the first record
    file.write_bytes(file.read_bytes() + b"\xff" * 40)  # a length beyond all memory
    TensorBoard.truncate(tmp_path, 4)
    assert file.stat().st_size == sum(len(records[i]) for i in (0, 1, 2, 4, 5))


# --- manifests


def write(root: Path, step: int, **facts: Any) -> Path:
    partial = checkpoint.begin(root, step)
    (partial / "state").write_text(f"state {step}")
    return checkpoint.commit(partial, facts).path


def reseal(folder: Path, change: Any) -> None:
    """Change a manifest and seal it again, as somebody who means harm can."""
    file = folder / checkpoint.MANIFEST
    contents = json.loads(file.read_text())
    del contents["sha256"]
    change(contents)
    file.write_text(json.dumps({**contents, "sha256": checkpoint._digest(contents)}))


FORGED: dict[str, Any] = {
    "facts a list": lambda c: c.update(facts=[]),
    "files a list": lambda c: c.update(files=[]),
    "files a text": lambda c: c.update(files="state"),
    "an entry a list": lambda c: c["files"].update(state=[]),
    "bytes a text": lambda c: c["files"]["state"].update(bytes="7"),
    "sha256 a number": lambda c: c["files"]["state"].update(sha256=7),
    "score text": lambda c: c["facts"].update(score="best"),
    "score true": lambda c: c["facts"].update(score=True),
    "no ranks": lambda c: c["facts"].update(world_size=0),
    "ranks a text": lambda c: c["facts"].update(world_size="1"),
    "no step": lambda c: c["facts"].pop("step"),
    "step a text": lambda c: c["facts"].update(step="2"),
    "another step": lambda c: c["facts"].update(step=1),
    "config a list": lambda c: c["facts"].update(config=[]),
    "made of a list": lambda c: c["facts"].update(made_of=["a"]),
}


@pytest.mark.parametrize("forged", FORGED)
def test_a_forged_manifest_is_passed_over_in_one_line(forged: str, tmp_path: Path) -> None:
    write(tmp_path, 1, score=0.5, world_size=1)
    folder = write(tmp_path, 2, score=1.5, world_size=1)
    reseal(folder, FORGED[forged])
    said: list[str] = []
    found = checkpoint.latest(tmp_path, said.append)
    assert found is not None
    assert found.step == 1
    assert len(said) == 1
    assert f"checkpoint {folder} is damaged and passed over: manifest.json" in said[0]
    with pytest.raises(UserError, match=r"step-2 is damaged: manifest\.json"):
        checkpoint.read_named(folder, tmp_path)
    checkpoint.prune(tmp_path, 1, keep_best=True)  # its score counts for nothing
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-1", "step-2"]


def test_several_damaged_checkpoints_are_one_line(tmp_path: Path) -> None:
    for step in range(1, 5):
        (write(tmp_path, step) / checkpoint.MANIFEST).unlink()
    with pytest.raises(UserError, match=r"all checkpoints .* step-4 as manifest\.json is missing"):
        checkpoint.latest(tmp_path, pytest.fail)
    write(tmp_path, 1)
    said: list[str] = []
    assert checkpoint.latest(tmp_path, said.append) is not None
    (line,) = said
    assert line.endswith(
        "step-4 is damaged and passed over: manifest.json is missing; so are 2 before it"
    )


@pytest.mark.parametrize("text", [DEEP, '{"facts": ' + DEEP, "[]", "7", "null"])
def test_a_manifest_that_is_none_is_passed_over(text: str, tmp_path: Path) -> None:
    write(tmp_path, 1)
    (write(tmp_path, 2) / checkpoint.MANIFEST).write_text(text)
    found = checkpoint.latest(tmp_path, lambda line: None)
    assert found is not None
    assert found.step == 1


@pytest.mark.parametrize("what", ["file", "link", "folder"])
def test_whatever_has_the_name_of_a_checkpoint_to_come_gives_way(what: str, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").write_text("kept")
    for name in ("step-2", "step-2.partial", "step-3.partial", "step-2.old.partial"):
        path = tmp_path / "run" / name
        path.parent.mkdir(exist_ok=True)
        if what == "file":
            path.write_text("a file")
        elif what == "link":
            path.symlink_to(tmp_path / "elsewhere")
        else:
            path.mkdir()
    write(tmp_path / "run", 2)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["step-2"]
    assert checkpoint.read(tmp_path / "run" / "step-2").step == 2
    assert (tmp_path / "elsewhere" / "kept").read_text() == "kept"


# --- state


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose parts all have a state; its checkpoint is of step 2."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert in_child(lambda: train(folder, steps=2, segmenter=PHRASES)) == 0
    return folder


PHRASES = {"name": "phrases"}
RANK, OPTIMIZER = "rank-0.pt", "policy/optimizer.pt"


class Blocked:
    """No plain data."""


def moments(state: Any) -> Any:
    return state["optimizer"]["state"][0]


def strided(state: Any) -> None:
    shape = moments(state)["exp_avg"].shape
    moments(state)["exp_avg"] = torch.zeros(1).expand(shape)  # one number under many names


SPOILT: dict[str, tuple[str, Any]] = {
    "a moment cut": (OPTIMIZER, lambda s: moments(s).update(exp_avg=torch.zeros(1))),
    "all moments cut": (
        OPTIMIZER,
        lambda s: [m.update(exp_avg_sq=torch.zeros(2)) for m in s["optimizer"]["state"].values()],
    ),
    "a moment empty": (OPTIMIZER, lambda s: moments(s).update(exp_avg=torch.zeros(0))),
    "a moment missing": (OPTIMIZER, lambda s: moments(s).pop("exp_avg_sq")),
    "a moment a list": (OPTIMIZER, lambda s: moments(s).update(exp_avg=[0.0])),
    "a moment sparse": (
        OPTIMIZER,
        lambda s: moments(s).update(exp_avg=torch.zeros(3, 4).to_sparse()),
    ),
    "steps many": (OPTIMIZER, lambda s: moments(s).update(step=torch.ones(5))),
    "of another parameter": (OPTIMIZER, lambda s: s["optimizer"]["state"].update({999: {}})),
    "no groups": (OPTIMIZER, lambda s: s["optimizer"].pop("param_groups")),
    "groups a number": (OPTIMIZER, lambda s: s["optimizer"].update(param_groups=3)),
    "optimiser a list": (OPTIMIZER, lambda s: s.update(optimizer=[])),
    "optimiser's pickle": (OPTIMIZER, lambda s: s.update(x=Blocked())),
    "rank a list": (RANK, lambda s: [1]),
    "rank's pickle": (RANK, lambda s: s.update(x=Blocked())),
    "no parts": (RANK, lambda s: s.pop("parts")),
    "parts a list": (RANK, lambda s: s.update(parts=[])),
    "no kl": (RANK, lambda s: s["parts"].pop("kl")),
    "kl a text": (RANK, lambda s: s["parts"]["kl"].update(coef="much")),
    "kl NaN": (RANK, lambda s: s["parts"]["kl"].update(coef=float("nan"))),
    "phrases numbers": (RANK, lambda s: s["parts"]["segmenter"].update(phrases=[1], use=[1.0])),
    "curiosity": (
        RANK,
        lambda s: s["parts"]["token reward curiosity"].update(moments=torch.zeros(9)),
    ),
    "no generators": (RANK, lambda s: s.pop("generators")),
    "generators a list": (RANK, lambda s: s.update(generators=[1])),
    "python's generator": (RANK, lambda s: s["generators"].update(python=(3, (1,), None))),
    "numpy's generator": (RANK, lambda s: s["generators"]["numpy"].__setitem__(2, 10**8)),
    "torch's generator": (RANK, lambda s: s["generators"].update(torch=torch.zeros(5))),
}


def spoil(folder: Path, name: str, change: Any) -> None:
    state = torch.load(folder / name, weights_only=True)
    changed = change(state)
    torch.save(changed if changed == [1] else state, folder / name)
    seal(folder, name)


def seal(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    reseal(folder, lambda contents: contents["files"].update({name: entry}))


def resume_of(finished: Path, tmp_path: Path) -> tuple[Path, Any]:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    return run / "checkpoints" / "step-2", lambda: trainer(run, steps=3, segmenter=PHRASES)


@pytest.mark.parametrize("spoilt", SPOILT)
def test_state_that_does_not_fit_is_refused_in_one_line(
    spoilt: str, finished: Path, tmp_path: Path
) -> None:
    folder, resumed = resume_of(finished, tmp_path)
    name, change = SPOILT[spoilt]
    spoil(folder, name, change)
    with pytest.raises(UserError, match=r"step-2 does not fit this run: (rank-0\.pt|policy)") as e:
        resumed()
    assert "\n" not in str(e.value)
    assert "weights_only" not in str(e.value)


@pytest.mark.parametrize("text", ["[]", "7", "{}", DEEP, '{"layout": 3}', "nonsense"])
def test_a_learner_that_is_none_is_refused(text: str, finished: Path, tmp_path: Path) -> None:
    folder, resumed = resume_of(finished, tmp_path)
    (folder / "critic" / "learner.json").write_text(text)
    seal(folder, "critic/learner.json")
    with pytest.raises(UserError, match=r"does not fit this run: critic: learner\.json"):
        resumed()


@pytest.mark.parametrize("change", ["cut", "one more", "one less"])
def test_weights_of_another_model_are_refused(change: str, finished: Path, tmp_path: Path) -> None:
    folder, resumed = resume_of(finished, tmp_path)
    file = folder / "policy" / "weights.safetensors"
    weights = load_file(file)
    name = next(n for n, w in weights.items() if w.ndim == 2)
    if change == "cut":
        weights[name] = weights[name][:1].clone()  # `copy_` would repeat it
    elif change == "one more":
        weights["another"] = torch.zeros(2)
    else:
        del weights[name]
    save_file(weights, file)
    seal(folder, "policy/weights.safetensors")
    with pytest.raises(UserError, match="does not fit this run: policy: "):
        resumed()


def test_moments_that_overlap_and_settings_of_others_are_not_taken_over(
    finished: Path, tmp_path: Path
) -> None:
    folder, resumed = resume_of(finished, tmp_path)

    def change(state: Any) -> None:
        strided(state)
        del state["names"]  # which earlier versions did not write
        state["optimizer"]["param_groups"][0].update(amsgrad=True, betas="ab", lr=7.0)

    spoil(folder, OPTIMIZER, change)
    optimizer = resumed().policy.optimizer
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)
    assert not optimizer.param_groups[0]["amsgrad"]
    assert optimizer.param_groups[0]["lr"] < 1
    for parameter, state in optimizer.state.items():
        assert state["exp_avg"].stride() == parameter.stride()


def test_what_differed_from_rank_to_rank_is_named_on_other_ranks(
    finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, resumed = resume_of(finished, tmp_path)
    state = torch.load(folder / RANK, weights_only=True)
    state["parts"]["token reward curiosity"]["moments"] += 1
    torch.save(state, folder / "rank-1.pt")
    seal(folder, "rank-1.pt")
    reseal(folder, lambda contents: contents["facts"].update(world_size=2))
    resumed()
    line = capfd.readouterr().err
    assert (
        "; token reward curiosity differed from rank to rank: rank R resumes from that of" in line
    )
    assert line.count("differed from rank to rank") == 1


@pytest.mark.parametrize("kind", ["pipe", "folder", "loop", "socket"])
@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "config.yaml", "final.partial"])
def test_what_is_no_file_is_refused_before_it_is_written(
    name: str, kind: str, finished: Path, tmp_path: Path
) -> None:
    """Opening a pipe would wait for a reader that never comes."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    path = folder / name
    path.unlink(missing_ok=True)
    put(path, "file" if (kind, name) == ("folder", "final.partial") else kind)
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError, match=f"output_dir: .*{name}' is not a f.*; move it away"):
        trainer(folder, steps=3, segmenter=PHRASES)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("kind", ["pipe", "loop"])
def test_a_manifest_that_is_no_file_is_passed_over(kind: str, tmp_path: Path) -> None:
    write(tmp_path, 1)
    manifest = write(tmp_path, 2) / "manifest.json"
    manifest.unlink()
    put(manifest, kind)
    said: list[str] = []
    found = checkpoint.latest(tmp_path, said.append)
    assert found is not None
    assert found.step == 1
    assert len(said) == 1


def put(path: Path, kind: str) -> None:
    """A thing of another kind in the place of a file."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "file":
        path.write_text("")
    elif kind == "loop":
        path.symlink_to(path.name)
    else:
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(os.path.relpath(path))  # an address has 107 bytes at most
