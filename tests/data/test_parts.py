"""Datasets with a preset: parts by document, rows that break the schema, settings."""

from __future__ import annotations

import json
import logging
import random
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.presets import (
    MAKERS,
    dialogue_row,
    save_jsonl,
    summary_row,
)

from marlhf.common.errors import UserError
from marlhf.config import DataSettings, PPOConfig, SFTConfig
from marlhf.config.loading import config_from_dict
from marlhf.data.presets import Example, RowError, Source, build_preset, unit_hash
from marlhf.data.prompts import load_records, load_rows

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


# parts


def parts_of(name: str, path: Path, **changes: Any) -> dict[str, list[str]]:
    """Part -> prompts of its rows, without the held-out ones."""
    parts = [p for p in ("sft", "reward", "ppo") if (name, p) != (APPS, "reward")]
    found = {
        part: [row["prompt"] for row in load(name, path, "ppo", part=part, **changes)[0]]
        for part in parts
    }
    found["held_out"] = [row["prompt"] for row in load(name, path, "evaluate", **changes)[0]]
    return found


@pytest.mark.parametrize("name", MAKERS)
def test_parts_are_disjoint_complete_and_of_the_papers_sizes(tmp_path, name):
    path = save_jsonl(tmp_path, name, rows_of(name, 1200))
    parts = parts_of(name, path)
    prompts = [prompt for part in parts.values() for prompt in part]
    assert len(set(prompts)) == len(prompts) == 1200
    shares = {"sft": 0.2, "ppo": 0.8} if name == APPS else {"sft": 0.2, "reward": 0.4, "ppo": 0.4}
    assert abs(len(parts["held_out"]) - 0.05 * 1200) < 30
    for part, share in shares.items():
        expected = share * 0.95 * 1200
        assert abs(len(parts[part]) - expected) < 4 * (expected * (1 - share)) ** 0.5, part


@pytest.mark.parametrize("name", MAKERS)
def test_parts_do_not_depend_on_the_order_of_rows_nor_on_other_rows(tmp_path, name):
    rows = rows_of(name, 200)
    parts = parts_of(name, save_jsonl(tmp_path / "a", name, rows))
    random.Random(1).shuffle(rows)
    shuffled = parts_of(name, save_jsonl(tmp_path / "b", name, rows))
    assert {p: sorted(x) for p, x in parts.items()} == {p: sorted(x) for p, x in shuffled.items()}
    assert parts["held_out"] == shuffled["held_out"], "an order of their own"
    fewer = parts_of(name, save_jsonl(tmp_path / "c", name, rows[:150]))
    assert all(set(fewer[part]) <= set(parts[part]) for part in parts)


def test_the_seed_decides_on_the_parts(tmp_path):
    path = save_jsonl(tmp_path, HH, rows_of(HH, 200))
    assert parts_of(HH, path) == parts_of(HH, path, part_seed=1234)
    other = parts_of(HH, path, part_seed=7)
    assert set(parts_of(HH, path)["ppo"]) != set(other["ppo"])


def test_jobs_get_their_own_part(tmp_path):
    path = save_jsonl(tmp_path, HH, rows_of(HH, 200))
    parts = parts_of(HH, path)
    for stage in ("sft", "reward", "ppo"):
        assert [row["prompt"] for row in load(HH, path, stage)[0]] == parts[stage]
        assert [row["prompt"] for row in load(HH, path, stage, limit=3)[0]] == parts[stage][:3]
        _, held_out = load(HH, path, stage, eval_rows=5)
        assert [row["prompt"] for row in held_out] == parts["held_out"][:5]
    with_sft = load(HH, path, "ppo", part="sft")[0]
    assert [row["prompt"] for row in with_sft] == parts["sft"]
    everything = load(HH, path, "sft", part="all")[0]
    assert len(everything) == 200 - len(parts["held_out"]) < 200
    assert len(load(HH, path, "evaluate", part="all", eval_rows=9)[0]) == 200
    assert len(load(HH, path, "evaluate", eval_rows=5)[0]) == 5
    fails("data.part: .* has no part for 'held_out'", HH, path, "ppo", part="held_out")


