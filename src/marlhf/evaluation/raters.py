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
from marlhf.common.paths import text_file, write_whole, writing
from marlhf.config import RaterSettings
from marlhf.evaluation.judge import Pair
from marlhf.evaluation.records import GO_ON, fingerprint
from marlhf.evaluation.statistics import win_rate

COLUMNS = ("id", "prompt", "response_a", "response_b", "rating")
KEY_FILE = "raters_key.jsonl"
_RATINGS = ("a", "b", "tie")


def write_file(pairs: Sequence[Pair], settings: RaterSettings, folder: Path, seed: int) -> Path:
    """Write `raters.csv` (or .jsonl), to be filled in, and the key that undoes the blinding.

    Pairs and the two sides of each are shuffled by the seed; identical responses are left out. A
    file that exists with its key is never touched, as somebody may be filling it in. Raises
    UserError where it is about other responses.
    """
    path, key_path = folder / f"raters.{settings.format}", folder / KEY_FILE
    rows, key = _blinded(pairs, seed)
    key_text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in key)
    if key_path.exists():
        if key_path.read_text(encoding="utf-8") != key_text:
            raise UserError(
                f"raters: {str(key_path)!r} belongs to a file about other responses; choose "
                "another output_dir, or move both files away"
            )
        if path.exists():
            return path
    with writing("output_dir", folder, GO_ON):
        write_whole(path, _text(rows, settings.format))
        write_whole(key_path, key_text)
    return path


def _blinded(pairs: Sequence[Pair], seed: int) -> tuple[list[dict[str, str]], list[dict[str, Any]]]:
    """Rows to fill in, and the key: for each, which side is the policy's."""
    generator = random.Random(seed)
    rows, key = [], []
    shown = [pair for pair in pairs if not pair.identical]
    for pair in generator.sample(shown, len(shown)):
        name = _pair_id(pair)
        ours_first = generator.random() < 0.5
        sides = (pair.ours, pair.theirs) if ours_first else (pair.theirs, pair.ours)
        rows.append(dict(zip(COLUMNS, (name, pair.prompt, *sides, ""), strict=True)))
        ours = "a" if ours_first else "b"
        key.append({"id": name, "policy": pair.policy, "row": pair.row, "policy_is": ours})
    return rows, key


def _pair_id(pair: Pair) -> str:
    return fingerprint(pair.policy, pair.row, pair.prompt, pair.ours, pair.theirs)


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
    except (ValueError, csv.Error) as error:
        raise UserError(f"raters.ratings: {path!r} is no CSV or JSONL: {one_line(error)}") from None
    found: dict[str, str] = {}
    for number, row in enumerate(rows, 1):
        where = f"raters.ratings: {path!r}, row {number}"
        if not isinstance(row, dict) or not {"id", "rating"} <= row.keys():
            raise UserError(f"{where}: has no `id` and `rating`")
        rating = str(row["rating"] or "").strip().lower()
        if not rating:
            continue
        if rating not in _RATINGS:
            given = one_line(row["rating"], 40)
            raise UserError(f"{where}: rating {given!r} must be A, B, tie, or empty")
        if row["id"] in found:
            raise UserError(f"{where}: {row['id']!r} is there twice")
        found[row["id"]] = rating
    return found


def _rows(text: str, suffix: str) -> list[Any]:
    if suffix == ".jsonl":
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    header = text.partition("\n")[0]
    # spreadsheets write semicolons where the comma is the decimal point
    delimiter = ";" if ";" in header and "," not in header else ","
    return list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter))


def score(
    pairs: Sequence[Pair],
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
    for path, given in ratings.items():
        unknown = sorted(given.keys() - key.keys())
        if unknown:
            raise UserError(
                f"raters.ratings: {path!r} rates {unknown[0]!r}, which is not in "
                f"{str(folder / KEY_FILE)!r}"
            )
    outcomes, unanswered, equal, twos = [], 0, 0, 0
    for pair in pairs:
        name = _pair_id(pair)
        if pair.identical:
            outcomes.append([0.5])
            continue
        given = [found[name] for found in ratings.values() if name in found]
        ours = key[name]["policy_is"]
        outcomes.append([0.5 if x == "tie" else float(x == ours) for x in given])
        unanswered += not given
        equal += sum(x == y for x, y in combinations(given, 2))
        twos += len(given) * (len(given) - 1) // 2
    found = asdict(win_rate(outcomes, resamples, seed))
    agreement = equal / twos if twos else None
    identical = sum(pair.identical for pair in pairs)
    return found | {"unanswered": unanswered, "identical": identical, "agreement": agreement}
