"""Atomic checkpoints on disk: a folder `step-N` is complete or absent.

A checkpoint is written in `step-N.partial`; `commit` adds a manifest with the size and SHA-256 of
every file (each rank's by `digests`), fsyncs all of it and renames the folder. A process may be
killed between any two instructions: earlier checkpoints stay complete. This module does not depend
on the contents of the files.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from marlhf.common.errors import UserError, one_line
from marlhf.common.paths import digest_of_file, text_file

MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d+)")
_RANK = re.compile(r"(?<![a-z])rank[-_](\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its folder, and the facts that `commit` recorded."""

    path: Path
    facts: Mapping[str, Any]

    @property
    def step(self) -> int:
        """Updates done when it was written."""
        return int(self.facts["step"])


class _Facts(BaseModel):
    """Facts in every manifest, and those that a training run adds."""

    model_config = ConfigDict(strict=True, extra="allow")

    step: int = Field(ge=0)
    score: float | None = None
    world_size: int = Field(default=1, ge=1)
    config: dict[str, Any] = Field(default_factory=dict)
    made_of: dict[str, dict[str, Any]] | None = None


class _File(BaseModel):
    model_config = ConfigDict(strict=True)

    bytes: int = Field(ge=0)
    sha256: str


class _Manifest(BaseModel):
    model_config = ConfigDict(strict=True)

    facts: _Facts
    files: dict[str, _File]
    sha256: str


class DamagedError(Exception):
    """A folder without a complete checkpoint; the message has the reason."""


def begin(root: Path, step: int) -> Path:
    """Create an empty folder for the checkpoint of a step, to pass to `commit`.

    Leftovers of unfinished attempts are deleted. Raises OSError.
    """
    for leftover in root.glob("step-*.partial"):
        delete(leftover)
    partial = root / f"step-{step}.partial"
    partial.mkdir(parents=True)
    return partial


def digests(partial: Path, rank: int = 0, world_size: int = 1) -> dict[str, Any]:
    """Fsync a rank's files; returns their sizes and SHA-256 by relative path.

    A rank's files have `rank-R` or `rank_R` in their name; the first rank has all others too. A
    single rank would need hours for all files, and its node may not have them in memory.
    Raises OSError.
    """
    files = [path for path in sorted(partial.rglob("*")) if path.is_file()]
    mine = [path for path in files if _rank_of(path.name, world_size) == rank]
    for path in mine:
        sync(path)
    return {
        str(path.relative_to(partial)): {
            "bytes": path.stat().st_size,
            "sha256": digest_of_file(path),
        }
        for path in mine
    }


def commit(
    partial: Path, facts: Mapping[str, Any], files: Mapping[str, Any] | None = None
) -> Checkpoint:
    """Turn a completely written folder into a checkpoint, atomically and durably.

    facts   plain data to keep in the manifest; `step` is added from the folder's name
    files   `digests` of all ranks; None for those of a single one
    An older checkpoint of the same step is replaced. Raises OSError.
    """
    final = partial.with_suffix("")
    facts = {"step": _step_of(final), **facts}
    files = digests(partial) if files is None else files
    contents = {"facts": facts, "files": dict(sorted(files.items()))}
    text = json.dumps({**contents, "sha256": _digest(contents)}, indent=1)
    (partial / MANIFEST).write_text(text + "\n", encoding="utf-8")
    replace(partial, final)
    return Checkpoint(final, facts)


def read(folder: Path) -> Checkpoint:
    """Read the checkpoint in a folder, after comparing every byte with the manifest.

    Raises DamagedError.
    """
    checkpoint, files = _manifest(folder)
    for name, entry in files.items():
        file = folder / name
        if not file.is_file():
            raise DamagedError(f"{name} is missing")
        if file.stat().st_size != entry.bytes:
            raise DamagedError(f"{name} has {file.stat().st_size} bytes instead of {entry.bytes}")
        if digest_of_file(file) != entry.sha256:
            raise DamagedError(f"{name} is not what was written: its SHA-256 differs")
    return checkpoint


def latest(
    root: Path,
    report: Callable[[str], None],
    key: str = "resume",
    hint: str = "; delete the folder to begin again",
) -> Checkpoint | None:
    """Find the newest complete checkpoint under `root`; None where none was ever completed.

    key, hint   begin and end of the message where all are damaged

    report(line) is called once if newer ones are damaged. Raises UserError where there are
    checkpoints and all are damaged: a run must not start over without being told to.
    """
    damaged: list[tuple[Path, str]] = []
    for folder in steps(root):
        outcome = _read_or_fault(folder)
        if isinstance(outcome, str):
            damaged.append((folder, outcome))
            continue
        if damaged:
            older = f"; so are {len(damaged) - 1} before it" if len(damaged) > 1 else ""
            newest, fault = damaged[0]
            report(f"checkpoint {newest} is damaged and passed over: {fault}{older}")
        return outcome
    if damaged:
        newest, fault = damaged[0]
        raise UserError(
            f"{key}: all checkpoints in {root} are damaged, {newest.name} as {fault}{hint}"
        )
    return None


