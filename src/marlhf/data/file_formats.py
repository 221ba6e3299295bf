"""Reads a file row by row: JSON Lines, JSON, CSV, TSV, Parquet, plain or compressed.

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
from typing import IO, TYPE_CHECKING, Any, TypeVar

from marlhf.common.errors import UserError, one_line
from marlhf.common.paths import local_path

if TYPE_CHECKING:
    import pyarrow as pa

Row = dict[str, Any]
Item = TypeVar("Item")

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # escaped: UTF-8 has no raw surrogates
_LONG_NUMBER = re.compile(r"\d{4301}")  # over the default limit of `int`


def _open_zstd(file: Path, mode: str) -> IO[bytes]:
    from pyarrow import CompressedInputStream

    return io.BufferedReader(CompressedInputStream(file, "zstd"))


def _open_streams(file: Path, decompressor: Callable[[], Any]) -> IO[bytes]:
    """Read all compressed streams in a file; the modules' readers stop at a bad one."""
    packed, parts = file.read_bytes(), []
    while packed.strip(b"\0") or not parts:  # zeros may fill up the last block
        stream = decompressor()
        parts.append(stream.decompress(packed))
        if not stream.eof:
            raise EOFError("the compressed file is cut short")
        packed = stream.unused_data
    return io.BytesIO(b"".join(parts))


_OPENERS: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".bz2": lambda file, mode: _open_streams(file, bz2.BZ2Decompressor),
    ".xz": lambda file, mode: _open_streams(file, lzma.LZMADecompressor),
    ".lzma": lambda file, mode: _open_streams(file, lzma.LZMADecompressor),
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
    return suffixes[-1] if suffixes and suffixes[-1] in FORMATS else None


def is_archive(name: str) -> bool:
    """Whether a file is in an unsupported archive or compression format."""
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    while suffixes and suffixes[-1] in _OPENERS:
        suffixes.pop()
    return bool(suffixes) and suffixes[-1] in _UNREADABLE


def suffixes() -> str:
    """Supported suffixes of data files, for messages."""
    return f"{', '.join(sorted(FORMATS))} (or one of these and {', '.join(_OPENERS)})"


def parse_json(text: str) -> Any:
    """`json.loads` that refuses duplicate keys and replaces lone surrogates by question marks.

    A lone surrogate, half of an emoji cut in two, is no character, and no tokenizer accepts it.

    Raises ValueError.
    """
    value = _DECODER.decode(text)
    if _SURROGATE.search(text):
        replaced = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
        value = _DECODER.decode(replaced.decode())
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError(f"the key {_twice(key for key, _ in pairs)!r} is given twice")
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_object)  # json.loads would make one per text


def _twice(names: Iterable[Any]) -> Any:
    seen: set[Any] = set()
    return next((name for name in names if name in seen or seen.add(name)), None)


@dataclass(frozen=True)
class _OpenFile:
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


