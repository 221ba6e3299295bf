"""Win rates by a judge and by human raters.

Both compare the first response to each prompt, at the first temperature.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from marlhf.common.errors import say
from marlhf.data.prompts import Prompt
from marlhf.evaluation.bench import Bench
from marlhf.evaluation.judge import Judge, ResponsePair
from marlhf.evaluation.raters import read_ratings, score, write_file
from marlhf.evaluation.records import Judged, Records

JUDGEMENTS = "judgements.jsonl"


def pairs_of(bench: Bench, baseline: str, rows: Sequence[int]) -> dict[str, list[ResponsePair]]:
    """Pair every other policy's responses with the baseline's."""
    temperature, lines = bench.config.swept_temperatures[0], bench.samples.lines

    def response(label: str, row: int) -> str:
        return lines[label, temperature, row, 0]["response"]

    return {
        source.label: [
            ResponsePair(
                source.label,
                row,
                _readable(bench.prompts[row]),
                response(source.label, row),
                response(baseline, row),
            )
            for row in rows
        ]
        for source in bench.sources
        if source.label != baseline
    }


def _readable(prompt: Prompt) -> str:
    """A prompt's text for a judge or rater; a conversation names its speakers."""
    messages = prompt.messages or []
    if [message["role"] for message in messages] in ([], ["user"]):
        return prompt.text
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


def judge_pairs(bench: Bench, results: dict[str, Any], folder: Path) -> None:
    """Add the judge's win rates to the results, even if it stops half-way. Raises UserError."""
    settings = bench.config.judge
    assert settings is not None
    judge = Judge(settings, Records(folder / JUDGEMENTS, ["key"], schema=Judged))
    rows = range(min(settings.limit or len(bench.prompts), len(bench.prompts)))
    pairs = pairs_of(bench, _baseline(results), rows)
    all_pairs = [pair for of_policy in pairs.values() for pair in of_policy]
    questions = judge.open_questions(all_pairs)
    try:
        if questions:
            say(judge.estimate(questions))
            notice = judge.ask(questions, bench.track) if _agreed(settings.ask) else "not asked"
            if notice is not None:
                say(f"judge: {notice}; {len(judge.open_questions(all_pairs))} answers are missing")
    finally:
        results["judge"] = judge.usage(all_pairs)
        for policy, of_policy in pairs.items():
            win_rates = judge.result(of_policy, bench.config.resamples, bench.config.seed)
            _add(bench, results, policy, "judge", win_rates)


def rate_pairs(bench: Bench, results: dict[str, Any], folder: Path) -> None:
    """Write the raters' file, and add their win rates to the results. Raises UserError."""
    settings, seed = bench.config.raters, bench.config.seed
    assert settings is not None
    rows = list(range(len(bench.prompts)))
    if settings.limit is not None and settings.limit < len(rows):
        rows = sorted(random.Random(seed).sample(rows, settings.limit))
    pairs = pairs_of(bench, _baseline(results), rows)
    all_pairs = [pair for of_policy in pairs.values() for pair in of_policy]
    path = write_file(all_pairs, settings, folder, seed)
    if not settings.ratings:
        say(f"raters: fill in copies of {path}, then run again with raters.ratings=[FILE, ...]")
        return
    ratings = {name: read_ratings(name) for name in settings.ratings}
    for policy, of_policy in pairs.items():
        win_rates = score(of_policy, ratings, folder, bench.config.resamples, seed)
        _add(bench, results, policy, "raters", win_rates)


def _agreed(ask: bool) -> bool:
    """Ask at a terminal whether to continue; without one, continue."""
    if not (ask and sys.stdin.isatty() and sys.stderr.isatty()):
        return True
    print("continue? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _baseline(results: Mapping[str, Any]) -> str:
    return results["comparisons"][0]["baseline"]


def _add(
    bench: Bench, results: Mapping[str, Any], policy: str, source: str, win_rates: Any
) -> None:
    """Put a win rate in the entry of its comparison."""
    compared = (policy, bench.config.swept_temperatures[0])
    for entry in results["comparisons"]:
        if (entry["policy"], entry["temperature"]) == compared:
            entry["win_rates"][source] = win_rates