def read_named(folder: Path, root: Path, key: str = "resume") -> Checkpoint:
    """Read the checkpoint in a folder that `key` names. Raises UserError, which lists `root`."""
    if not folder.is_dir() or not _NAME.fullmatch(folder.name):
        names = ", ".join(path.name for path in steps(root)) or "none"
        raise UserError(
            f"{key}: given {str(folder)!r}, must be auto or the folder of a checkpoint, step-N; "
            f"in {root}: {names}"
        )
    outcome = _read_or_fault(folder)
    if isinstance(outcome, str):
        raise UserError(f"{key}: checkpoint {folder} is damaged: {outcome}")
    return outcome


def _read_or_fault(folder: Path) -> Checkpoint | str:
    try:
        return read(folder)
    except (DamagedError, OSError) as error:
        return one_line(error)


def steps(root: Path) -> list[Path]:
    """Folders of completed checkpoints, newest first, damaged ones included."""
    folders = [p for p in root.glob("step-*") if p.is_dir() and _NAME.fullmatch(p.name)]
    return sorted(folders, key=_step_of, reverse=True)


def delete_after(root: Path, step: int) -> None:
    """Delete the checkpoints after a step: a run resumed from it writes them again.

    Raises OSError.
    """
    for folder in steps(root):
        if _step_of(folder) > step:
            remove(folder)


def prune(root: Path, keep: int, keep_best: bool) -> None:
    """Delete all but the last `keep` checkpoints and, with `keep_best`, the best one.

    The best has the highest fact `score`, the newest of equals. Raises OSError.
    """
    folders = steps(root)
    to_keep = set(folders[:keep])
    if keep_best and (best := _best(folders)) is not None:
        to_keep.add(best)
    for folder in folders:
        if folder not in to_keep:
            remove(folder)


def replace(partial: Path, final: Path) -> None:
    """Fsync a folder and rename it to `final`, replacing what has that name.

    Raises OSError.
    """
    for path in [*partial.rglob("*"), partial]:
        sync(path)
    remove(final)
    os.rename(partial, final)
    sync(final.parent)


def remove(folder: Path) -> None:
    """Delete a file or folder atomically, if it exists. Raises OSError.

    It is renamed first, so that a half-deleted checkpoint is not mistaken for a damaged one.
    """
    renamed = folder.with_name(f"{folder.name}.old.partial")
    delete(renamed)
    if os.path.lexists(folder):
        os.rename(folder, renamed)
        delete(renamed)


def delete(path: Path) -> None:
    """Delete a file, a folder with its contents, or a link, if it exists. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Fsync a file or folder, so that it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _best(folders: list[Path]) -> Path | None:
    scores = [(_score(folder), _step_of(folder), folder) for folder in folders]
    scored = [(score, step, folder) for score, step, folder in scores if score is not None]
    return max(scored)[2] if scored else None


def _score(folder: Path) -> float | None:
    try:
        score = _manifest(folder)[0].facts.get("score")
    except (DamagedError, OSError):
        return None
    return score if score is not None and math.isfinite(score) else None


def _manifest(folder: Path) -> tuple[Checkpoint, dict[str, _File]]:
    """Read and verify a folder's manifest. Raises DamagedError."""
    try:
        file = text_file(folder / MANIFEST, "resume")
        contents = json.loads(file.read_text(encoding="utf-8"))
        _Manifest.model_validate(contents)
        digest = contents.pop("sha256")
        is_intact = _digest(contents) == digest
    except FileNotFoundError:
        raise DamagedError(f"{MANIFEST} is missing") from None
    except ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"]))
        raise DamagedError(
            f"{MANIFEST} cannot be read: {key} is not what is written there"
        ) from None
    except (ValueError, RecursionError):
        raise DamagedError(f"{MANIFEST} cannot be read") from None
    if not is_intact:
        raise DamagedError(f"{MANIFEST} is not what was written: its SHA-256 differs")
    facts = contents["facts"]
    if facts["step"] != _step_of(folder):
        raise DamagedError(f"{MANIFEST} is of step {facts['step']}")
    files = {name: _File(**entry) for name, entry in contents["files"].items()}
    return Checkpoint(folder, facts), files


def _step_of(folder: Path) -> int:
    match = _NAME.fullmatch(folder.name)
    assert match is not None, f"{folder.name} must be called step-N"
    return int(match[1])


def _rank_of(name: str, world_size: int) -> int:
    """The rank in a file's name: `rank-1.pt`, DeepSpeed's `zero_pp_rank_1_mp_rank_00_...`."""
    match = _RANK.search(name)
    rank = 0 if match is None else int(match[1])
    return rank if rank < world_size else 0


def _digest(contents: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()