def read_file(file: Path, key: str, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """Yield the rows of a text file; `columns` are those to keep, None: all. Raises UserError."""
    for row in _read(file, key, _READERS[check_format(file, key)]):
        yield row if columns is None else {name: row[name] for name in columns if name in row}


def read_parquet(
    file: Path, key: str, columns: Sequence[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """Yield a Parquet file in batches. Raises UserError."""
    yield from _read(file, key, lambda source: _parquet_batches(source, columns))


def is_parquet(file: Path) -> bool:
    """Whether a file, by its name, is read by `read_parquet`."""
    return data_format(file.name) == PARQUET and not is_archive(file.name)


def check_format(file: Path, key: str) -> str:
    """The format of a file. Raises UserError for one that is not read."""
    if is_archive(file.name):
        packings = ", ".join(_OPENERS)
        raise UserError(
            f"{key}: {str(file)!r} is packed in a way that is not read; unpack it (read are "
            f"{packings})"
        )
    suffix = data_format(file.name)
    if suffix is None:
        raise UserError(f"{key}: given {str(file)!r}; a file must end in {suffixes()}")
    return suffix


def _read(file: Path, key: str, read: Callable[[_OpenFile], Iterator[Item]]) -> Iterator[Item]:
    """Yield what `read` yields of the open file. Raises UserError."""
    check_format(file, key)
    local_path(file, key)
    try:
        with _OPENERS.get(file.suffix.lower(), open)(file, "rb") as data:
            yield from read(_OpenFile(data, file, key))
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


def _line_of_bad_bytes(file: Path) -> int:
    with _OPENERS.get(file.suffix.lower(), open)(file, "rb") as data:
        bad = (
            n for n, line in enumerate(data, 1) if line.decode("utf-8", "ignore").encode() != line
        )
        return next(bad, 1)


def _read_jsonl(source: _OpenFile) -> Iterator[Row]:
    return _parse_lines(source.lines(), source)


def _parse_lines(lines: Iterable[str], source: _OpenFile) -> Iterator[Row]:
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


def _read_json(source: _OpenFile) -> Iterator[Row]:
    """Read a list of objects; accepts JSON lines under the wrong suffix too."""
    text = source.lines().read()
    try:
        rows = parse_json(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return _parse_lines(io.StringIO(text), source)
        fault = f"not valid JSON: {error.msg}, column {error.colno}"
        raise source.fault(fault, error.lineno) from None
    except ValueError as error:
        number = _LONG_NUMBER.search(text) if "digits" in str(error) else None
        line = None if number is None else text.count("\n", 0, number.start()) + 1
        raise source.fault(f"cannot be read: {error}", line) from None
    rows = [rows] if isinstance(rows, dict) else rows
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{source.key}: {source.file} must hold a list of objects")
    return iter(rows)


def _read_csv(source: _OpenFile) -> Iterator[Row]:
    return _read_cells(source, ",")


def _read_tsv(source: _OpenFile) -> Iterator[Row]:
    return _read_cells(source, "\t")


def _read_cells(source: _OpenFile, delimiter: str) -> Iterator[Row]:
    try:
        yield from read_cells(source.lines(newline=""), delimiter)
    except CellError as error:
        raise source.fault(error, error.line) from None


class CellError(ValueError):
    """A fault in a line of cells."""

    def __init__(self, fault: object, line: int) -> None:
        super().__init__(fault)
        self.line = line


def read_cells(lines: Iterable[str], delimiter: str) -> Iterator[Row]:
    """Yield lines of cells under a header, as spreadsheets write them (RFC 4180).

    Raises CellError for a quotation mark that is not closed, cells too many or too few, and a
    duplicate column.
    """
    before = csv.field_size_limit(2**31 - 1)  # process-wide, and 128 KB by default
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    start = 1  # line number of the row's start
    header: list[str] | None = None
    try:
        for cells in reader:
            if cells and header is None:
                header = cells
                if len(set(header)) < len(header):
                    raise CellError(f"the column {_twice(header)!r} is given twice", start)
            elif cells:
                assert header is not None
                if len(cells) != len(header):
                    fault = f"has {len(cells)} cells, the header has {len(header)}"
                    raise CellError(fault, start)
                yield dict(zip(header, cells, strict=True))
            start = reader.line_num + 1
    except csv.Error as error:
        unclosed = "unexpected end of data" in str(error)
        fault = "a quotation mark that is opened here is never closed" if unclosed else error
        raise CellError(fault, start if unclosed else reader.line_num) from None
    finally:
        csv.field_size_limit(before)


def _parquet_batches(
    source: _OpenFile, columns: Sequence[str] | None = None
) -> Iterator[pa.RecordBatch]:
    from pyarrow import parquet

    table = parquet.ParquetFile(source.data)
    schema = table.schema_arrow
    _check_fields(schema, source)
    present = [c for c in columns if c in schema.names] if columns else None
    yield from table.iter_batches(columns=present)


def _check_fields(fields: Iterable[Any], source: _OpenFile) -> None:
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


_READERS: dict[str, Callable[[_OpenFile], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
}
PARQUET = ".parquet"
FORMATS = (PARQUET, *_READERS)  # by priority: a folder's format is the first that it has
