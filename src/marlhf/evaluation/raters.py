"""Blinded files for human raters, and the win rates of their ratings."""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

from marlhf.common.errors import UserError, one_line
from marlhf.common.paths import reading, text_file, write_atomically, writing
from marlhf.config import RaterSettings
from marlhf.data.file_formats import parse_json, read_cells
from marlhf.evaluation.judge import ResponsePair
from marlhf.evaluation.records import RESUME_HINT, fingerprint
from marlhf.evaluation.statistics import win_rate

COLUMNS = ("id", "prompt", "response_a", "response_b", "rating")
KEY_FILE = "raters_key.jsonl"
_RATINGS = ("a", "b", "tie")


def files(settings: RaterSettings, folder: Path) -> tuple[Path, Path]:
    """The file to be filled in, and its key."""
    return folder / f"raters.{settings.format}", folder / KEY_FILE


def write_file(
    pairs: Sequence[ResponsePair], settings: RaterSettings, folder: Path, seed: int
) -> Path:
    """Write `raters.csv` (or .jsonl), to be filled in, and the key that undoes the blinding.

    Pairs and the two sides of each are shuffled by the seed; identical responses are left out. A
    file that exists is never touched, as somebody may be filling it in. Raises UserError where it
    is about other responses, or filled in and without its key.
    """
    path, key_path = files(settings, folder)
    rows, key = _blinded(pairs, seed)
    key_text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in key)
    text = _text(rows, settings.format)
    with reading("raters", folder):
        if (key_path.exists() and key_path.read_bytes() != key_text.encode()) or (
            path.exists() and not key_path.exists() and path.read_bytes() != text.encode()
        ):
            raise UserError(
                f"raters: {str(path)!r} lacks its key, {KEY_FILE}, or is about other responses; "
                "choose another output_dir, or move both files away"
            )
    with writing("output_dir", folder, RESUME_HINT):
        if not key_path.exists():
            write_atomically(key_path, key_text)
        if not path.exists():
            write_atomically(path, text)
    return path


def _blinded(
    pairs: Sequence[ResponsePair], seed: int
) -> tuple[list[dict[str, str]], list[dict[str, Any]]]:
    """Rows to fill in, and the key: for each, which side is the policy's."""
    generator = random.Random(seed)
    rows, key = [], []
    differing = [pair for pair in pairs if not pair.identical]
    for pair in generator.sample(differing, len(differing)):
        name = _pair_id(pair)
        policy_first = generator.random() < 0.5
        sides = (
            (pair.response, pair.baseline_response)
            if policy_first
            else (pair.baseline_response, pair.response)
        )
        rows.append(dict(zip(COLUMNS, (name, pair.prompt, *sides, ""), strict=True)))
        side = "a" if policy_first else "b"
        key.append({"id": name, "policy": pair.policy, "row": pair.row, "policy_is": side})
    return rows, key


def _pair_id(pair: ResponsePair) -> str:
    return fingerprint(pair.policy, pair.row, pair.prompt, pair.response, pair.baseline_response)


def _text(rows: Sequence[dict[str, str]], form: str) -> str:
    if form == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(COLUMNS)
    writer.writerows([_cell(row[name]) for name in COLUMNS] for row in rows)
    return file.getvalue()


def _cell(text: str) -> str:
    """A CSV cell that no spreadsheet runs as a formula: a blank goes before it.

    Null characters are replaced, as not every reader of CSV takes them.
    """
    text = text.replace("\0", "\ufffd")
    return " " + text if text[:1] in ("=", "+", "-", "@") else text


def read_ratings(path: str) -> dict[str, str]:
    """Read `{id: a, b or tie}` from a filled-in file; unrated rows are left out.

    Raises UserError, naming the row.
    """
    file = text_file(path, "raters.ratings")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"raters.ratings: {path!r} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"raters.ratings: cannot read {path!r}: {one_line(error)}") from None
    try:
        rows = _rows(text, file.suffix)
    except (ValueError, RecursionError) as error:
        raise UserError(f"raters.ratings: {path!r} is no CSV or JSONL: {one_line(error)}") from None
    ratings: dict[str, str] = {}
    for number, row in enumerate(rows, 1):
        location = f"raters.ratings: {path!r}, row {number}"
        if not isinstance(row, dict) or not {"id", "rating"} <= row.keys():
            raise UserError(f"{location}: has no `id` and `rating`")
        rating = str(row["rating"] or "").strip().lower()
        if not rating:
            continue
        if rating not in _RATINGS:
            cell = one_line(row["rating"], 40)
            raise UserError(f"{location}: rating {cell!r} must be A, B, tie, or empty")
        name = str(row["id"])
        if name in ratings:
            raise UserError(f"{location}: {one_line(repr(name), 60)} is there twice")
        ratings[name] = rating
    return ratings


def _rows(text: str, suffix: str) -> list[Any]:
    if suffix == ".jsonl":
        return [parse_json(line) for line in text.split("\n") if line.strip()]
    header = next(iter(text.splitlines()), "")
    # spreadsheets write semicolons where the comma is the decimal point
    delimiter = ";" if ";" in header and "," not in header else ","
    return list(read_cells(io.StringIO(text, newline=""), delimiter))


def score(
    pairs: Sequence[ResponsePair],
    ratings: dict[str, dict[str, str]],
    folder: Path,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Win rate of these pairs' policy, by `{file: its ratings}`.

    Raters of one pair are averaged; identical responses are ties. `agreement` is the share of
    equal ratings among all rater pairs per pair. Raises UserError for an unknown id.
    """
    lines = (folder / KEY_FILE).read_text(encoding="utf-8").split("\n")[:-1]
    key = {line["id"]: line for line in map(json.loads, lines)}
    for path, by_id in ratings.items():
        unknown = sorted(by_id.keys() - key.keys())
        if unknown:
            raise UserError(
                f"raters.ratings: {path!r} rates {unknown[0]!r}, which is not in "
                f"{str(folder / KEY_FILE)!r}"
            )
    outcomes, unanswered, equal, rater_pairs = [], 0, 0, 0
    for pair in pairs:
        name = _pair_id(pair)
        if pair.identical:
            outcomes.append([0.5])
            continue
        of_pair = [by_id[name] for by_id in ratings.values() if name in by_id]
        side = key[name]["policy_is"]
        outcomes.append([0.5 if rating == "tie" else float(rating == side) for rating in of_pair])
        unanswered += not of_pair
        equal += sum(x == y for x, y in combinations(of_pair, 2))
        rater_pairs += len(of_pair) * (len(of_pair) - 1) // 2
    rates = asdict(win_rate(outcomes, resamples, seed))
    agreement = equal / rater_pairs if rater_pairs else None
    identical = sum(pair.identical for pair in pairs)
    return rates | {"unanswered": unanswered, "identical": identical, "agreement": agreement}
