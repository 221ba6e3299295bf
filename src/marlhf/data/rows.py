"""Rows of data of any size: memory-mapped, and parsed when they are read."""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol, TypeVar, overload

import numpy as np
import pyarrow as pa

from marlhf.common.errors import UserError
from marlhf.common.paths import digest_of_file
from marlhf.data.file_formats import Row
from marlhf.data.store import BATCH, ArrowTable, digest_of

Item = TypeVar("Item")

TEXT_SCHEMA = pa.schema([("row", pa.large_string())])  # rows as JSON: Arrow would fill in nulls
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


class ArrowRows(Protocol):
    """Arrow rows by position."""

    def __len__(self) -> int: ...

    def between(self, start: int, stop: int) -> pa.Table: ...

    def scan(self) -> Iterator[pa.RecordBatch | pa.Table]: ...


class Rows(Sequence[Row]):
    """Rows `{column: value}` of Arrow tables; a slice is another view of the same tables.

    tables     typed columns, or those of `TEXT_SCHEMA`
    key        digest of their contents; None where it is unknown
    names      columns, where every row has all of them; None where rows differ
    span       rows of the view, counted over all tables
    renamed    {new: old} names of columns
    """

    def __init__(
        self,
        tables: Sequence[ArrowRows],
        key: str | None = None,
        names: Sequence[str] | None = None,
        span: range | None = None,
        renamed: Mapping[str, str] | None = None,
    ) -> None:
        self._tables = tables
        self._ends = list(accumulate(map(len, tables)))
        self._key, self._names = key, names
        self._span = range(self._ends[-1] if self._ends else 0) if span is None else span
        self._renamed = renamed or {}

    def __len__(self) -> int:
        return len(self._span)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> Rows: ...

    def __getitem__(self, index: int | slice) -> Row | Rows:
        if isinstance(index, slice):
            span = self._span[index]
            assert span.step == 1
            return Rows(self._tables, self._key, self._names, span, self._renamed)
        position = self._span[index]
        number = bisect_right(self._ends, position)
        table = self._tables[number]
        position -= self._ends[number] - len(table)
        return self._decoded(table.between(position, position + 1))[0]

    def __iter__(self) -> Iterator[Row]:
        for batch in self.batches():
            yield from batch

    def batches(self) -> Iterator[list[Row]]:
        """All rows in order, in batches of at most `BATCH`."""
        position = 0
        for table, end in zip(self._tables, self._ends, strict=True):
            if end <= self._span.start or position >= self._span.stop:
                position = end
                continue
            for batch in table.scan():
                first = max(self._span.start - position, 0)
                last = min(self._span.stop - position, batch.num_rows)
                position += batch.num_rows
                for start in range(first, last, BATCH):
                    yield self._decoded(batch.slice(start, min(BATCH, last - start)))

    def with_names(self, renamed: Mapping[str, str]) -> Rows:
        """The same rows with columns renamed by `{new: old}`."""
        return Rows(self._tables, self._key, self._names, self._span, renamed)

    @cached_property
    def names(self) -> list[str]:
        """All columns, in order of first use in the view or in the file."""
        if self._names is None:
            return _names(self)
        return list(self._rename(dict.fromkeys(self._names))) if self else []

    @property
    def key(self) -> str | None:
        """Digest of the view's content; None where it is unknown."""
        if self._key is None:
            return None
        span = [self._span.start, self._span.stop]
        return digest_of([self._key, span, list(self._renamed.items())])

    def _decoded(self, part: pa.RecordBatch | pa.Table) -> list[Row]:
        if part.schema.equals(TEXT_SCHEMA):
            rows = [json.loads(text) for text in part.column(0).to_pylist()]
        else:
            rows = part.to_pylist()
            for name in filter(None, map(_of_messages, part.schema)):
                for row in rows:
                    row[name] = _without_nulls(row[name])
        return [self._rename(row) for row in rows] if self._renamed else rows

    def _rename(self, row: Row) -> Row:
        if not self._renamed:
            return row
        old_names = set(self._renamed.values())
        kept = {name: value for name, value in row.items() if name not in old_names}
        return kept | {new: row.get(old) for new, old in self._renamed.items()}


def _of_messages(field: pa.Field) -> str | None:
    """The column's name where it holds lists of messages, else None."""
    kind = field.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    is_struct = is_list and pa.types.is_struct(kind.value_type)
    return field.name if is_struct and kind.value_type.get_field_index("role") >= 0 else None


def _without_nulls(value: Any) -> Any:
    """Messages without the keys that Arrow fills in: every one has all keys of any."""
    if isinstance(value, dict):
        return {key: _without_nulls(x) for key, x in value.items() if x is not None}
    return [_without_nulls(x) for x in value] if isinstance(value, list) else value


