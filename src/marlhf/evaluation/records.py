"""Append-only JSONL files with keys: what an interrupted evaluation goes on from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from marlhf.errors import UserError

Line = dict[str, Any]
Key = tuple[Any, ...]


class Records:
    """Lines of a JSONL file by key; the last line of a key counts.

    Every rank holds all lines, the main one writes them. A last line that was cut off while being
    written is dropped and overwritten. Raises UserError for any other line that is no record.
    """

    def __init__(self, path: Path, key: Sequence[str], distributed: Any = None) -> None:
        self.path = path
        self._names = tuple(key)
        self._distributed = distributed
        self._is_main = distributed is None or distributed.is_main
        mine = read_lines(path, self._names) if self._is_main else []
        self.lines: dict[Key, Line] = {self.key(line): line for line in self._shared(mine)}

    def key(self, line: Mapping[str, Any]) -> Key:
        """The key of a line."""
        return tuple(line[name] for name in self._names)

    def append(self, lines: Iterable[Line]) -> None:
        """Add lines, on disk before this returns. Every rank calls it, with lines of its own."""
        new = self._shared(list(lines))
        self.lines.update((self.key(line), line) for line in new)
        if self._is_main and new:
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in new)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)

    def _shared(self, lines: list[Line]) -> list[Line]:
        return lines if self._distributed is None else self._distributed.gather_objects(lines)


def read_lines(path: Path, names: Sequence[str]) -> list[Line]:
    """The records of a file, which is first rid of a half-written end. Raises UserError."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    lines = []
    for number, text in enumerate(whole.decode("utf-8", "replace").split("\n")[:-1], 1):
        try:
            line = json.loads(text)
            fine = isinstance(line, dict) and all(name in line for name in names)
        except ValueError:
            fine, line = False, None
        if not fine:
            raise UserError(
                f"output_dir: {str(path)!r}, line {number}: is no record of an evaluation; mend or "
                "delete the file"
            )
        lines.append(line)
    return lines


def fingerprint(*parts: Any) -> str:
    """16 hex digits of what can be written as JSON."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def identity(path: str) -> list[Any]:
    """What tells a model from what it was before: names, sizes and times of its files, or a hub
    name. Reading the weights of a large model again would take as long as using it."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return [path]
    files = sorted(file for file in folder.iterdir() if file.is_file())
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
