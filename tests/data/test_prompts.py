"""Files to rows, and rows to prompts."""

from __future__ import annotations

import json
import time
from pathlib import Path

import datasets
import pytest
from support.tiny_models import CHATML, byte_tokenizer

from marlhf.common.types import UserError
from marlhf.config import DataSettings
from marlhf.data.encoding import check_prompts, encode
from marlhf.data.files import looks_local
from marlhf.data.prompts import Prompt, as_prompts, load_rows, render

ROWS = [{"prompt": f"prompt {i}", "answer": i, "note": None} for i in range(6)]
USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Well"}
SHARED = Path(__file__).parents[3] / "shared/data/debian_summaries.jsonl"


def load(path, **changes):
    train, held_out = load_rows(DataSettings(path=str(path), **{"eval_rows": 0, **changes}))
    return list(train), list(held_out)


def fails(match, path, **changes):
    with pytest.raises(UserError, match=match) as error:
        load(path, **changes)
    assert "\n" not in str(error.value)


def write_jsonl(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(prompts):
    return [p.text for p in prompts]


# formats


def save_jsonl(folder):
    return write_jsonl(folder / "rows.jsonl")


def save_json(folder):
    (folder / "rows.json").write_text(json.dumps(ROWS, indent=1))
    return folder / "rows.json"


def save_lines_as_json(folder):
    return write_jsonl(folder / "rows.json")


def save_csv(folder):
    lines = ["prompt,answer,note", *(f'"prompt {i}",{i},' for i in range(6))]
    (folder / "rows.csv").write_text("\n".join(lines))
    return folder / "rows.csv"


def save_parquet(folder):
    datasets.Dataset.from_list(ROWS).to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


def save_to_disk(folder):
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    return folder / "saved"


def save_dict_to_disk(folder):
    rows, other = datasets.Dataset.from_list(ROWS), datasets.Dataset.from_list(ROWS[:1])
    datasets.DatasetDict(train=rows, test=other).save_to_disk(folder / "saved")
    return folder / "saved"


def save_parquet_folder(folder):
    (folder / "data").mkdir()
    for i, part in enumerate((ROWS[:4], ROWS[4:])):
        datasets.Dataset.from_list(part).to_parquet(folder / f"data/train-0000{i}-of-00002.parquet")
    datasets.Dataset.from_list(ROWS[:1]).to_parquet(folder / "data/test-00000.parquet")
    (folder / "dataset_infos.json").write_text("{}")
    (folder / ".cache").mkdir()
    (folder / ".cache/train.parquet").write_text("not a data file")
    return folder


def save_jsonl_folder(folder):
    write_jsonl(folder / "a.jsonl", ROWS[:3])
    write_jsonl(folder / "b.jsonl", ROWS[3:])
    return folder


FORMATS = [
    save_jsonl,
    save_json,
    save_lines_as_json,
    save_csv,
    save_parquet,
    save_to_disk,
    save_dict_to_disk,
    save_parquet_folder,
    save_jsonl_folder,
]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_half_of_a_cut_emoji_stops_no_run(tmp_path, name):
    rows = [{"prompt": "cut \ud83d", "\udc00": ["\ud83d"]}, {"prompt": "whole \U0001f600"}]
    prompts, _ = load(write_jsonl(tmp_path / name, rows))
    assert texts(prompts) == ["cut ?", "whole \U0001f600"]
    assert prompts[0].columns == {"?": ["?"]}
    encode(texts(prompts), byte_tokenizer(), 100)


@pytest.mark.parametrize("save", FORMATS)
def test_every_format_gives_the_same_prompts(tmp_path, save):
    train, held_out = load(save(tmp_path))
    assert held_out == []
    assert texts(train) == [row["prompt"] for row in ROWS]
    answers = map(str, range(6)) if save is save_csv else range(6)
    assert [p.columns["answer"] for p in train] == list(answers)
    assert set(train[0].columns) == {"answer", "note"}


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_line_ends_at_its_line_break_alone(tmp_path, name):
    text = "one\u2028two\x85three"
    lines = [json.dumps({"prompt": text}, ensure_ascii=False)] * 2
    (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
    train, _ = load(tmp_path / name)
    assert texts(train) == [text, text]


@pytest.mark.parametrize("save", [save_dict_to_disk, save_parquet_folder])
def test_splits(tmp_path, save):
    path = save(tmp_path)
    assert texts(load(path, split="test")[0]) == ["prompt 0"]
    train, held_out = load(path, eval_split="test", eval_rows=5)
    assert len(train) == 6
    assert texts(held_out) == ["prompt 0"]
    fails("data.split: given 'validation', but .* has test, train alone", path, split="validation")
    fails("data.eval_split: given 'dev'", path, eval_split="dev")


@pytest.mark.parametrize("save", [save_jsonl, save_to_disk, save_jsonl_folder])
def test_what_has_one_split_has_train(tmp_path, save):
    fails("data.split: given 'test', but .* has train alone", save(tmp_path), split="test")


def test_limit_and_held_out_rows(tmp_path):
    path = save_jsonl(tmp_path)
    train, held_out = load(path, limit=5, eval_rows=2)
    assert texts(train) == ["prompt 0", "prompt 1", "prompt 2"]
    assert texts(held_out) == ["prompt 3", "prompt 4"]
    other = write_jsonl(tmp_path / "other.jsonl", [{"prompt": f"other {i}"} for i in range(3)])
    train, held_out = load(path, limit=5, eval_path=str(other), eval_rows=2)
    assert len(train) == 5
    assert texts(held_out) == ["other 0", "other 1"]
    assert load(path, eval_path=str(other), eval_rows=0)[1] == []
    for count in (6, 64):
        fails(f"data.eval_rows: given {count}, must be less than the 6 rows", path, eval_rows=count)


# faults of files


def test_a_local_path_that_does_not_exist_is_never_looked_up(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("looked up on the hub")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", fail)
    for path in ("./rows", "/no/such", "~/no_such", "rows.jsonl", "a/b/c", "data/x.csv", "a b"):
        assert looks_local(path)
        fails("data.path: given .* does not exist", path)
    fails("data.path: is empty", "")
    assert not looks_local("imdb")
    assert not looks_local("openai/summarize_from_feedback")


def test_a_hub_that_cannot_be_reached_is_one_quick_line(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", offline)
    start = time.perf_counter()
    fails("data.path: given 'no/such_name', which is no file or folder here; .* cannot be reached",
          "no/such_name")  # fmt: skip
    assert time.perf_counter() - start < 5
    from huggingface_hub import constants

    assert not constants.HF_HUB_OFFLINE, "put back as it was"


def test_a_hub_dataset_is_asked_for_with_name_and_split(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *a, **k: None)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    train, held_out = load(
        "org/set", name="en", split="dev", eval_split="test", limit=4, eval_rows=1
    )
    assert asked == [
        (("org/set", "en"), {"split": "dev"}),
        (("org/set", "en"), {"split": "test"}),
    ]
    assert len(train) == 4
    assert len(held_out) == 1


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("a.jsonl", '{"prompt": "x"}\n\n{"prompt": }\n', "line 3: not valid JSON"),
        ("a.jsonl", '{"prompt": "x"}\n["y"]\n', "line 2: holds a list, must be an object"),
        ("a.jsonl", "", "has no rows"),
        ("a.json", '[{"prompt": "x"},\n oops]', "line 2: not valid JSON"),
        ("a.json", '["x"]', "must hold a list of objects"),
        ("a.json", "[]", "has no rows"),
        ("a.csv", "prompt,answer\nx,1\ny,2,3\n", "line 3: has 3 cells, the header has 2"),
        ("a.csv", "", "has no rows"),
        ("a.csv", "prompt\n", "has no rows"),
        ("a.parquet", "no parquet", "cannot be read"),
        ("a.txt", "prompt", "must end in .csv, .json, .jsonl, .parquet"),
    ],
)
def test_unreadable_files(tmp_path, name, content, fault):
    (tmp_path / name).write_text(content)
    fails(rf"data\.path: .*{fault}", tmp_path / name)


def test_more_unreadable_things(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    fails("not UTF-8 text", tmp_path / "a.jsonl")
    (tmp_path / "none").mkdir()
    fails("has no file that ends in", tmp_path / "none")
    broken = save_to_disk(tmp_path)
    (broken / "state.json").write_text("{}")
    fails("cannot be read", broken)
    fails("data.name: given 'en', but .* is local", save_jsonl(tmp_path), name="en")
    fails("data.eval_path: given 'x.csv', which does not exist",
          save_jsonl(tmp_path), eval_path="x.csv", eval_rows=1)  # fmt: skip
    with pytest.raises(UserError, match=r"data\.path: missing"):
        load_rows(DataSettings())


# columns and templates


def test_columns_are_renamed(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"q": "Q", "a": "A", "b": "B"}])
    (prompt,), _ = load(path, columns={"prompt": "q", "summary": "a"})
    assert prompt == Prompt("Q", None, {"b": "B", "summary": "A"})
    (prompt,), _ = load(path, columns={"q": "a", "a": "q"}, prompt_column="q")
    assert prompt == Prompt("A", None, {"a": "Q", "b": "B"})
    fails("data.columns.prompt: no column is called 'x'; the data has q, a, b",
          path, columns={"prompt": "x"})  # fmt: skip
    fails("data.columns.b: the data already has a column", path, columns={"b": "q"})


def fill(template, **columns):
    rows = [{"document": "DOC", "n": 3, "my column": "MINE", **columns}]
    return as_prompts(rows, DataSettings(prompt_template=template))[0].text


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("Summarize:\n{document}", "Summarize:\nDOC"),
        ("{n}. {document} / {document}", "3. DOC / DOC"),
        ("{my column}!", "MINE!"),
        ('{{"text": "{document}"}}', '{"text": "DOC"}'),
        ("{{{document}}} {{n}}", "{DOC} {n}"),
        ('{"text": "{document}"}', '{"text": "DOC"}'),
        ('{"a": {"b": "{document}"}}', '{"a": {"b": "DOC"}}'),
        ("if (x) { {document}", "if (x) { DOC"),
        ("{} {document}", "{} DOC"),
        ("{1, 2} {document}", "{1, 2} DOC"),
    ],
)
def test_templates(template, expected):
    assert fill(template) == expected