def test_all_rows_of_a_document_are_in_one_part(tmp_path):
    """A dialogue and its later turns; a post compared several times, under another subreddit."""
    dialogues = [dialogue_row(i, turns) for i in range(60) for turns in (1, 2, 3)]
    parts = parts_of(HH, save_jsonl(tmp_path / "hh", HH, dialogues))
    first = {
        part: {p.partition("\n\nAssistant:")[0] for p in prompts} for part, prompts in parts.items()
    }
    assert sum(map(len, first.values())) == 60
    assert all(len(parts[part]) == 3 * len(first[part]) for part in parts)

    again = [summary_row(i, post=f"Post  {i // 3}" + " " * (i % 2)) for i in range(180)]
    for i, row in enumerate(again):
        row["info"]["subreddit"] = f"r{i % 3}"
    path = save_jsonl(tmp_path / "tldr", TLDR, again)
    parts = parts_of(TLDR, path)
    posts = {part: {p.split("\n")[2].strip() for p in x} for part, x in parts.items()}
    assert sum(map(len, posts.values())) == 60


def test_prompts_come_once_and_demonstrations_and_comparisons_all(tmp_path):
    rows = [summary_row(i, post="The same post.") for i in (1, 3, 0, 1)]
    for row in rows:
        row["info"]["subreddit"] = "all"
    path = save_jsonl(tmp_path, TLDR, rows)
    everything = {"part": "all", "eval_path": "none"}
    assert len(load(TLDR, path, "reward", **everything)[0]) == 4
    assert len(load(TLDR, path, "sft", **everything)[0]) == 4
    (prompt,) = load(TLDR, path, "ppo", **everything)[0]
    assert prompt["reference"] == " Keep the kettle?", "of the third row, null in the others"
    assert prompt["id"] == "t3_1"


def test_held_out_documents_are_never_among_the_training_data(tmp_path):
    train = save_jsonl(tmp_path / "copy", HH, rows_of(HH, 100))
    save_jsonl(tmp_path / "copy", HH, [dialogue_row(i) for i in range(90, 120)], "test")
    held_out = load(HH, train.parent, "evaluate")[0]
    assert len(held_out) == 20
    known = {row["prompt"] for row in load(HH, train.parent, part="all")[0]}
    assert len(known) == 100, "where there is a test split, nothing else is held out"
    assert not known & {row["prompt"] for row in held_out}
    own = save_jsonl(tmp_path / "own", HH, [dialogue_row(i) for i in range(99, 102)])
    assert len(load(HH, train.parent, eval_path=str(own), eval_rows=9)[1]) == 2
    same = save_jsonl(tmp_path / "same", HH, [dialogue_row(5)])
    fails("every document of the held-out data is in the training data", HH, train.parent,
          eval_path=str(same), eval_rows=9)  # fmt: skip


def test_a_copy_too_small_to_hold_anything_out_says_so(tmp_path):
    path = save_jsonl(tmp_path, HH, rows_of(HH, 3))
    fails(r"data.eval_split: none of the documents .* 5% held out; .*data.part=all in evaluation",
          HH, path, "evaluate")  # fmt: skip
    assert len(load(HH, path, "evaluate", part="all")[0]) == 3


@settings(max_examples=50, deadline=None)
@given(text=st.text(), seed=st.integers(-(2**63), 2**63 - 1))
def test_hashes_are_in_range_and_white_space_does_not_count(text, seed):
    assert 0 <= unit_hash(text, seed) < 1
    assert unit_hash(f" {text}\n ", seed) == unit_hash(text, seed)


def test_hashes_never_change_between_versions():
    assert [round(unit_hash(text, 1234), 6) for text in ("a", "b")] == [0.407342, 0.51495]


# rows that break the schema


