"""A cache on disk of results computed from data, as memory-mapped Arrow tables.

An entry is a folder, named by a digest of everything that its contents depend on. It is written
under another name and renamed when complete, by one process at a time, so that it is complete or
absent. The cache is `marlhf` in the datasets cache of Hugging Face: HF_DATASETS_CACHE, else
`datasets` in HF_HOME, which is ~/.cache/huggingface.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
from filelock import FileLock

from marlhf.common.errors import UserError, one_line
from marlhf.common.paths import writing

Item = TypeVar("Item")
Facts = dict[str, Any]

BATCH = 1000  # rows read, tokenised or written at a time
_ADVICE = "; the cache of data is there, and HF_DATASETS_CACHE names another folder for it"
_FACTS = "facts.json"
# packages that render and tokenise, in addition to this one
_LIBRARIES = ("transformers", "tokenizers", "sentencepiece", "tiktoken", "jinja2", "pyarrow")


class ArrowTable:
    """Rows of an Arrow stream, memory-mapped from a file or held in a buffer."""

    def __init__(self, source: Path | pa.Buffer) -> None:
        self._source = source

    @cached_property
    def _table(self) -> pa.Table:
        """The rows without a copy: pages of a file are read on access."""
        source = self._source
        with self._reading():
            mapped = pa.memory_map(str(source)) if isinstance(source, Path) else source
            return pa.ipc.open_stream(mapped).read_all()

    def __len__(self) -> int:
        return self._table.num_rows

    def between(self, start: int, stop: int) -> pa.Table:
        """The rows from `start` to `stop`."""
        return self._table.slice(start, stop - start)

    def column(self, name: str) -> pa.ChunkedArray:
        """All values of a column."""
        return self._table.column(name)

    def scan(self) -> Iterator[pa.RecordBatch | pa.Table]:
        """All rows in batches, read and not mapped: mapped pages count as memory in use."""
        source = self._source
        with self._reading():
            stream = pa.OSFile(str(source)) if isinstance(source, Path) else source
            reader = pa.ipc.open_stream(stream)
        while True:
            with self._reading():
                batch = next(reader, None)
            if batch is None:
                return
            yield batch

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Wrap reads: a damaged file becomes a UserError that names its entry."""
        try:
            yield
        except (pa.ArrowException, OSError) as error:
            folder = str(self._source.parent) if isinstance(self._source, Path) else "memory"
            raise UserError(
                f"data: {folder!r} in the cache of data is damaged; delete it: {one_line(error)}"
            ) from error


class Writer:
    """Writes an entry's tables to files of a folder, or without one to memory."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._sinks: list[Any] = []
        self._stream: Any = None

    def new_table(self, schema: pa.Schema) -> None:
        """Begin the next table."""
        self.close()
        if self._folder is None:
            self._sinks.append(pa.BufferOutputStream())
        else:
            file = self._folder / f"{len(self._sinks):05d}.arrow"
            self._sinks.append(pa.OSFile(str(file), "wb"))
        self._stream = pa.ipc.new_stream(self._sinks[-1], schema)

    def write(self, rows: pa.RecordBatch | pa.Table) -> None:
        """Append rows to the table."""
        self._stream.write(rows)

    def close(self) -> None:
        """End the last table."""
        stream, self._stream = self._stream, None
        if stream is not None:
            try:
                stream.close()
            finally:
                if self._folder is not None:
                    self._sinks[-1].close()

    def in_memory(self) -> list[ArrowTable]:
        """The tables written to memory."""
        return [ArrowTable(sink.getvalue()) for sink in self._sinks]


@dataclass(frozen=True)
class Stored:
    """An entry of the cache.

    facts    the result of `build`, in JSON's types
    tables   the tables that it wrote
    key      digest of everything that they depend on; None without one
    """

    facts: Mapping[str, Any]
    tables: list[ArrowTable]
    key: str | None = None


def stored(kind: str, key: Any, build: Callable[[Writer], Facts]) -> Stored:
    """Return an entry of the cache, built by the first process that needs it.

    Other processes, ranks of the same run among them, wait for it. Versions of the libraries and
    the code of this package are part of every key.

    kind    start of the entry's name
    key     everything else that the entry depends on, as JSON; None: nothing is cached, and the
            tables are in memory
    build   writes the tables and returns the facts

    Raises UserError where the cache cannot be written, and whatever `build` raises.
    """
    if key is None:
        writer = Writer()
        facts = build(writer)
        writer.close()
        return Stored(facts, writer.in_memory())
    digest = digest_of([key, _versions()])
    folder = cache_folder() / f"{kind}-{digest}"
    entry = _read(folder)
    if entry is None:
        with writing("data", folder.parent, _ADVICE):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{folder}.lock"):
                entry = _read(folder)  # another process may have built it meanwhile
                if entry is None:
                    _build(folder, build)
                    entry = _read(folder)
    assert entry is not None, "it was built under a lock"
    facts, files = entry
    return Stored(facts, [ArrowTable(file) for file in files], digest)


def _read(folder: Path) -> tuple[Facts, list[Path]] | None:
    """Facts and tables' files of an entry, None where it is absent or damaged."""
    try:
        if not (folder / _FACTS).is_file():
            return None
        contents = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        files = [folder / f"{i:05d}.arrow" for i in range(len(contents["sizes"]))]
        sizes = [file.stat().st_size if file.is_file() else None for file in files]
        return (contents["facts"], files) if sizes == contents["sizes"] else None
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return None


def batched(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Yield lists of `BATCH` items; the last one may be shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, BATCH)):
        yield batch


def cache_folder() -> Path:
    """The folder of the cache."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or Path(caches) / "huggingface"
    datasets = os.environ.get("HF_DATASETS_CACHE") or Path(home) / "datasets"
    return Path(datasets).expanduser() / "marlhf"


def digest_of(value: Any) -> str:
    """Digest of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def _build(folder: Path, build: Callable[[Writer], Facts]) -> None:
    partial = Path(f"{folder}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a killed process: the lock is ours
    partial.mkdir()
    try:
        writer = Writer(partial)
        try:
            facts = build(writer)
        finally:
            writer.close()
        sizes = [file.stat().st_size for file in sorted(partial.iterdir())]
        contents = json.dumps({"facts": facts, "sizes": sizes})
        (partial / _FACTS).write_text(contents, encoding="utf-8")
        for file in partial.iterdir():
            _fsync(file)
        _remove(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove(folder: Path) -> None:
    """Remove a damaged entry, or what else has its name."""
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)
    else:
        folder.unlink(missing_ok=True)


def _fsync(file: Path) -> None:
    """Fsync a file, so that no power failure leaves a complete entry of empty files."""
    with file.open("rb") as data:
        os.fsync(data.fileno())


@cache
def _versions() -> dict[str, str]:
    """Versions of the libraries, and a digest of this package's code."""
    code = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        code.update(file.read_bytes())
    return {"marlhf": code.hexdigest(), **{name: _version(name) for name in _LIBRARIES}}


def _version(name: str) -> str:
    """Version of a distribution; empty where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
