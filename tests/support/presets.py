"""A few rows of each dataset that has a preset, in the hub's schema; the texts are made up.

Among them is what the real data has too: optional fields left out, ties, empty answers, problems
without tests or solutions, one document in several rows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
from datasets import Value

Row = dict[str, Any]

TEXT, INT = Value("string"), Value("int32")
_INFO = dict.fromkeys(("id", "post", "title", "subreddit", "site", "article"), TEXT)
_SUMMARY = dict.fromkeys(("text", "policy", "note"), TEXT)
_AXES = dict.fromkeys(("overall", "accuracy", "coverage", "coherence"), INT)
_ABOUT = dict.fromkeys(("worker", "batch", "split"), TEXT)
_QUOTES = {"title": [TEXT], "extract": [TEXT]}
_TOKENS = {"prefix": [INT], "completion": [INT]}

FEATURES = {
    "openai/summarize_from_feedback": datasets.Features(
        {
            "info": _INFO,
            "summaries": [_SUMMARY],
            "choice": INT,
            **_ABOUT,
            "extra": {"confidence": INT},
        }
    ),
    "axis": datasets.Features(
        {"info": _INFO, "summary": {**_SUMMARY, "axes": _AXES | {"compatible": Value("bool")}}}
        | _ABOUT
    ),
    "Dahoas/full-hh-rlhf": datasets.Features(
        dict.fromkeys(("prompt", "response", "chosen", "rejected"), TEXT)
    ),
    "openai/webgpt_comparisons": datasets.Features(
        {
            "question": {"dataset": TEXT, "id": TEXT, "full_text": TEXT},
            **{
                f"{name}_{i}": kind
                for i in (0, 1)
                for name, kind in [
                    ("quotes", _QUOTES),
                    ("answer", TEXT),
                    ("tokens", _TOKENS),
                    ("score", Value("float32")),
                ]
            },
        }
    ),
    "codeparrot/apps": datasets.Features(
        {"problem_id": Value("int64")}
        | dict.fromkeys(("question", "solutions", "input_output", "difficulty", "url"), TEXT)
        | {"starter_code": TEXT}
    ),
}

THINGS = ["kettle", "ladder", "garden", "bicycle", "piano", "window", "letter", "train"]


def summary_row(i: int, post: str | None = None, **changes: Any) -> Row:
    """A comparison; every second row has a human summary, and the posts' own title."""
    thing = THINGS[i % len(THINGS)]
    info: Row = {
        "id": f"t3_{i}",
        "post": post or f"My {thing} broke, for the {i}. time, and my aunt laughed. Keep it?",
        "title": f"The {thing}",
        "subreddit": "relationships" if i % 3 else None,
        "site": None,
        "article": None,
    }
    summaries = [
        {"text": f" {thing} broke, aunt laughed.", "policy": "sup2", "note": "ok"},
        {"text": f" Keep the {thing}?", "policy": "sup4" if i % 2 else "ref", "note": None},
    ]
    row = {"info": info, "summaries": summaries, "choice": i % 2, "worker": "w", "batch": "batch3"}
    return {**row, "split": "train", "extra": {"confidence": None}, **changes}


def article_row(i: int) -> Row:
    """A comparison of summaries of a news article, as the validation split has them."""
    row = summary_row(i)
    article = f"The mayor opened bridge {i} on Monday, in the rain."
    row["info"] = {**row["info"], "post": None, "title": None, "subreddit": None}
    row["info"] |= {"article": article, "site": "cnn"}
    return {**row, "split": "valid2"}


def axis_row(i: int) -> Row:
    """One summary and its marks."""
    row = summary_row(i)
    axes = {"overall": 5, "accuracy": 7, "coverage": 4, "coherence": 6, "compatible": None}
    summary = {**row["summaries"][1], "axes": axes}
    return {"info": row["info"], "summary": summary} | {n: row[n] for n in _ABOUT}


def dialogue_row(i: int, turns: int = 1, **changes: Any) -> Row:
    thing = THINGS[i % len(THINGS)]
    prompt = f"\n\nHuman: Where do I put {i} {thing}s?\n\nAssistant:"
    for turn in range(1, turns):
        prompt += f" Over there.\n\nHuman: And {turn} more?\n\nAssistant:"
    chosen = f" Next to the other {thing}s."
    row = {"prompt": prompt, "response": chosen, "chosen": chosen, "rejected": " No idea."}
    return {**row, **changes}


def question_row(i: int, **changes: Any) -> Row:
    thing = THINGS[i % len(THINGS)]
    quotes = {"title": [f"All about {thing}s"], "extract": [f"A {thing} is old."]}
    tokens = {"prefix": [1, 2, i], "completion": [3]}
    score = [1.0, -0.5, 0.25][i % 3]
    row: Row = {
        "question": {"dataset": "eli5", "id": f"q{i}", "full_text": f"Who made {thing} {i}?"},
        "answer_0": f"A smith made the {thing} [1], they say (in a book) [2].",
        "answer_1": f"The {thing} was never made.",
    }
    for side, sign in (("0", 1), ("1", -1)):
        row |= {f"quotes_{side}": quotes, f"tokens_{side}": tokens, f"score_{side}": sign * score}
    return {**row, **changes}


def problem_row(i: int, **changes: Any) -> Row:
    """Problems read standard input, every third one is a function to be called."""
    called = i % 3 == 2
    tests: Row = {"inputs": [f"{i}\n"], "outputs": [f"{i + i}\n"]}
    solutions = ["print(int(input()) * 2)", "n = int(input())\nprint(n + n)"]
    starter = ""
    if called:
        tests = {"fn_name": "double", "inputs": [[i]], "outputs": [i + i]}
        solutions = ["def double(n):\n    return n * 2"]
        starter = "def double(n):\n\t"
    row = {
        "problem_id": i,
        "question": f"Print {i} doubled, for {THINGS[i % len(THINGS)]}s.",
        "solutions": json.dumps(solutions),
        "input_output": json.dumps(tests),
        "difficulty": ["introductory", "interview", "competition"][i % 3],
        "url": "",
        "starter_code": starter,
    }
    return {**row, **changes}


MAKERS = {
    "openai/summarize_from_feedback": summary_row,
    "Dahoas/full-hh-rlhf": dialogue_row,
    "openai/webgpt_comparisons": question_row,
    "codeparrot/apps": problem_row,
}


def save_jsonl(folder: Path, name: str, rows: list[Row], split: str = "train") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{split}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def as_dataset(name: str, rows: list[Row]) -> datasets.Dataset:
    return datasets.Dataset.from_list(rows, features=FEATURES[name])


def save_parquet(folder: Path, name: str, rows: list[Row], split: str = "train") -> Path:
    """As on the hub's Parquet branch: split/0000.parquet."""
    path = folder / split / "0000.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    as_dataset(name, rows).to_parquet(str(path))
    return path