BROKEN = {
    TLDR: [
        ({"info": None}, "info is null"),
        ({"info": {"post": None, "article": " "}}, "info.post and info.article are both null"),
        ({"info": {"post": 3}}, "info.post is 3"),
        ({"choice": 2}, "choice is 2, must be 0 or 1"),
        ({"choice": None}, "choice is null"),
        ({"summaries": []}, "summaries has 0 entries, must have 2"),
        ({"summaries": [{"text": "x"}, {"text": None}]}, "summaries.1: text is null"),
    ],
    HH: [
        ({"chosen": None}, "chosen is null"),
        ({"prompt": "\n\nHuman: \n\nAssistant:"}, "prompt is empty"),
        ({"rejected": ["x"]}, r"rejected is \['x'\]"),
    ],
    WEBGPT: [
        ({"question": "Who?"}, "question is 'Who\\?'"),
        ({"question": {"full_text": " "}}, "question.full_text is empty"),
        ({"score_0": "high"}, "score_0 is 'high'"),
        ({"score_0": float("nan")}, "a score is not finite"),
        ({"answer_1": None}, "answer_1 is null"),
    ],
    APPS: [
        ({"question": None}, "question is null"),
        ({"solutions": "print(1)"}, "solutions is not valid JSON"),
        ({"solutions": '{"a": 1}'}, "solutions is no list of texts"),
        (
            {"input_output": '{"inputs": [1], "outputs": []}'},
            "column .input_output.: .* must be lists of one length",
        ),
        ({"input_output": "[" * 100000}, "input_output is not valid JSON"),
    ],
}
CASES = [(name, change, fault) for name, cases in BROKEN.items() for change, fault in cases]


@pytest.mark.parametrize(("name", "change", "fault"), CASES)
def test_broken_rows_are_named_and_left_out(tmp_path, caplog, name, change, fault):
    rows = rows_of(name)
    rows[7] = {**rows[7], **change}
    stage = "sft"
    with caplog.at_level(logging.WARNING):
        found, _ = load(name, save_jsonl(tmp_path, name, rows), stage, part="all")
    (record,) = caplog.records
    message = record.getMessage()
    assert f"1 of the 40 rows of {tmp_path / 'train.jsonl'} (train) break the schema" in message
    assert re.search(rf"row 7: {fault}", message)
    assert found
    fails(f"data.min_good_rows: given 1, and 1 of the 40 rows .*row 7: {fault}",
          name, tmp_path / "train.jsonl", stage, part="all", min_good_rows=1.0)  # fmt: skip


def test_a_column_that_is_missing_everywhere(tmp_path):
    rows = [{k: v for k, v in row.items() if k != "chosen"} for row in rows_of(HH)]
    fails(
        r"data.min_good_rows: given 0.95, and 40 of the 40 rows .* break the schema of "
        r"Dahoas/full-hh-rlhf: row 0: chosen is missing; .*row 4: chosen is missing; "
        r"also rows 5, .*, 24; and 15 more. Is data.preset that of this data\?",
        HH,
        save_jsonl(tmp_path, HH, rows),
    )


@pytest.mark.parametrize(("broken", "fine"), [(2, True), (3, False)])
def test_the_share_of_good_rows(tmp_path, broken, fine):
    rows = rows_of(HH)
    for i in range(broken):
        rows[i * 3]["prompt"] = None
    path = save_jsonl(tmp_path, HH, rows)
    if fine:
        load(HH, path)
    else:
        fails("3 of the 40 rows", HH, path)
        load(HH, path, min_good_rows=0.9)


# settings


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"preset": HH, "prompt_template": "{a}"}, "data.prompt_template: given '{a}', but preset"),
        ({"preset": HH, "prompt_column": "a"}, "data.prompt_column: given 'a', but preset"),
        ({"preset": HH, "columns": {"a": "b"}}, "data.columns: given {'a': 'b'}, but preset"),
        ({"preset": HH, "name": "x"}, "data.name: given 'x', but preset"),
        ({"part": "sft"}, "data.part: given 'sft', but it belongs to data.preset"),
        ({"part_seed": 1}, "data.part_seed: given 1, but it belongs to data.preset"),
        ({"min_good_rows": 0.5}, "data.min_good_rows: given 0.5, but it belongs to data.preset"),
        ({"preset": HH, "part": "dev"}, "data.part: given 'dev', must be 'auto'"),
        ({"preset": HH, "min_good_rows": 1.5}, "data.min_good_rows: given 1.5, must be at most 1"),
    ],
)
def test_keys_that_do_not_go_together(values, fault):
    with pytest.raises(UserError, match=f"^{fault}"):
        config_from_dict(PPOConfig, {"model": {"path": "m"}, "data": values})