def test_a_value_with_braces_is_not_filled_again():
    assert fill("{document}", document="{n} {{n}} {x}") == "{n} {{n}} {x}"


def test_templates_keep_every_column_for_rewards():
    settings = DataSettings(prompt_template="{a}")
    assert as_prompts([{"a": "A", "b": 1}], settings) == [Prompt("A", None, {"a": "A", "b": 1})]


@pytest.mark.parametrize(
    ("rows", "changes", "fault"),
    [
        ([{"a": 1, "b": 2}], {}, r"data.prompt_column: no column is called 'prompt'; .* has a, b"),
        ([{"a": "x"}], {"prompt_template": "{b}"}, "prompt_template: no column is called 'b'.* a$"),
        ([{"a": "x"}], {"prompt_template": "{'k': {b}}"}, "no column is called 'b'"),
        ([{"a": "x"}], {"prompt_template": "hello"}, "names no column"),
        (
            [{"a": "x", "b": "y"}],
            {"prompt_template": "{a}", "prompt_column": "b"},
            "data.prompt_column: given 'b', but prompt_template does not use it",
        ),
        ([{"a": "x"}, {"a": None}], {"prompt_template": "{a}"}, "row 1: column 'a' .* is null"),
        ([{"a": "x"}, {"a": " "}], {"prompt_template": "T: {a}"}, "row 1: the prompt is empty"),
        ([{"a": ["x"]}], {"prompt_template": "{a}"}, "row 0: column 'a' of the prompt is list"),
        ([{"prompt": "x"}, {"prompt": " \n"}], {}, "data: row 1: the prompt is empty"),
        ([{"prompt": "x"}, {"prompt": 3}], {}, "row 1: the prompt is int, must be text or a list"),
        ([{"prompt": "x"}, {"other": "y"}], {}, "row 1: the prompt is null"),
        ([{"prompt": []}], {}, "row 0: the prompt is empty"),
        ([{"prompt": [USER, "x"]}], {}, "row 0: message 1 is 'x', must be"),
        ([{"prompt": [{"role": "user"}]}], {}, "row 0: message 0 is .*must be"),
        ([{"prompt": [{"role": "user", "content": ["x"]}]}], {}, "row 0: message 0"),
        ([{"prompt": [{"role": "user", "content": " "}]}], {}, "row 0: the prompt is empty"),
    ],
)
def test_bad_rows_are_one_line(tmp_path, rows, changes, fault):
    fails(fault, write_jsonl(tmp_path / "a.jsonl", rows), **changes)


