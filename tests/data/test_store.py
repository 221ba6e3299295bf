"""The cache of data: built once, never stale, whole or absent, and refused in one line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import disks
from support.tiny_models import CHATML, byte_tokenizer
from support.tokenizer_families import byte_level, unigram, wordpiece
from tokenizers import normalizers

from marlhf.common.errors import UserError
from marlhf.common.tokenization import encode_texts
from marlhf.config import (
    DataSettings,
    ModelSettings,
    PairDataSettings,
    RewardConfig,
    SFTConfig,
    SFTDataSettings,
)
from marlhf.data import demonstrations, store
from marlhf.data.demonstrations import SFTExamples, load_examples
from marlhf.data.encoding import token_bound, tokenizer_key
from marlhf.data.files import read_rows
from marlhf.data.pairs import load_preferences
from marlhf.data.prompts import load_rows
from marlhf.data.rows import RowDigest, column_names, fact_of

TOKENIZER = byte_tokenizer(add_bos=True, chat_template=CHATML)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a cache of its own."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "marlhf"


def written(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def examples(path: str, **changes: Any) -> SFTExamples:
    data = SFTDataSettings(path=path, eval_rows=0)
    config = SFTConfig(model=ModelSettings(path="x"), data=data, **{"max_length": 9, **changes})
    return load_examples(config, TOKENIZER)[0]


# what is stored

PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
VALUES = st.recursive(
    PLAIN, lambda v: st.lists(v, max_size=2) | st.dictionaries(st.text(max_size=2), v, max_size=2)
)
TABLES = st.lists(st.dictionaries(st.sampled_from("abc"), VALUES), min_size=1, max_size=7)


@settings(max_examples=15, deadline=None)
@given(rows=TABLES, data=st.data())
def test_rows_are_those_of_the_file_whatever_they_hold(tmp_path_factory, rows, data):
    """Columns that rows lack stay missing, and one column may hold values of several types."""
    file = tmp_path_factory.mktemp("rows") / "a.jsonl"
    stored = read_rows(written(file, rows))
    start = data.draw(st.integers(0, len(rows)))
    part = stored[start:]
    assert list(stored) == rows
    assert list(part) == [part[i] for i in range(len(part))] == rows[start:]
    assert column_names(stored) == list(dict.fromkeys(name for row in rows for name in row))
    assert set(column_names(part)) == {name for row in rows[start:] for name in row}


def test_rows_of_many_batches_keep_their_places(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "BATCH", 3)
    monkeypatch.setattr("marlhf.data.rows.BATCH", 2)
    for name, count in (("a", 8), ("b", 4)):
        written(tmp_path / f"{name}.jsonl", [{"x": f"{name}{i}"} for i in range(count)])
    rows = read_rows(str(tmp_path))
    wanted = [f"a{i}" for i in range(8)] + [f"b{i}" for i in range(4)]
    for start, stop in ((0, 12), (1, 12), (5, 9), (8, 12), (2, 3), (4, 4)):
        part = rows[start:stop]
        assert [row["x"] for row in part] == wanted[start:stop]
        assert [part[i]["x"] for i in range(len(part))] == wanted[start:stop]


def test_digests_are_those_of_earlier_versions(tmp_path):
    """A checkpoint holds them, and a resume under another version compares them."""
    rows = [
        {"prompt": "one", "n": 1, "note": None},
        {"prompt": [{"role": "user", "content": "héllo"}], "x": [1, {"a": 2.5}]},
        {"prompt": "two\n", "n": "1"},
    ]
    file = written(tmp_path / "d.jsonl", rows)
    prompts, _ = load_rows(DataSettings(path=file, eval_rows=0))
    assert fact_of(prompts) == fact_of(list(prompts))
    assert fact_of(prompts)["sha256"].startswith("6ac0410116840673ddde880d03985fbe6decd215")
    answers = [(letter, " " + 5 * letter) for letter in "abcdef"]
    rows = [{"prompt": f"say {a}", "completion": b, "chosen": a + "!", "rejected": 3 * a}
            for a, b in answers]  # fmt: skip
    file = written(tmp_path / "d.jsonl", rows)
    made = examples(file)
    assert fact_of(made.rows) == fact_of(list(made.rows))
    assert fact_of(made.rows)["sha256"].startswith("de77492beeaf03e199d2a0e576733fff5a01f0b6")
    data = PairDataSettings(path=file, eval_rows=0)
    config = RewardConfig(model=ModelSettings(path="x"), data=data, max_length=9)
    pairs = load_preferences(config, TOKENIZER)
    assert fact_of(pairs.pairs)["sha256"].startswith("052decbaca8b3c8f8d1e43059d1393ed9eeeb6dd")
    shown = RowDigest(pairs.demonstrations).fact["sha256"]
    assert shown.startswith("e6883e648a7f25f3ed4f573f02c2d01362c712e99ca3d649a74b75766a14510d")


# when it is built


def test_a_second_start_tokenises_nothing(tmp_path, monkeypatch):
    file = written(tmp_path / "d.jsonl", [{"prompt": "ab", "completion": c * 9} for c in "xyz"])
    first = examples(file)

    def refuse(*_: Any) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(demonstrations, "encode", refuse)
    again = examples(file)
    assert list(again.rows) == list(first.rows)
    assert again.lengths.tolist() == first.lengths.tolist() == [9, 9, 9]
    assert (again.truncated, again.left_out, again.notes) == (3, 0, first.notes)
    with pytest.raises(AssertionError, match="tokenised again"):
        examples(file, max_length=8)


def test_a_changed_file_is_read_again(tmp_path):
    """Even with the size and the time of the one before."""
    file = Path(written(tmp_path / "d.jsonl", [{"prompt": "ab", "completion": "cd"}]))
    assert TOKENIZER.decode(examples(str(file)).rows[0].ids) == "<s>abcd</s>"
    state = file.stat()
    written(file, [{"prompt": "ab", "completion": "ef"}])
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert file.stat().st_size == state.st_size
    assert TOKENIZER.decode(examples(str(file)).rows[0].ids) == "<s>abef</s>"


@pytest.mark.parametrize("change", ["template", "date", "special", "library", "settings"])
def test_what_examples_depend_on_makes_them_anew(tmp_path, monkeypatch, cache, change):
    file = written(tmp_path / "d.jsonl", [{"prompt": "ab", "completion": "cd"}])
    examples(file)
    before = {path.name for path in cache.glob("examples-*")}
    examples(file)
    assert {path.name for path in cache.glob("examples-*")} == before
    changed = byte_tokenizer(add_bos=change != "special", chat_template=CHATML)
    if change == "template":
        changed.chat_template += "\n"
    if change == "date":
        changed.template_date = "2020-01-01"
    if change == "library":
        versions = {**store._versions(), "transformers": "0"}
        monkeypatch.setattr(store, "_versions", lambda: versions)
    monkeypatch.setattr(f"{__name__}.TOKENIZER", changed)
    examples(file, **({"loss_on": "all"} if change == "settings" else {}))
    assert len(list(cache.glob("examples-*"))) > len(before)


BUILD = """
import sys, time
from pathlib import Path
import pyarrow as pa
from marlhf.data.store import stored

