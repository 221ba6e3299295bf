"""Checkpoints as files: whole or not there, whatever happens; the damaged are never taken."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from marlhf.common.errors import UserError
from marlhf.runs import checkpoint


def write(root: Path, step: int, score: float | None = None) -> Path:
    partial = checkpoint.begin(root, step)
    (partial / "policy").mkdir()
    (partial / "policy" / "weights").write_bytes(bytes([step]) * 5000)
    (partial / "state").write_text(f"state {step}")
    return checkpoint.commit(partial, {"score": score}).path


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def fails(line: str) -> None:
    raise AssertionError(line)


def truncate(folder: Path) -> None:
    os.truncate(folder / "policy" / "weights", 4999)


def flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / "policy" / "weights").read_bytes())
    data[1234] ^= 4
    (folder / "policy" / "weights").write_bytes(data)


def flip_a_digit_of_the_manifest(folder: Path) -> None:
    manifest = folder / checkpoint.MANIFEST
    manifest.write_text(manifest.read_text().replace('"step": 2', '"step": 3'))


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncate, "policy/weights has 4999 bytes instead of 5000"),
    "a bit": (flip_a_bit, "policy/weights is not what was written: its SHA-256 differs"),
    "a file": (lambda f: (f / "state").unlink(), "state is missing"),
    "a folder": (lambda f: shutil.rmtree(f / "policy"), "policy/weights is missing"),
    "no manifest": (lambda f: (f / checkpoint.MANIFEST).unlink(), "manifest.json is missing"),
    "cut manifest": (lambda f: os.truncate(f / checkpoint.MANIFEST, 50), "cannot be read"),
    "empty manifest": (lambda f: os.truncate(f / checkpoint.MANIFEST, 0), "cannot be read"),
    "another manifest": (flip_a_digit_of_the_manifest, "manifest.json is not what was written"),
    "emptied": (lambda f: [shutil.rmtree(f), f.mkdir()][0], "manifest.json is missing"),
}


def test_the_latest_is_found_with_its_facts(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "none", fails) is None
    for step in (2, 10, 9):
        write(tmp_path, step, score=step / 2)
    found = checkpoint.latest(tmp_path, fails)
    assert found is not None
    assert (found.path, found.step, found.facts["score"]) == (tmp_path / "step-10", 10, 5.0)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_one_is_reported_and_the_one_before_used(damage: str, tmp_path: Path) -> None:
    write(tmp_path, 1)
    harm, fault = DAMAGE[damage]
    harm(write(tmp_path, 2))
    lines: list[str] = []
    found = checkpoint.latest(tmp_path, lines.append)
    assert found is not None
    assert found.step == 1
    assert len(lines) == 1
    assert f"{tmp_path / 'step-2'} is damaged" in lines[0]
    assert fault in lines[0]
    assert "\n" not in lines[0]


def test_when_all_are_damaged_nothing_begins_again_unasked(tmp_path: Path) -> None:
    for step in (1, 2):
        flip_a_bit(write(tmp_path, step))
    lines: list[str] = []
    with pytest.raises(UserError, match=r"all checkpoints in .* are damaged, step-2 as"):
        checkpoint.latest(tmp_path, lines.append)
    assert lines == []  # the error says it all


def test_what_was_never_finished_is_no_checkpoint_and_goes_away(tmp_path: Path) -> None:
    (checkpoint.begin(tmp_path, 3) / "weights").write_text("half")
    assert checkpoint.latest(tmp_path, fails) is None
    write(tmp_path, 2)
    assert names(tmp_path) == ["step-2"]


def test_a_step_can_be_written_again(tmp_path: Path) -> None:
    flip_a_bit(write(tmp_path, 1))
    write(tmp_path, 1)
    assert checkpoint.read(tmp_path / "step-1").step == 1
    assert names(tmp_path) == ["step-1"]


@pytest.mark.parametrize(
    ("keep", "keep_best", "kept"),
    [(1, False, [4]), (2, False, [3, 4]), (2, True, [2, 3, 4]), (1, True, [2, 4]), (9, True, None)],
)
def test_the_last_and_the_best_are_kept(
    keep: int, keep_best: bool, kept: list[int] | None, tmp_path: Path
) -> None:
    for step, score in enumerate([1.0, 7.0, None, -2.0], 1):
        write(tmp_path, step, score)
    checkpoint.prune(tmp_path, keep, keep_best)
    assert names(tmp_path) == [f"step-{step}" for step in kept or [1, 2, 3, 4]]


def test_what_comes_after_a_step_is_cut_off(tmp_path: Path) -> None:
    for step in (1, 2, 11):
        write(tmp_path, step)
    checkpoint.delete_after(tmp_path, 1)
    assert names(tmp_path) == ["step-1"]


def test_the_manifest_lists_every_file(tmp_path: Path) -> None:
    manifest = json.loads((write(tmp_path, 5) / checkpoint.MANIFEST).read_text())
    assert manifest["files"].keys() == {"policy/weights", "state"}
    assert manifest["files"]["policy/weights"]["bytes"] == 5000


def test_each_rank_digests_its_own_files_and_every_one_is_checked(tmp_path: Path) -> None:
    shards = [f"policy/engine/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1)]
    others = ["policy/engine/mp_rank_00_model_states.pt", "policy/learner.json", "rank_map.json"]
    files = {0: [shards[0], "rank-0.pt", *others], 1: [shards[1], "rank-1.pt"]}
    partial = checkpoint.begin(tmp_path, 4)
    (partial / "policy" / "engine").mkdir(parents=True)
    for name in [*files[0], *files[1]]:
        (partial / name).write_text(f"what {name} holds")
    parts = [checkpoint.digests(partial, rank, 2) for rank in (0, 1)]
    assert [sorted(part) for part in parts] == [sorted(files[0]), sorted(files[1])]

    whole = checkpoint.commit(partial, {}, {**parts[0], **parts[1]}).path
    assert checkpoint.read(whole).step == 4
    recorded = json.loads((whole / checkpoint.MANIFEST).read_text())["files"]
    for name in [*files[0], *files[1]]:
        contents = (whole / name).read_bytes()
        digest = hashlib.sha256(contents).hexdigest()
        assert recorded[name] == {"bytes": len(contents), "sha256": digest}
        (whole / name).write_bytes(contents.swapcase())
        with pytest.raises(checkpoint.DamagedError, match="its SHA-256 differs"):
            checkpoint.read(whole)
        (whole / name).write_bytes(contents)
