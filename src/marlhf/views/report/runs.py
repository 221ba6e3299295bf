"""Read runs from folders. Missing or broken parts are skipped and noted, never fatal."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from marlhf.common.errors import UserError, one_line
from marlhf.common.paths import local_path
from marlhf.runs.alarms import finite

MetricsRow = dict[str, Any]
_DEEPEST, _LARGEST = 50, 100_000  # levels and values of a configuration


@dataclass(frozen=True)
class Run:
    """The files of a run.

    name      its name in the report: the end of its path that distinguishes it from other runs
    config    its resolved configuration, empty if there is none
    rows      metrics in the order of updates, one row per update; values are as in the file
    samples   lines of samples.jsonl
    notes     notes for the reader on missing or broken parts
    arm       a sweep's name for its configuration
    """

    name: str
    path: Path
    config: dict[str, Any]
    rows: list[MetricsRow]
    samples: list[MetricsRow]
    notes: list[str] = field(default_factory=list)
    arm: str | None = None

    def values(self, key: str) -> dict[int, float]:
        """A metric by update, without values that are not finite numbers."""
        numbers = {row["step"]: _drawable(row.get(key)) for row in self.rows}
        return {update: value for update, value in numbers.items() if value is not None}

    def seconds(self) -> dict[int, float]:
        """Cumulative seconds at each update, without evaluations."""
        total, elapsed = 0.0, {}
        for row in self.rows:
            total += max(_drawable(row.get("step_seconds")) or 0.0, 0.0)
            elapsed[row["step"]] = total
        return elapsed

    def keys(self) -> set[str]:
        """Metrics that have a number at some update."""
        return {key for row in self.rows for key in row if _drawable(row[key]) is not None} - {
            "step"
        }

    @property
    def last_update(self) -> int:
        """The last update with a row; 0 without rows."""
        return self.rows[-1]["step"] if self.rows else 0


def _drawable(value: Any) -> float | None:
    """The value if it is a finite number in the range of fp32, else None."""
    number = finite(value)
    return number if number is not None and abs(number) < 3e38 else None


def read_runs(paths: Sequence[str]) -> list[Run]:
    """Read the runs in some folders: each a run or a sweep.

    Raises UserError for a folder that does not exist or holds no run.
    """
    folders: dict[Path, None] = {}
    for path in paths:
        folder = local_path(path, "report")
        if not folder.is_dir():
            fault = "is a file" if folder.exists() else "does not exist"
            raise UserError(f"report: given {path!r}, which {fault}; must be a run's output_dir")
        run_folders = list(_below(folder))
        if not run_folders:
            raise UserError(f"report: no run in {path!r}: no metrics.jsonl in it or below it")
        folders.update(dict.fromkeys(f.resolve() for f in run_folders))
    names = _short_names(list(folders))
    return [_read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def _below(folder: Path) -> Iterable[Path]:
    if (folder / "metrics.jsonl").is_file():
        return [folder]
    files = sorted(folder.rglob("metrics.jsonl"))
    return [f.parent for f in files if not any(p.startswith(".") for p in f.parts[1:])] or [
        f.parent for f in files
    ]


def _short_names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths, of equal length, that all differ."""
    parts = [folder.parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _read_run(folder: Path, name: str) -> Run:
    notes: list[str] = []
    rows = _by_update(_read_lines(folder / "metrics.jsonl", notes), notes)
    samples = _read_lines(folder / "samples.jsonl", notes)
    if not rows:
        notes.append("metrics.jsonl holds no metrics")
    config = _read_mapping(folder / "config.yaml", notes)
    if not config:
        notes.append("config.yaml is missing: the run is a group of its own")
    sweep = _read_mapping(folder / "sweep.yaml", notes).get("arm")
    return Run(
        name, folder, config, rows, samples, notes, sweep if isinstance(sweep, str) else None
    )


def _read_lines(path: Path, notes: list[str]) -> list[MetricsRow]:
    """Read JSON objects, one per line.

    Broken lines, such as the last one of a killed run, are skipped and counted in `notes`.
    """
    if not path.is_file():
        return []
    try:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            lines = list(file)  # not splitlines: a response may hold U+2028 and its like
    except OSError as error:
        notes.append(f"{path.name} cannot be read: {error.strerror}")
        return []
    rows, broken = [], 0
    for line in lines:
        try:
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            row = ()
        if isinstance(row, dict):
            rows.append(row)
        elif row is not None:
            broken += 1
    if broken:
        notes.append(f"{path.name}: {broken} broken line{'s' * (broken > 1)} left out")
    return rows


def _by_update(rows: Iterable[MetricsRow], notes: list[str]) -> list[MetricsRow]:
    """Rows sorted by update; rows of the same update are merged (the later wins)."""
    by_update: dict[int, MetricsRow] = {}
    lost = 0
    for row in rows:
        update = finite(row.get("step"))
        if update is None:
            lost += 1
            continue
        earlier = by_update.get(int(update), {})
        by_update[int(update)] = {**earlier, **row, "step": int(update)}
    if lost:
        notes.append(f"metrics.jsonl: {lost} row{'s' * (lost > 1)} without a step left out")
    return [by_update[update] for update in sorted(by_update)]


def _read_mapping(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        notes.append(f"{path.name} cannot be read: {one_line(error, 100)}")
        return {}
    if not _is_plain(value):
        notes.append(f"{path.name} is nested too deeply, or too large")
        return {}
    return value if isinstance(value, dict) else {}


def _is_plain(value: Any) -> bool:
    """Whether a value, with YAML aliases expanded, is small and shallow; cycles are neither."""
    waiting, count = [(value, 0)], 0
    while waiting:
        node, depth = waiting.pop()
        parts = [*node, *node.values()] if isinstance(node, dict) else node
        count += 1
        if depth > _DEEPEST or count > _LARGEST:
            return False
        if isinstance(parts, list | tuple | set):
            waiting += [(part, depth + 1) for part in parts]
    return True