def test_held_out_rows_keep_their_number(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [*ROWS, {"prompt": ""}])
    fails("held-out data: row 6: the prompt is empty", path, eval_rows=2)
    other = write_jsonl(tmp_path / "b.jsonl", [{"prompt": ""}])
    fails(
        "held-out data: row 0: the prompt is empty",
        save_jsonl(tmp_path),
        eval_path=str(other),
        eval_rows=1,
    )


def test_some_empty_columns_are_fine():
    assert fill("{document}\n{note}", note="") == "DOC\n"


# prompts from Python


def test_as_prompts_takes_every_form():
    assert as_prompts([]) == []
    assert as_prompts(["a", "b"]) == [Prompt("a"), Prompt("b")]
    assert as_prompts([[USER, ASSISTANT]]) == [Prompt("Hi\n\nWell", [USER, ASSISTANT])]
    given = [Prompt("a", None, {"x": 1})]
    assert as_prompts(given) == given
    expected = [Prompt(r["prompt"], None, {"answer": r["answer"], "note": None}) for r in ROWS]
    dataset = datasets.Dataset.from_list(ROWS)
    assert as_prompts(ROWS) == as_prompts(iter(ROWS)) == expected
    assert list(as_prompts(dataset)) == as_prompts(dataset)[:] == expected
    assert list(as_prompts(dataset.select([4, 0]))) == [expected[4], expected[0]]
    frame = as_prompts(dataset.to_pandas())
    assert texts(frame) == texts(expected)
    chats = datasets.Dataset.from_list([{"prompt": [USER, ASSISTANT], "k": 1}])
    assert list(as_prompts(chats)) == [Prompt("Hi\n\nWell", [USER, ASSISTANT], {"k": 1})]
    turns = {"prompt": {"role": ["user"], "content": ["Hi"]}}
    assert as_prompts([turns]) == [Prompt("Hi", [USER])]
    extra = {"prompt": [{**USER, "name": None, "id": 3}]}
    assert as_prompts([extra])[0].messages == [{**USER, "id": 3}]


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        ("text", "given a str"),
        (datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)), "choose one of its splits"),
        (["a", ""], "row 1: the prompt is empty"),
        ([3], "row 0: the prompt is int"),
    ],
)
def test_as_prompts_refuses(data, fault):
    with pytest.raises(UserError, match=fault):
        as_prompts(data)


