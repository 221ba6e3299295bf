"""The file for human raters: blinded, left alone once written, and scored."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest
from support.evaluations import build_models, lines_of, results_of

from marlhf.common.errors import UserError
from marlhf.config import RaterSettings
from marlhf.evaluation.judge import ResponsePair
from marlhf.evaluation.raters import read_ratings, score, write_file

PAIRS = [
    ResponsePair("secret", i, f"prompt {i}, é", f"=ours {i}\nline; two", f"theirs {i}")
    for i in range(40)
]
SAME = ResponsePair("secret", 40, "prompt", "same", " same\n")


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(map(json.loads, file) if path.suffix == ".jsonl" else csv.DictReader(file))


def fill_in(path: Path, target: Path, rating: Any, delimiter: str = ",") -> str:
    """A copy rated by `rating(row)`."""
    rows = [row | {"rating": rating(row)} for row in rows_of(path)]
    with target.open("w", encoding="utf-8-sig", newline="") as file:
        if target.suffix == ".jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(file, rows[0].keys(), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    return str(target)


def prefers_ours(row: dict[str, str]) -> str:
    """Whoever wrote `ours` wins, but for every fourth prompt, a tie, and every fifth, a loss."""
    number = int(row["prompt"].split()[1].rstrip(","))
    side = "A" if "ours" in row["response_a"] else "B"
    if number % 4 == 0:
        return " Tie"
    return ("B" if side == "A" else "A") if number % 5 == 0 else side.lower()


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_a_file_is_blinded_shuffled_and_whole(form, tmp_path):
    path = write_file([*PAIRS, SAME], RaterSettings(format=form), tmp_path, seed=1)
    rows = rows_of(path)
    assert path.name == f"raters.{form}"
    assert "secret" not in path.read_text()
    assert [*rows[0]] == ["id", "prompt", "response_a", "response_b", "rating"]
    prompts = [row["prompt"] for row in rows]
    assert sorted(prompts) == sorted(pair.prompt for pair in PAIRS), "identical pairs are left out"
    assert prompts != [pair.prompt for pair in PAIRS]
    ours_first = ["ours" in row["response_a"] for row in rows]
    assert 10 < sum(ours_first) < 30
    for row in rows:
        number = row["prompt"].split()[1].rstrip(",")
        texts = {row["response_a"].strip(), row["response_b"].strip()}
        assert texts == {f"=ours {number}\nline; two", f"theirs {number}"}
        if form == "csv":  # a spreadsheet would run it
            assert not row["response_a"].startswith("=")


def test_the_seed_fixes_the_file(tmp_path):
    texts = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / name).mkdir()
        random.seed(len(texts))
        texts.append(write_file(PAIRS, RaterSettings(), tmp_path / name, seed).read_text())
    assert texts[0] == texts[1] != texts[2]


def test_a_file_that_may_be_being_filled_in_is_left_alone(tmp_path):
    path = write_file(PAIRS, RaterSettings(), tmp_path, seed=1)
    fill_in(path, path, prefers_ours)
    filled = path.read_text()
    assert write_file(PAIRS, RaterSettings(), tmp_path, seed=1) == path
    assert path.read_text() == filled
    with pytest.raises(UserError, match=r"raters: .*about other responses"):
        write_file(PAIRS[1:], RaterSettings(), tmp_path, seed=1)
    assert path.read_text() == filled


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_a_file_without_its_key_is_kept(form, tmp_path):
    settings = RaterSettings(format=form)
    path = write_file(PAIRS, settings, tmp_path, seed=1)
    key = tmp_path / "raters_key.jsonl"
    told, empty = key.read_bytes(), path.read_bytes()
    key.unlink()
    write_file(PAIRS, settings, tmp_path, seed=1)
    assert (key.read_bytes(), path.read_bytes()) == (told, empty), "nobody has rated: same again"
    path.unlink()
    write_file(PAIRS, settings, tmp_path, seed=1)
    assert (key.read_bytes(), path.read_bytes()) == (told, empty)
    fill_in(path, path, prefers_ours)
    rated = path.read_bytes()
    key.unlink()
    with pytest.raises(UserError, match="lacks its key"):
        write_file(PAIRS, settings, tmp_path, seed=1)
    assert path.read_bytes() == rated
    assert not key.exists()


@pytest.mark.parametrize(("form", "delimiter"), [("csv", ","), ("csv", ";"), ("jsonl", "")])
def test_ratings_are_scored(form, delimiter, tmp_path):
    path = write_file([*PAIRS, SAME], RaterSettings(format=form), tmp_path, seed=3)
    filled = fill_in(path, tmp_path / f"filled.{form}", prefers_ours, delimiter)
    found = score([*PAIRS, SAME], {filled: read_ratings(filled)}, tmp_path, 200, 0)
    ties = 1 + sum(i % 4 == 0 for i in range(40))
    losses = sum(i % 5 == 0 and i % 4 != 0 for i in range(40))
    assert (found["ties"], found["losses"]) == (ties, losses)
    assert found["wins"] == 41 - ties - losses
    assert found["rate"]["mean"] == pytest.approx((found["wins"] + ties / 2) / 41)
    assert (found["unanswered"], found["identical"], found["agreement"]) == (0, 1, None)


def test_several_raters_are_averaged_and_their_agreement_reported(tmp_path):
    path = write_file(PAIRS, RaterSettings(), tmp_path, seed=3)
    first = fill_in(path, tmp_path / "1.csv", prefers_ours)
    half = {row["id"] for row in rows_of(path)[:10]}
    second = fill_in(path, tmp_path / "2.csv", lambda row: "tie" if row["id"] in half else "")
    ratings = {name: read_ratings(name) for name in (first, second)}
    assert len(ratings[second]) == 10
    found = score(PAIRS, ratings, tmp_path, 200, 0)
    words = {row["id"]: prefers_ours(row).strip().lower() for row in rows_of(path)}
    assert found["agreement"] == pytest.approx(sum(words[x] == "tie" for x in half) / 10)
    assert found["wins"] + found["ties"] + found["losses"] == 50
    assert found["rate"]["prompts"] == 40


def test_what_is_not_rated_is_no_tie(tmp_path):
    path = write_file(PAIRS, RaterSettings(), tmp_path, seed=3)
    some = {row["id"] for row in rows_of(path)[:7]}
    filled = fill_in(path, tmp_path / "f.csv", lambda r: prefers_ours(r) if r["id"] in some else "")
    found = score(PAIRS, {filled: read_ratings(filled)}, tmp_path, 200, 0)
    assert found["unanswered"] == 33
    assert found["rate"]["prompts"] == 7


def test_a_file_with_long_texts_is_read_back(tmp_path):
    path = tmp_path / "filled.csv"
    path.write_text(f"id,prompt,rating\rx,{'long; ' * 50_000},A\r")
    assert read_ratings(str(path)) == {"x": "a"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,rating\nx,C\n", "row 1: rating 'C' must be A, B, tie, or empty"),
        ("id,rating\nx,A\nx,B\n", "row 2: 'x' is there twice"),
        ("id,score\nx,A\n", "row 1: has no `id` and `rating`"),
        ("id,rating\nnobody,A\n", "rates 'nobody', which is not in"),
    ],
)
def test_ratings_that_make_no_sense(text, message, tmp_path):
    write_file(PAIRS, RaterSettings(), tmp_path, seed=3)
    path = tmp_path / "filled.csv"
    path.write_text(text)
    with pytest.raises(UserError) as end:
        score(PAIRS, {str(path): read_ratings(str(path))}, tmp_path, 200, 0)
    assert message in str(end.value)
    assert "filled.csv" in str(end.value)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("no.csv", None, "does not exist"),
        ("x.jsonl", b"nonsense\n", "is no CSV or JSONL"),
        ("x.jsonl", b"[1]\n", "row 1: has no"),
        ("x.csv", b"\xff\xfe", "cannot read"),
        ("x.csv", b'id,rating\nx,"A\ny,B\n', "a quotation mark that is opened here is never"),
        ("x.csv", b"id,rating\nx,A\ny\n", "has 1 cells, the header has 2"),
        ("x.csv", b"id,rating,rating\nx,A,B\n", "the column 'rating' is given twice"),
        ("x.jsonl", b'{"id": "x", "rating": "A", "rating": "B"}', "the key 'rating' is given"),
        ("x.jsonl", b'{"id": [1], "rating": "A"}\n{"id": [1], "rating": "A"}', "is there twice"),
    ],
)
def test_files_that_are_no_ratings(name, data, message, tmp_path):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=f"raters.ratings: .*{message}"):
        read_ratings(str(tmp_path / name))


def test_raters_in_an_evaluation(tmp_path, capfd):
    build_models(tmp_path)
    policies = {"a": str(tmp_path / "a"), "b": str(tmp_path / "b"), "c": str(tmp_path / "run")}
    results = results_of(tmp_path, policies=policies, baseline="b", raters={"limit": 4})
    assert "raters" not in results["comparisons"][0]["win_rates"]
    path = tmp_path / "out" / "raters.csv"
    assert f"fill in copies of {path}" in capfd.readouterr().err
    rows = rows_of(path)
    assert len({row["prompt"] for row in rows}) == 4
    ours = {
        x["response"]
        for x in lines_of(tmp_path, "samples")
        if x["policy"] == "a" and x["sample"] == 0
    }
    filled = fill_in(
        path, tmp_path / "mine.csv", lambda r: "A" if r["response_a"].strip() in ours else "B"
    )
    raters = {"limit": 4, "ratings": [filled]}
    results = results_of(tmp_path, policies=policies, baseline="b", raters=raters)
    a, c = (entry["win_rates"]["raters"] for entry in results["comparisons"])
    assert (a["rate"]["mean"], a["wins"]) == (1.0, 4)
    assert (c["rate"]["mean"], c["identical"]) == (0.5, 4), "b and c have the same weights"
    with pytest.raises(UserError, match=r"ratings: 'nowhere\.csv' does not exist"):
        results_of(tmp_path, policies=["x", "y"], raters={"ratings": ["nowhere.csv"]})
