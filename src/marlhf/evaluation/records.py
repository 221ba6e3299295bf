"""Append-only JSONL files with keys; an interrupted evaluation resumes from them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from marlhf.common.errors import UserError, one_line
from marlhf.common.paths import writing
from marlhf.runs.directory import notice
from marlhf.runs.json_lines import tidy
from marlhf.runs.provenance import base_of, commit_of, model_files

JsonLine = dict[str, Any]
Key = tuple[Any, ...]
RESUME_HINT = "; complete records are kept: run the same command again to resume"


class Sample(BaseModel):
    """A response of samples.jsonl, in addition to its key."""

    model_config = ConfigDict(strict=True)

    row: NonNegativeInt
    sample: NonNegativeInt
    response: str
    tokens: list[NonNegativeInt]
    finished: bool
    logprob: float
    fingerprint: str


class Measured(BaseModel):
    """A number of measures.jsonl, in addition to its key."""

    model_config = ConfigDict(strict=True)

    value: float | None
    fingerprint: str


class Judged(BaseModel):
    """An answer of a judge, in addition to its key."""

    model_config = ConfigDict(strict=True)

    verdict: Literal["A", "B", "tie"] | None
    asked: int
    tokens_in: int
    tokens_out: int


class Records:
    """Lines of a JSONL file by key; the last line of a key counts.

    Every rank holds all lines; the main rank writes them. An incomplete last line is dropped and
    overwritten; any other line that is no record is moved to `NAME.bad`.

    key      fields that make the key
    schema   what a line must hold in addition

    Raises UserError.
    """

    def __init__(
        self,
        path: Path,
        key: Sequence[str],
        distributed: Any = None,
        schema: type[BaseModel] | None = None,
    ) -> None:
        self.path = path
        self._names = tuple(key)
        self._distributed = distributed
        self._is_main = distributed is None or distributed.is_main
        lines = read_lines(path, self._names, schema) if self._is_main else []
        self.lines: dict[Key, JsonLine] = {self.key(line): line for line in self._shared(lines)}

    def key(self, line: Mapping[str, Any]) -> Key:
        """The key of a line."""
        return tuple(line[name] for name in self._names)

    def append(self, lines: Iterable[JsonLine]) -> None:
        """Add lines, written before this returns. Every rank calls it, with lines of its own.

        Batches are atomic: if the disk is full, none of the lines is written. Raises UserError.
        """
        new = self._shared(list(lines))
        if self._distributed is None:
            self._write(new)
        else:
            self._distributed.fail_together(lambda: self._write(new))
        self.lines.update((self.key(line), line) for line in new)

    def _write(self, lines: list[JsonLine]) -> None:
        if self._is_main and lines:
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            with writing("output_dir", self.path.parent, RESUME_HINT):
                _append(self.path, text.encode("utf-8"))

    def _shared(self, lines: list[JsonLine]) -> list[JsonLine]:
        return lines if self._distributed is None else self._distributed.gather_objects(lines)


def _append(path: Path, text: bytes) -> None:
    """Append a complete text to a file, or nothing. Raises OSError."""
    with path.open("ab", buffering=0) as file:
        size, remaining = file.seek(0, os.SEEK_END), memoryview(text)
        try:
            while remaining:
                remaining = remaining[file.write(remaining) :]
        except OSError:
            file.truncate(size)
            raise


def read_lines(path: Path, names: Sequence[str], schema: type[BaseModel] | None) -> list[JsonLine]:
    """Read a file's records, removing all else; see `json_lines.tidy`. Raises UserError."""
    lines: list[JsonLine] = []

    def is_kept(line: JsonLine) -> bool | None:
        scalars = (str, int, float, type(None))
        if not all(name in line and isinstance(line[name], scalars) for name in names):
            return None
        try:
            if schema is not None:
                schema.model_validate(line)
        except ValidationError:
            return None
        lines.append(line)
        return True

    try:
        tidy(path, is_kept, notice)
    except OSError as error:
        raise UserError(f"output_dir: cannot read {str(path)!r}: {one_line(error)}") from None
    return lines


def fingerprint(*parts: Any) -> str:
    """Hash parts, written as JSON, to 16 hex digits."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def identity(path: str) -> list[Any]:
    """Identity of a model, which changes when its files do.

    Names, sizes and times of its files (and of an adapter's base), or a hub name and its commit:
    to hash the weights of a large model would take as long as to use it.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        commit = commit_of(path)
        return [path] if commit is None else [path, commit]
    about = [(file.name, file.stat()) for file in model_files(folder)]
    base = base_of(folder)
    below = [] if base is None or base == path else identity(base)
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in about] + below
