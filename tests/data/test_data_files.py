"""Data files: cells of CSV are text, packed files are read, and no file of a folder is left out
without a word."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import logging
import lzma
import os
from decimal import Decimal

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from marlhf.common.types import UserError
from marlhf.config import PairDataSettings
from marlhf.data import files
from marlhf.data.files import number_in
from marlhf.data.pairs import _margin
from marlhf.data.presets import RowError, value

ROWS = [{"prompt": "one"}, {"prompt": "two"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def written(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def read_rows(*arguments):
    return list(files.read_rows(*arguments))


def refusal(path):
    with pytest.raises(UserError) as error:
        read_rows(str(path))
    return str(error.value)


@pytest.mark.parametrize(("name", "comma"), [("a.csv", ","), ("a.TSV", "\t")])
def test_cells_are_the_text_that_is_written(tmp_path, name, comma):
    cells = ["007", "1e3", "true", "2024-01-02", "null", "", " x ", "-0", "1_0", "NaN", "é\u2028\0"]
    path = tmp_path / name
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file, delimiter=comma)
        writer.writerows([[f"c{i}" for i in range(len(cells))], cells, reversed(cells)])
    assert [list(row.values()) for row in read_rows(str(path))] == [cells, cells[::-1]]


@given(st.lists(st.lists(st.text(), min_size=2, max_size=2), min_size=1, max_size=5))
def test_any_text_survives_csv(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    with path.open("w", newline="", encoding="utf-8", errors="replace") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([["a", "b"], *rows])
    expected = [[c.encode("utf-8", "replace").decode() for c in row] for row in rows]
    assert [list(row.values()) for row in read_rows(str(path))] == expected


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_of_every_system(tmp_path, end):
    path = written(tmp_path / "a.csv", end.join(["prompt,x", '"a', 'b",1', "", "c,2"]))
    assert [row["x"] for row in read_rows(path)] == ["1", "2"]


def test_a_cell_of_many_megabytes(tmp_path):
    text = "word " * 1_000_000
    path = written(tmp_path / "a.csv", f'prompt,x\n"{text}",1\nb,2\n')
    assert [len(row["prompt"]) for row in read_rows(path)] == [len(text), 1]
    assert csv.field_size_limit() == 131072, "the rest of the process keeps its limit"


@pytest.mark.parametrize(
    ("cell", "number"),
    [("3", 3), ("0.50", 0.5), (" 1e-2 ", 0.01), (7, 7), (True, None), ("", None), ("x", None)],
)
def test_a_number_may_be_written_as_text(cell, number):
    assert number_in(cell) == number


@pytest.mark.parametrize("cell", ["", "high", "-1", "nan", "inf", None, True])
def test_a_margin_that_is_none(cell):
    settings = PairDataSettings(margin_column="m")
    with pytest.raises(UserError, match=r"data: row 3: the margin is .*must be a number of at"):
        _margin({"m": cell}, settings, "data: row 3")


def test_margins_and_numbers_of_presets_come_from_text():
    assert _margin({"m": "0.5"}, PairDataSettings(margin_column="m"), "data: row 0") == 0.5
    assert value({"id": "12"}, "id", int, optional=True) == 12
    assert value({"id": ""}, "id", int, optional=True) is None
    assert value({"id": "12"}, "id", str) == "12"
    with pytest.raises(RowError, match="id is 'x'"):
        value({"id": "x"}, "id", int)


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [
        (".gz", gzip.compress),
        (".bz2", bz2.compress),
        (".xz", lzma.compress),
        (".zst", lambda data: pa.compress(data, "zstd", asbytes=True)),
    ],
)
def test_packed_files_are_read_alone_and_in_folders(tmp_path, caplog, suffix, pack):
    written(tmp_path / "part-0.jsonl", LINES)
    packed = written(tmp_path / f"part-1.jsonl{suffix}", pack(LINES))
    assert read_rows(packed) == ROWS
    assert read_rows(str(tmp_path)) == ROWS * 2
    assert not caplog.records


def test_a_packed_parquet_file(tmp_path):
    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    packed = gzip.compress((tmp_path / "a.parquet").read_bytes())
    assert read_rows(written(tmp_path / "b.parquet.gz", packed)) == ROWS


@pytest.mark.parametrize("name", ["part-1.jsonl.zip", "deep/part-1.zip", "part-1.csv"])
def test_data_that_would_be_left_out_of_a_folder_is_refused(tmp_path, name):
    written(tmp_path / "part-0.jsonl", LINES)
    (tmp_path / "deep").mkdir()
    written(tmp_path / name, "prompt\nx\n")
    assert name in refusal(tmp_path)


@pytest.mark.parametrize("name", ["part-1.txt", ".part-1.jsonl", "PART", "deep/.b/c.csv", "a.json"])
def test_other_files_of_a_folder_are_named(tmp_path, caplog, name):
    written(tmp_path / "part-0.jsonl", LINES)
    (tmp_path / "deep" / ".b").mkdir(parents=True)
    written(tmp_path / name, "x")
    assert read_rows(str(tmp_path)) == ROWS
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().endswith(f"that are not read: {name}")


def test_what_is_linked_or_no_file_is_named(tmp_path, caplog):
    folder = tmp_path / "data"
    folder.mkdir()
    written(folder / "part-0.jsonl", LINES)
    (tmp_path / "elsewhere").mkdir()
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(folder / "pipe.jsonl")
    assert read_rows(str(folder)) == ROWS
    assert caplog.records[0].getMessage().endswith("not read: linked, pipe.jsonl")


def test_files_about_the_data_need_no_word(tmp_path, caplog):
    written(tmp_path / "a.JSONL", LINES)
    for name in ("README.md", "LICENSE", "dataset_infos.json", ".gitattributes"):
        written(tmp_path / name, "{}")
    assert read_rows(str(tmp_path)) == ROWS
    assert not caplog.records


def test_a_folder_of_packed_files_alone(tmp_path):
    written(tmp_path / "train.jsonl.zip", "x")
    assert "train.jsonl.zip' is packed in a way that is not read" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda folder: os.mkfifo(folder / "pipe.jsonl") or folder / "pipe.jsonl", "a named pipe"),
        (lambda folder: "/dev/zero", "a device"),
    ],
)
def test_what_is_neither_file_nor_folder(tmp_path, make, kind):
    assert refusal(make(tmp_path)).endswith(f"which is {kind}, must be a file or a folder")


def inner(names):
    return pa.StructArray.from_arrays([pa.array(["x"]) for _ in names], names)


@pytest.mark.parametrize(
    "table",
    [
        pa.table([["a"], ["b"]], names=["prompt", "prompt"]),
        pa.table([["a"], inner(["prompt", "prompt"])], names=["prompt", "info"]),
        pa.table([pa.ListArray.from_arrays([0, 1], inner(["prompt", "prompt"]))], names=["x"]),
    ],
    ids=["columns", "fields", "fields in a list"],
)
def test_a_parquet_column_twice(tmp_path, table):
    parquet.write_table(table, tmp_path / "a.parquet")
    assert refusal(tmp_path / "a.parquet").endswith("the column 'prompt' is given twice")


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_rows_behind_a_damaged_stream_are_not_left_out(tmp_path, pack):
    suffix = {gzip.compress: "gz", bz2.compress: "bz2", lzma.compress: "xz"}[pack]
    path = tmp_path / f"a.jsonl.{suffix}"
    streams = [pack(line) for line in LINES.splitlines(keepends=True)]
    written(path, b"".join(streams) + b"\0" * 4)
    assert read_rows(str(path)) == ROWS
    written(path, streams[0] + b"?" + streams[1][1:])
    assert "cannot be read" in refusal(path)
    written(path, streams[0] + streams[1][:-4])
    assert "cannot be read" in refusal(path)


def test_keys_that_become_one_key_are_refused(tmp_path):
    written(tmp_path / "a.jsonl", '{"\\ud83d": 1, "\\ud83e": 2}\n')
    assert "the key '?' is given twice" in refusal(tmp_path / "a.jsonl")


@pytest.mark.parametrize("name", ["Test.jsonl", "TEST-2.jsonl", "test2.jsonl", "Heldout/a.jsonl"])
def test_held_out_files_are_not_trained_on(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    written(tmp_path / name, '{"prompt": "held out"}\n')
    written(tmp_path / "Train.jsonl", LINES)
    assert read_rows(str(tmp_path)) == ROWS


def test_a_split_may_be_asked_for_as_it_is_written(tmp_path):
    for name in ("Train", "test2", "test"):
        written(tmp_path / f"{name}.jsonl", f'{{"prompt": "{name}"}}\n')
    assert read_rows(str(tmp_path), "test2") == [{"prompt": "test2"}]
    assert len(read_rows(str(tmp_path), "test")) == 2


@pytest.mark.parametrize("name", ["b.tar.gz", "b.tgz", "b.TAR.XZ", "b.zip"])
def test_an_archive_in_a_folder_is_refused(tmp_path, name):
    written(tmp_path / "a.jsonl", LINES)
    written(tmp_path / name, b"x")
    assert "is packed in a way that is not read" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("cell", "number"),
    [
        ("1_0", None),
        (Decimal("1.50"), 1.5),
        ("1e3", 1000),
        (" 7 ", 7),
        ("0x10", None),
        (True, None),
    ],
)
def test_what_is_a_number(cell, number):
    assert number_in(cell) == number
