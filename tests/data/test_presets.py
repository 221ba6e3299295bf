"""Dataset presets: the paper's four datasets in the hub's schema, divided by document."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from support.presets import (
    MAKERS,
    article_row,
    as_dataset,
    axis_row,
    dialogue_row,
    problem_row,
    question_row,
    save_jsonl,
    save_parquet,
    summary_row,
)

from marlhf.common.errors import UserError
from marlhf.config import DataSettings
from marlhf.data.prompts import load_records

TLDR, HH, WEBGPT, APPS = MAKERS
JOBS = ("sft", "reward", "ppo", "evaluate")


def rows_of(name: str, count: int = 40) -> list[dict[str, Any]]:
    return [MAKERS[name](i) for i in range(count)]


def load(name: Any, path: Any, stage: Any = "ppo", **changes: Any):
    values = {"eval_rows": 0, **changes}
    return load_records(DataSettings(preset=name, path=str(path), **values), stage)


def fails(match: str, name: Any, path: Any, stage: Any = "ppo", **changes: Any) -> None:
    with pytest.raises(UserError, match=match) as error:
        load(name, path, stage, **changes)
    assert "\n" not in str(error.value)


def one(name: Any, row: dict[str, Any], tmp_path: Path, stage: Any) -> list[dict[str, Any]]:
    """What a job gets of a single row, which is not held out."""
    path = save_jsonl(tmp_path / "one", str(name), [row])
    settings = DataSettings(preset=name, path=str(path), part="all", eval_path="none", eval_rows=0)
    try:
        return load_records(settings, stage)[0]
    except UserError as error:
        if " gives no " not in str(error):
            raise
        return []


# what a row says: expected texts are written out from the released code's formats


def test_a_post_and_its_summaries(tmp_path):
    row = summary_row(1)
    prompt = (
        "POST\nSubreddit: r/relationships\nMy ladder broke, for the 1. time, and my aunt laughed. "
        "Keep it?\nTL;DR: "
    )
    chosen, other = " Keep the ladder?", " ladder broke, aunt laughed."
    assert one(TLDR, row, tmp_path, "sft") == [{"prompt": prompt, "completion": chosen}]
    pair = {"prompt": prompt, "chosen": chosen, "rejected": other}
    assert one(TLDR, row, tmp_path, "reward") == [pair]
    columns = {"reference": None, "subreddit": "relationships", "id": "t3_1"}
    assert one(TLDR, row, tmp_path, "ppo") == [{"prompt": prompt, **columns}]
    row["choice"] = 0
    pair = {"prompt": prompt, "chosen": other, "rejected": chosen}
    assert one(TLDR, row, tmp_path, "reward") == [pair]


def test_a_human_summary_is_the_reference_and_can_be_the_demonstration(tmp_path):
    row = summary_row(0)  # the second summary is by the author, the first is preferred
    assert one(TLDR, row, tmp_path, "evaluate")[0]["reference"] == " Keep the kettle?"
    (usual,) = one(TLDR, row, tmp_path, "sft")
    assert usual["completion"] == " kettle broke, aunt laughed."
    human = {"name": TLDR, "demonstrations": "human"}
    (demonstration,) = one(human, row, tmp_path, "sft")
    assert demonstration["completion"] == " Keep the kettle?"
    assert one(human, summary_row(1), tmp_path, "sft") == []


def test_optional_fields_of_a_post(tmp_path):
    (row,) = one(TLDR, article_row(3), tmp_path, "ppo")
    assert row["prompt"] == "ARTICLE\nThe mayor opened bridge 3 on Monday, in the rain.\nTL;DR: "
    empty = article_row(3)
    empty["info"] |= {"post": ""}
    assert one(TLDR, empty, tmp_path, "ppo") == [row]
    bare = {"info": {"post": "Help."}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 1}
    assert one(TLDR, bare, tmp_path, "sft") == [
        {"prompt": "POST\nHelp.\nTL;DR: ", "completion": "b"}
    ]


def test_marks_of_single_summaries(tmp_path):
    axis = {"name": TLDR, "config": "axis"}
    (prompt,) = one(axis, axis_row(0), tmp_path, "ppo")
    assert prompt["prompt"].startswith("POST\n")
    assert prompt["reference"] == " Keep the kettle?"
    (demonstration,) = one(axis, axis_row(0), tmp_path, "sft")
    assert demonstration["completion"] == " Keep the kettle?"
    assert one(axis, axis_row(1), tmp_path, "sft") == [], "not by a human"
    assert one(axis, axis_row(0), tmp_path, "reward") == []


def test_a_dialogue(tmp_path):
    row = dialogue_row(2, turns=2)
    prompt = (
        "\n\nHuman: Where do I put 2 gardens?\n\nAssistant: Over there."
        "\n\nHuman: And 1 more?\n\nAssistant:"
    )
    chosen = " Next to the other gardens."
    assert one(HH, row, tmp_path, "sft") == [{"prompt": prompt, "completion": chosen}]
    assert one(HH, row, tmp_path, "reward") == [
        {"prompt": prompt, "chosen": chosen, "rejected": " No idea."}
    ]
    assert one(HH, row, tmp_path, "ppo") == [{"prompt": prompt, "reference": chosen}]


def test_a_question_and_its_answers(tmp_path):
    prompt, smith = " Human: Who made kettle 0? Assistant:", " A smith made the kettle, they say."
    never = " The kettle was never made."
    assert one(WEBGPT, question_row(0), tmp_path, "reward") == [
        {"prompt": prompt, "chosen": smith, "rejected": never}
    ]
    assert one(WEBGPT, question_row(0), tmp_path, "ppo") == [{"prompt": prompt, "reference": smith}]
    turned = question_row(0, score_0=-1.0, score_1=1.0)
    assert one(WEBGPT, turned, tmp_path, "sft") == [{"prompt": prompt, "completion": never}]


def test_a_tie_gives_a_prompt_alone(tmp_path):
    tie = question_row(4, score_0=0.0, score_1=0.0)
    assert one(WEBGPT, tie, tmp_path, "sft") == one(WEBGPT, tie, tmp_path, "reward") == []
    (prompt,) = one(WEBGPT, tie, tmp_path, "ppo")
    assert prompt["reference"] is None


@pytest.mark.parametrize("empty", ["", " ", "[1]"])
def test_an_empty_answer_is_neither_demonstration_nor_one_of_a_pair(tmp_path, empty):
    worse = question_row(0, answer_1=empty)
    assert one(WEBGPT, worse, tmp_path, "reward") == []
    assert len(one(WEBGPT, worse, tmp_path, "sft")) == 1
    better = question_row(0, answer_0=empty)
    assert one(WEBGPT, better, tmp_path, "sft") == []
    assert len(one(WEBGPT, better, tmp_path, "ppo")) == 1


def test_two_equal_answers_are_no_pair(tmp_path):
    assert (
        one(HH, dialogue_row(0, rejected=" Next to the other kettles."), tmp_path, "reward") == []
    )


def test_problems(tmp_path):
    read = "\nQUESTION:\nPrint 0 doubled, for kettles.\nUse Standard Input format\nANSWER:\n"
    first, second = "print(int(input()) * 2)", "n = int(input())\nprint(n + n)"
    assert one(APPS, problem_row(0), tmp_path, "sft") == [
        {"prompt": read, "completion": first},
        {"prompt": read, "completion": second},
    ]
    single = {"name": APPS, "solutions": 1}
    assert one(single, problem_row(0), tmp_path, "sft") == [{"prompt": read, "completion": first}]
    (prompt,) = one(APPS, problem_row(2), tmp_path, "ppo")
    assert prompt == {
        "prompt": "\nQUESTION:\nPrint 2 doubled, for gardens.\ndef double(n):\n\t\n"
        "Use Call-Based format\nANSWER:\n",
        "input_output": '{"fn_name": "double", "inputs": [[2]], "outputs": [4]}',
        "starter_code": "def double(n):\n\t",
        "difficulty": "competition",
        "problem_id": 2,
        "reference": "def double(n):\n    return n * 2",
    }
    assert one(APPS, problem_row(0), tmp_path, "reward") == []


@pytest.mark.parametrize("none", ["", None, "{}", '{"inputs": [], "outputs": []}'])
def test_a_problem_without_tests_is_no_prompt(tmp_path, none):
    assert one(APPS, problem_row(0, input_output=none), tmp_path, "ppo") == []
    assert len(one(APPS, problem_row(0, input_output=none), tmp_path, "sft")) == 2


def test_a_problem_without_the_column_of_tests_has_its_solutions(tmp_path):
    row = problem_row(0)
    del row["input_output"]
    assert len(one(APPS, row, tmp_path, "sft")) == 2


@pytest.mark.parametrize(
    "tests",
    [
        {"inputs": [1], "outputs": [2]},
        {"inputs": ["1"], "outputs": ["2"], "fn_name": "f"},
        {"inputs": [["1"]], "outputs": ["2"], "fn_name": 3},
        {"inputs": ["1"]},
        [1],
    ],
)
def test_tests_that_the_reward_could_not_read_break_the_row(tmp_path, tests):
    with pytest.raises(UserError, match=r"break the schema.*input_output"):
        one(APPS, problem_row(0, input_output=json.dumps(tests)), tmp_path, "ppo")


@pytest.mark.parametrize("none", ["", None, "[]", '[" "]'])
def test_a_problem_without_solutions_is_no_demonstration(tmp_path, none):
    assert one(APPS, problem_row(0, solutions=none), tmp_path, "sft") == []
    (prompt,) = one(APPS, problem_row(0, solutions=none), tmp_path, "ppo")
    assert prompt["reference"] is None


def test_tests_with_long_numbers(tmp_path):
    tests = json.dumps({"fn_name": "f", "inputs": [[1]], "outputs": ["N"]})
    tests = tests.replace('"N"', "7" * 5000)
    assert len(one(APPS, problem_row(0, input_output=tests), tmp_path, "ppo")) == 1


# formats of copies


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("stage", JOBS)
def test_every_format_gives_the_same(tmp_path, name, stage):
    if (name, stage) == (APPS, "reward"):
        pytest.skip("no pairs")
    train = rows_of(name)
    test = [MAKERS[name](i) for i in range(100, 110)]
    lines = save_jsonl(tmp_path / "lines", name, train).parent
    save_jsonl(lines, name, test, "test")
    parquet = save_parquet(tmp_path / "parquet", name, train).parents[1]
    save_parquet(parquet, name, test, "test")
    both = {"train": as_dataset(name, train), "test": as_dataset(name, test)}
    datasets.DatasetDict(both).save_to_disk(str(tmp_path / "saved"))
    found = [
        load(name, path, stage, part="all", eval_split="test", eval_rows=4)
        for path in (lines, parquet, tmp_path / "saved")
    ]
    assert found[0] == found[1] == found[2]
    rows, held_out = found[0]
    assert len(rows) >= 25
    assert len(held_out) == (0 if stage == "evaluate" else 4)


def test_a_copy_of_the_parquet_branch_has_a_folder_for_each_configuration(tmp_path):
    save_parquet(tmp_path / "comparisons", TLDR, rows_of(TLDR))
    save_parquet(tmp_path / "axis", "axis", [axis_row(i) for i in range(100, 105)], "test")
    save_parquet(tmp_path / "comparisons", TLDR, [article_row(i) for i in range(4)], "validation")
    rows, held_out = load(TLDR, tmp_path, part="all", eval_rows=64)
    assert len(rows) == 40
    assert all(row["prompt"].startswith("ARTICLE") for row in held_out)
    axis = {"name": TLDR, "config": "axis"}
    assert len(load(axis, tmp_path, part="all", split="test", eval_path="none")[0]) == 5
    fails("data.split: given 'train', but .* has test alone", axis, tmp_path)


def test_the_hub_is_asked_for_the_parquet_branch_where_it_has_a_script(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return as_dataset(args[0], rows_of(args[0], 80))

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *a, **k: None)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    branch = "refs/convert/parquet"
    for name, folder, revision in [
        (TLDR, "comparisons", branch),
        (HH, None, None),
        (WEBGPT, "default", branch),
        (APPS, "all", branch),
    ]:
        load_records(DataSettings(preset=name, eval_rows=0), "sft")
        where = {"data_dir": folder, "revision": revision} if folder else {}
        assert asked.pop() == ((name, None), {"split": "train", **where})
    load_records(DataSettings(preset={"name": APPS, "level": "interview"}, eval_rows=0), "ppo")
    assert asked.pop()[1]["data_dir"] == "interview"


def test_a_folder_of_the_branch_is_one_configuration(tmp_path):
    """That is what `data_dir` means to `datasets`, on the hub as in a local folder."""
    for level, numbers in (("all", range(6)), ("interview", range(2))):
        save_parquet(tmp_path / level, APPS, [problem_row(i) for i in numbers])
    cache = str(tmp_path / "cache")
    found = datasets.load_dataset(str(tmp_path), data_dir="all", split="train", cache_dir=cache)
    assert len(found) == 6