# chat templates


def test_render():
    tokenizer = byte_tokenizer(chat_template=CHATML)
    (plain,) = as_prompts(["Hi"])
    assert render(plain, tokenizer) == "Hi"
    chat = "<s>user\nHi</s>\n<s>assistant\n"
    (conversation,) = as_prompts([[USER]])
    assert render(conversation, tokenizer) == chat
    (continued,) = as_prompts([[USER, ASSISTANT]])
    assert render(continued, tokenizer) == chat + "Well"
    wrap = DataSettings(apply_chat_template=True)
    (wrapped,) = as_prompts(["Hi"], wrap)
    assert wrapped == Prompt("Hi", [USER])
    assert render(wrapped, tokenizer) == chat
    (filled,) = as_prompts(
        [{"d": "Hi"}], DataSettings(prompt_template="{d}", apply_chat_template=True)
    )
    assert filled == Prompt("Hi", [USER], {"d": "Hi"})


def test_unusable_chat_templates_are_found_beforehand():
    prompts = as_prompts(["plain", [USER], [{"role": "system", "content": "S"}, USER]])
    check_prompts([prompts], byte_tokenizer(chat_template=CHATML))
    check_prompts([prompts[:1]], byte_tokenizer())
    with pytest.raises(UserError, match=r"^model.chat_template: must be given"):
        check_prompts([prompts], byte_tokenizer())
    strict = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no\nsystem') }}{% endif %}x"
    )
    check_prompts([prompts[:2]], byte_tokenizer(chat_template=strict))
    with pytest.raises(UserError, match=r"refuses the prompt 'S.*: no system"):
        check_prompts([prompts], byte_tokenizer(chat_template=strict))


# real data


@pytest.mark.skipif(not SHARED.is_file(), reason="the Debian summaries are not on this machine")
def test_real_summaries():
    train, held_out = load(
        SHARED, prompt_template="Summarize:\n{document}", eval_rows=64, apply_chat_template=True
    )
    assert len(train) + len(held_out) == 10949
    assert train[0].text.startswith("Summarize:\n")
    assert train[0].columns["summary"]
    assert train[0].messages == [{"role": "user", "content": train[0].text}]