folder, seconds = Path(sys.argv[1]), float(sys.argv[2])
def build(writer):
    with (folder / "builds").open("a") as log:
        log.write("x")
    writer.new_table(pa.schema([("n", pa.int64())]))
    for n in range(3):
        writer.write(pa.record_batch([[n]], names=["n"]))
        (folder / "begun").touch()
        time.sleep(seconds)
    return {"sum": 3}
entry = stored("test", ["key"], build)
print(entry.facts["sum"], sum(map(len, entry.tables)))
"""


def building(folder: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BUILD, str(folder), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_of_two_processes_one_builds(tmp_path):
    both = [building(tmp_path, 0.3) for _ in range(2)]
    assert [process.communicate()[0] for process in both] == ["3 3\n"] * 2
    assert (tmp_path / "builds").read_text() == "x"


def test_a_killed_process_leaves_nothing_that_is_used(tmp_path):
    killed = building(tmp_path, 60)
    while not (tmp_path / "begun").exists():
        assert killed.poll() is None
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert building(tmp_path, 0).communicate()[0] == "3 3\n"
    assert (tmp_path / "builds").read_text() == "xx"


def test_an_error_in_a_row_is_no_entry(tmp_path, cache):
    file = written(tmp_path / "d.jsonl", [{"prompt": "a"}, {"prompt": " "}])
    for _ in range(2):
        with pytest.raises(UserError, match="data: row 1: the prompt is empty"):
            load_rows(DataSettings(path=file, eval_rows=0))
    assert not list(cache.glob("prompts-*[!k]"))
    assert not list(cache.glob("*.partial"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: os.truncate(entry / "00000.arrow", 200),
        lambda entry: (entry / "00000.arrow").unlink(),
        lambda entry: ((entry / "00000.arrow").unlink(), os.mkfifo(entry / "00000.arrow")),
        lambda entry: (entry / "facts.json").unlink(),
        lambda entry: (entry / "facts.json").write_text("["),
        lambda entry: (entry / "facts.json").write_text("[" * 100_000),
        lambda entry: (shutil.rmtree(entry), entry.write_text("a file")),
        lambda entry: (shutil.rmtree(entry), entry.symlink_to("nowhere")),
    ],
)
def test_an_entry_that_is_not_as_it_was_written_is_made_anew(tmp_path, cache, damage):
    file = written(tmp_path / "d.jsonl", [{"prompt": "a"}] * 3)
    before = [*read_rows(file)]
    (entry,) = cache.glob("rows-*[!k]")
    damage(entry)
    assert [*read_rows(file)] == before
    assert (entry / "00000.arrow").is_file()


def test_an_entry_with_a_damaged_table_is_named(tmp_path, cache):
    file = written(tmp_path / "d.jsonl", [{"prompt": "a"}] * 3)
    read_rows(file)
    (table,) = cache.glob("rows-*/00000.arrow")
    table.write_bytes(bytes(table.stat().st_size))
    for read in (lambda: read_rows(file), lambda: load_rows(DataSettings(path=file, eval_rows=0))):
        with pytest.raises(UserError, match=rf"data: '{table.parent}' in the cache .* delete it"):
            [*read()]


# what it needs


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    file = written(tmp_path / "d.jsonl", [{"prompt": "a"}])
    (tmp_path / "taken").touch()
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "taken"))
    with pytest.raises(UserError) as error:
        read_rows(file)
    assert "taken/marlhf" in str(error.value)
    assert "HF_DATASETS_CACHE names another folder" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    if not disks.mounted(disk, 400):
        pytest.skip("the system does not let this process mount a disk")
    try:
        monkeypatch.setenv("HF_DATASETS_CACHE", str(disk))
        file = written(tmp_path / "d.jsonl", [{"prompt": "long " * 2000} for _ in range(100)])
        with pytest.raises(UserError, match=r"data: cannot write in .*full; .*HF_DATASETS_CACHE"):
            read_rows(file)
        assert not [path for path in (disk / "marlhf").iterdir() if path.suffix != ".lock"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_full_temporary_folder_is_one_line(tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    if not disks.mounted(disk, 8):
        pytest.skip("the system does not let this process mount a disk")
    try:
        monkeypatch.setattr("tempfile.tempdir", str(disk))
        with pytest.raises(UserError, match="the disk is full; TMPDIR names another folder"):
            tokenizer_key(TOKENIZER)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_prompts_do_not_stay_in_memory(tmp_path, monkeypatch):
    """3 MB of them: a list of rows would hold more."""
    for module in ("store", "rows"):
        monkeypatch.setattr(f"marlhf.data.{module}.BATCH", 100)
    file = written(tmp_path / "d.jsonl", [{"prompt": f"{i} " + "word " * 200} for i in range(3000)])
    load_rows(DataSettings(path=written(tmp_path / "e.jsonl", [{"prompt": "a"}]), eval_rows=0))
    tracemalloc.start()
    try:
        prompts, held_out = load_rows(DataSettings(path=file, eval_rows=64))
        held, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (len(prompts), len(held_out)) == (2936, 64)
    assert prompts[2935].text.startswith("2935 word")
    assert held < 5e5
    assert most < 2e6


# tokens without tokenising


def normalised(form: str) -> Any:
    tokenizer = deepcopy(byte_level())
    tokenizer.backend_tokenizer.normalizer = getattr(normalizers, form)()
    return tokenizer


BOUNDED = {"wordpiece": wordpiece(), "byte_level": byte_level(), "bytes": TOKENIZER}
BOUNDED |= {form: normalised(form) for form in ("NFC", "NFD", "NFKC", "NFKD")}
ODD = "\u0958\U0001d160\ufdfa\u0344"  # which normalisers make longer
WHOLE = st.characters(exclude_categories=["Cs"])  # tokenizers take no half of a character
EXPANDING = st.text(WHOLE | st.sampled_from(ODD), max_size=20)


@settings(max_examples=100, deadline=None)
@given(text=EXPANDING, name=st.sampled_from(sorted(BOUNDED)))
def test_no_text_has_more_tokens_than_its_bound(text, name):
    tokenizer, size = BOUNDED[name], len(text.encode())
    bound = token_bound(tokenizer)
    (ids,) = encode_texts(tokenizer, [text], [True])
    assert bound is not None
    assert len(ids) <= bound(size)


def test_a_tokenizer_that_adds_spaces_has_no_bound():
    (ids,) = encode_texts(unigram(), ["z"], [True])
    assert len(ids) > 1
    assert token_bound(unigram()) is None