def test_keys_of_the_sft_job_that_do_not_go_with_a_preset():
    for key in ("completion_column", "completion_template", "text_column"):
        values = {"model": {"path": "m"}, "data": {"preset": HH, key: "x"}}
        with pytest.raises(UserError, match=f"^data.{key}: given 'x', but preset"):
            config_from_dict(SFTConfig, values)


def test_names_and_arguments_are_checked(tmp_path):
    path = save_jsonl(tmp_path, HH, rows_of(HH))
    fails(
        "data.preset: no data.preset is called 'openai/summarise_from_feedback'; did you mean "
        "'openai/summarize_from_feedback'",
        "openai/summarise_from_feedback",
        path,
    )
    fails("data.preset codeparrot/apps: solutions: given 0", {"name": APPS, "solutions": 0}, path)
    fails("data.preset openai/.*: config: given 'axes', must be 'comparisons' or 'axis'",
          {"name": TLDR, "config": "axes"}, path)  # fmt: skip
    fails(
        "data.part: the dataset codeparrot/apps has no part for 'reward'; possible: sft, ppo, all$",
        APPS,
        path,
        "reward",
    )


def test_prompts_of_the_ppo_job_go_through_the_usual_reader(tmp_path):
    path = save_jsonl(tmp_path, APPS, rows_of(APPS, 60))
    data = DataSettings(preset=APPS, path=str(path), eval_rows=2, apply_chat_template=True)
    prompts, held_out = load_rows(data)
    assert len(held_out) == 2
    assert prompts[0].messages == [{"role": "user", "content": prompts[0].text}]
    assert json.loads(prompts[0].columns["input_output"])["inputs"]


# presets of the user's own


def plain(row: dict[str, Any]) -> Example:
    if row["q"] == "":
        raise RowError("q is empty")
    return Example(f"Q: {row['q']}\nA:", (f" {row['a']}",), None, {"a": row["a"]})


def no_example(row: dict[str, Any]) -> dict[str, Any]:
    return dict(row)


class Custom:
    source = Source("me/mine", shares={"sft": 0.5, "ppo": 0.5})

    def __init__(self, mark: str = "?") -> None:
        self.mark = mark

    def __call__(self, row: dict[str, Any]) -> Example:
        return Example(f"{row['q']}{self.mark}")


def test_a_preset_of_ones_own_by_import_path(tmp_path, caplog):
    rows = [{"q": f"q{i}", "a": i} for i in range(50)] + [{"q": "", "a": 1}, {"a": 1}]
    path = save_jsonl(tmp_path, "own", rows)
    here = __name__
    found, _ = load(f"{here}.plain", path, "sft", part="all", min_good_rows=0.9)
    assert found[0]["prompt"].startswith("Q: q")
    assert "row 50: q is empty; row 51: KeyError: 'q'" in caplog.text
    halves = [
        {row["prompt"] for row in load({"name": f"{here}.Custom", "mark": "!"}, path, stage)[0]}
        for stage in ("ppo",)
    ]
    assert all(prompt.endswith("!") for prompt in halves[0])
    fails("has no part for 'reward'", f"{here}.Custom", path, "reward")
    with pytest.raises(UserError, match=r"data.path: missing; the preset .* does not know one"):
        load_records(DataSettings(preset=f"{here}.plain"), "sft")
    fails("row 0: became a dict, no Example", f"{here}.no_example", path)
    with pytest.raises(UserError, match="takes no arguments; given x"):
        build_preset({"name": f"{here}.plain", "x": 1})