class _DatasetTable:
    """The rows of a `datasets.Dataset`, which maps its own files."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset.with_format("arrow")

    def __len__(self) -> int:
        return len(self._dataset)

    def between(self, start: int, stop: int) -> pa.Table:
        return self._dataset[start:stop]

    def scan(self) -> Iterator[pa.Table]:
        for start in range(0, len(self), BATCH):
            yield self._dataset[start : start + BATCH]


def rows_of_dataset(dataset: Any, files_are_content: bool = False) -> Rows:
    """The rows of a `datasets.Dataset`.

    files_are_content   its rows are those of its files, in their order
    """
    files = [Path(file["filename"]) for file in dataset.cache_files] if files_are_content else []
    key = digest_of([*map(digest_of_file, files), dataset.column_names]) if files else None
    return Rows([_DatasetTable(dataset)], key, dataset.column_names)


class Derived(Sequence[Item]):
    """Items made lazily from rows.

    rows     memory-mapped, or a list
    make     (row, its index) -> item
    facts    facts about all items, among them `fact` of their `RowDigest`
    key      digest of their content; None where it is unknown
    lengths  tokens of each, int64 [N], where they are known
    """

    def __init__(
        self,
        rows: Sequence[Row],
        make: Callable[[Row, int], Item],
        facts: Mapping[str, Any],
        key: str | None = None,
        lengths: np.ndarray | None = None,
    ) -> None:
        self._rows, self._make = rows, make
        self.facts, self.key, self.lengths = facts, key, lengths

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Item: ...

    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...

    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        chosen = range(len(self))[index]
        if isinstance(chosen, range):
            return [self[i] for i in chosen]
        return self._make(self._rows[chosen], chosen)

    def __iter__(self) -> Iterator[Item]:
        for first, batch in batches_of(self._rows):
            for index, row in enumerate(batch, first):
                yield self._make(row, index)


@dataclass(frozen=True)
class DataSource:
    """The columns of some data, and how messages name the data and its rows.

    columns     of all rows
    name        of the data, such as "held-out data"
    first_row   number of its first row
    has_rows    whether there are rows: without any, no column is missing
    """

    columns: Sequence[str]
    name: str
    first_row: int = 0
    has_rows: bool = True

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]], name: str, first_row: int) -> DataSource:
        """The source of some rows."""
        return cls(column_names(rows), name, first_row, bool(rows))

    def label(self, index: int) -> str:
        """Name of a row in messages."""
        return f"{self.name}: row {self.first_row + index}"

    def check_columns(self, key: str, names: Iterable[str]) -> None:
        """Check that the columns that a `data` key names exist. Raises UserError."""
        missing = next((name for name in names if name not in self.columns), None)
        if self.has_rows and missing is not None:
            present = ", ".join(map(str, self.columns)) or "none"
            raise UserError(
                f"data.{key}: no column is called {missing!r}; the {self.name} has {present}"
            )


class RowDigest:
    """Number of rows and a digest of their contents, in order, for a run's manifest."""

    def __init__(self, rows: Iterable[Any] = ()) -> None:
        self._digest, self._count = hashlib.sha256(), 0
        for row in rows:
            self.add(row)

    def add(self, row: Any) -> None:
        """Count a row."""
        self._count += 1
        self._digest.update(_ENCODER.encode(row).encode() + b"\n")

    @property
    def fact(self) -> dict[str, Any]:
        """`{"rows": count, "sha256": digest}`."""
        return {"rows": self._count, "sha256": self._digest.hexdigest()}


def _plain(value: Any) -> Any:
    fields = getattr(value, "__dict__", None)
    return fields or _ADDRESS.sub("", str(value))


_ENCODER = json.JSONEncoder(sort_keys=True, default=_plain, skipkeys=True)


def batches_of(rows: Sequence[Row]) -> Iterator[tuple[int, list[Row]]]:
    """Yield `(index of the first row, rows)` in batches of at most `BATCH` rows."""
    slices = (list(rows[start : start + BATCH]) for start in range(0, len(rows), BATCH))
    first = 0
    for batch in rows.batches() if isinstance(rows, Rows) else slices:
        yield first, batch
        first += len(batch)


def column_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """All columns of rows, in the order of their first use."""
    return rows.names if isinstance(rows, Rows) else _names(rows)


def _names(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def list_lengths(tables: Sequence[ArrowTable], column: str) -> np.ndarray:
    """Lengths of the lists in a column, int64 [N]."""
    chunks: list[Any] = [chunk for table in tables for chunk in table.column(column).chunks]
    lengths = [chunk.value_lengths().to_numpy() for chunk in chunks]
    return np.concatenate([np.empty(0, int), *lengths]).astype(int)


def fact_of(items: Iterable[Any]) -> dict[str, Any]:
    """Number and digest of items, as `RowDigest` has them."""
    return items.facts["fact"] if isinstance(items, Derived) else RowDigest(items).fact


def key_of(rows: Sequence[Row]) -> str | None:
    """Digest of the rows' content; None where it is unknown."""
    return rows.key if isinstance(rows, Rows) else None
