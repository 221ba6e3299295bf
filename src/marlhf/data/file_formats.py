"""Reads one data file: JSON Lines, JSON, CSV, TSV or Parquet, plain or compressed.

Every cell of CSV and TSV is text, since such a file has no types: `007` is not 7.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from marlhf.common.errors import UserError, one_line
from marlhf.common.paths import local_path

Row = dict[str, Any]

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # escaped: UTF-8 has no raw surrogates
_LONG_NUMBER = re.compile(r"\d{4301}")  # over the default limit of `int`


def _open_zstd(file: Path, mode: str) -> IO[bytes]:
    from pyarrow import CompressedInputStream

    return io.BufferedReader(CompressedInputStream(file, "zstd"))


_OPENERS: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".lzma": lzma.open,
    ".zst": _open_zstd,
}
_UNREADABLE = (".zip", ".7z", ".lz4", ".br", ".rar", ".tar", ".tgz")


def data_format(name: str) -> str | None:
    """The format's suffix, such as `.jsonl` for `a.JSONL.gz`; None for an unsupported format.

    `a.jsonl.zip` gives `.jsonl` too: a data file, which `read_file` refuses.
    """
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    while suffixes and suffixes[-1] in (*_OPENERS, *_UNREADABLE):
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in _READERS else None


def is_archive(name: str) -> bool:
    """Whether a file is in an unsupported archive or compression format."""
    return Path(name).suffix.lower() in _UNREADABLE


def suffixes() -> str:
    """Supported suffixes of data files, for messages."""
    return f"{', '.join(sorted(_READERS))} (or one of these and {', '.join(_OPENERS)})"


def parse_json(text: str) -> Any:
    """`json.loads` that refuses duplicate keys and replaces lone surrogates by question marks.

    A lone surrogate, half of an emoji cut in two, is no character, and no tokenizer accepts it.

    Raises ValueError.
    """
    value = json.loads(text, object_pairs_hook=_object)
    if _SURROGATE.search(text):
        whole = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
        value = json.loads(whole)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"the key {_twice(key for key, _ in pairs)!r} is given twice")
    return found


def _twice(names: Iterable[Any]) -> Any:
    seen: set[Any] = set()
    return next((name for name in names if name in seen or seen.add(name)), None)


@dataclass(frozen=True)
class _Source:
    """An open file, with its path and key for messages."""

    data: IO[bytes]
    file: Path
    key: str

    def lines(self, newline: str | None = None) -> IO[str]:
        """The file as a stream of text lines."""
        return io.TextIOWrapper(self.data, encoding="utf-8-sig", newline=newline)

    def fault(self, what: object, line: int | None = None) -> UserError:
        """A UserError about the file or one of its lines."""
        where = "" if line is None else f", line {line}"
        return UserError(f"{self.key}: {self.file}{where}: {one_line(what)}")


def read_file(file: Path, key: str, columns: Sequence[str] | None = None) -> list[Row]:
    """Read the rows of a file; `columns` are those to keep, None: all. Raises UserError."""
    reader = _READERS.get(data_format(file.name) or "")
    if is_archive(file.name):
        packings = ", ".join(_OPENERS)
        raise UserError(
            f"{key}: {str(file)!r} is packed in a way that is not read; unpack it (read are "
            f"{packings})"
        )
    if reader is None:
        raise UserError(f"{key}: given {str(file)!r}; a file must end in {suffixes()}")
    local_path(file, key)
    try:
        with _OPENERS.get(file.suffix.lower(), open)(file, "rb") as data:
            rows = reader(_Source(data, file, key), columns)
    except UnicodeDecodeError as error:
        line = _line_of_bad_bytes(file)
        raise UserError(
            f"{key}: {file} is not UTF-8 text: {error.reason}, in line {line}; save it as UTF-8"
        ) from None
    # pyarrow raises ValueErrors; the last three are for truncated or not compressed files
    except (OSError, ValueError, RecursionError, EOFError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{key}: {file} cannot be read: {one_line(error)}") from None
    if columns is None or reader is _read_parquet:
        return rows
    return [{name: row[name] for name in columns if name in row} for row in rows]


def _line_of_bad_bytes(file: Path) -> int:
    with _OPENERS.get(file.suffix.lower(), open)(file, "rb") as data:
        bad = (
            n for n, line in enumerate(data, 1) if line.decode("utf-8", "ignore").encode() != line
        )
        return next(bad, 1)


def _read_jsonl(source: _Source, columns: Sequence[str] | None = None) -> list[Row]:
    return list(_parse_lines(source.lines(), source))


def _parse_lines(lines: Iterable[str], source: _Source) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except json.JSONDecodeError as error:
            fault = f"not valid JSON: {error.msg}, column {error.colno}"
            raise source.fault(fault, number) from None
        except (ValueError, RecursionError) as error:  # a duplicate key, a number of 5000 digits
            raise source.fault(f"cannot be read: {error}", number) from None
        if not isinstance(row, dict):
            kind = type(row).__name__
            raise source.fault(
                f'holds a {kind}, must be an object such as {{"prompt": ...}}', number
            )
        yield row


def _read_json(source: _Source, columns: Sequence[str] | None = None) -> list[Row]:
    """Read a list of objects; accepts JSON lines under the wrong suffix too."""
    text = source.lines().read()
    try:
        rows = parse_json(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return list(_parse_lines(io.StringIO(text), source))
        fault = f"not valid JSON: {error.msg}, column {error.colno}"
        raise source.fault(fault, error.lineno) from None
    except ValueError as error:
        number = _LONG_NUMBER.search(text) if "digits" in str(error) else None
        line = None if number is None else text.count("\n", 0, number.start()) + 1
        raise source.fault(f"cannot be read: {error}", line) from None
    rows = [rows] if isinstance(rows, dict) else rows
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{source.key}: {source.file} must hold a list of objects")
    return rows


def _read_csv(source: _Source, columns: Sequence[str] | None = None) -> list[Row]:
    return _read_cells(source, ",")


def _read_tsv(source: _Source, columns: Sequence[str] | None = None) -> list[Row]:
    return _read_cells(source, "\t")


def _read_cells(source: _Source, delimiter: str) -> list[Row]:
    """Read lines of cells under a header, as spreadsheets write them (RFC 4180)."""
    before = csv.field_size_limit(2**31 - 1)  # process-wide, and 128 KB by default
    reader = csv.reader(source.lines(newline=""), delimiter=delimiter, strict=True)
    start = 1  # line number of the row's start
    rows: list[Row] = []
    header: list[str] | None = None
    try:
        for cells in reader:
            if cells and header is None:
                header = cells
                if len(set(header)) < len(header):
                    raise source.fault(f"the column {_twice(header)!r} is given twice", start)
            elif cells:
                assert header is not None
                if len(cells) != len(header):
                    fault = f"has {len(cells)} cells, the header has {len(header)}"
                    raise source.fault(fault, start)
                rows.append(dict(zip(header, cells, strict=True)))
            start = reader.line_num + 1
    except csv.Error as error:
        unclosed = "unexpected end of data" in str(error)
        fault = "a quotation mark that is opened here is never closed" if unclosed else error
        raise source.fault(fault, start if unclosed else reader.line_num) from None
    finally:
        csv.field_size_limit(before)
    return rows


def _read_parquet(source: _Source, columns: Sequence[str] | None = None) -> list[Row]:
    from pyarrow import parquet

    table = parquet.ParquetFile(source.data)
    schema = table.schema_arrow
    _check_fields(schema, source)
    present = [c for c in columns if c in schema.names] if columns else None
    return table.read(columns=present).to_pylist()


def _check_fields(fields: Iterable[Any], source: _Source) -> None:
    """Raise UserError for duplicate names of columns, or of fields inside one."""
    from pyarrow import types

    fields = list(fields)
    names = [field.name for field in fields]
    if len(set(names)) < len(names):
        raise source.fault(f"the column {_twice(names)!r} is given twice")
    for field in fields:
        kind = field.type
        if types.is_nested(kind) and not types.is_map(kind):
            inside = [kind.field(i) for i in range(kind.num_fields)]
            _check_fields(inside, source)


_READERS: dict[str, Callable[[_Source, Sequence[str] | None], list[Row]]] = {
    ".parquet": _read_parquet,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
}
FORMATS = tuple(_READERS)  # by priority: a folder's format is the first that it has
