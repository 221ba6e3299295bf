"""Rewards of segments: where they are, what they are shown, where they land."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.runs import PROMPTS, tiny_trainer
from support.tiny_models import BYTES_VOCAB, byte_tokenizer, tiny_sequence_classifier

from marlhf.common.errors import UserError
from marlhf.rewards import PerSegment, RewardModel, build_rewards

TEXT = "One two. Three!  Four\n\nfive? six"
SENTENCES = ["One two.", "Three!", "Four", "five?", "six"]


def characters(prompts: list[str], completions: list[str]) -> list[float | None]:
    return [None if "!" in c else float(len(c)) for c in completions]


def length_in_column(prompts: list[str], completions: list[str], factor: list[int]) -> list[float]:
    return [len(c) * f for c, f in zip(completions, factor, strict=True)]


def ends(text: str, segments: list[str]) -> list[int]:
    return [text.index(segment) + len(segment) for segment in segments]


def test_each_sentence_has_its_score_at_its_end() -> None:
    (pairs, nothing) = PerSegment({"name": f"{__name__}.characters"})(["p", "p"], [TEXT, " \n "])
    wanted = {s: e for s, e in zip(SENTENCES, ends(TEXT, SENTENCES), strict=True) if "!" not in s}
    assert pairs == [(end, float(len(s))) for s, end in wanted.items()]
    assert nothing is None


def test_a_reward_can_be_shown_the_response_so_far() -> None:
    (pairs,) = PerSegment(f"{__name__}.characters", read="response", boundary=", ")(
        ["p"], ["a, bc"]
    )
    assert pairs == [(1, 1.0), (5, 5.0)]


def test_columns_are_passed_on_and_asked_for() -> None:
    reward = PerSegment(f"{__name__}.length_in_column")
    assert reward.needed_columns == ["factor"]
    assert reward(["p", "q"], ["ab. c", "d"], factor=[1, 10]) == [[(3, 3), (5, 1)], [(1, 10)]]
    with pytest.raises(UserError, match="needs the column 'factor'"):
        build_rewards(reward).check_columns(["prompt"])


def test_a_reward_model_scores_each_segment_end(tmp_path: Path) -> None:
    path = str(tmp_path / "rm")
    tiny_sequence_classifier("llama", BYTES_VOCAB, seed=3).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    (pairs,) = PerSegment({"name": path, "weight": 2.0}, read="response")(["p"], ["One. Two."])
    wanted = RewardModel(path)(["p", "p"], ["One.", "One. Two."])
    assert pairs is not None
    assert [end for end, _ in pairs] == [4, 9]
    assert [score for _, score in pairs] == pytest.approx([2 * float(w or 0) for w in wanted])


def test_several_densities_in_a_run(tmp_path: Path) -> None:
    models: list[Any] = [
        {"name": "per_segment", "reward": {"name": "length", "target": 2}, "weight": 0.3},
        {"name": "per_segment", "reward": {"name": "length", "target": 9}, "boundary": "[aeiou]"},
        {"name": "length", "target": 5},
    ]
    row = tiny_trainer(tmp_path, score=models).step(PROMPTS)
    names = ("per_segment", "per_segment_2", "length")
    values = [row[f"reward_{name}_mean"] for name in names]
    assert all(values)
    assert row["score_mean"] == pytest.approx(0.3 * values[0] + values[1] + values[2], rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ({}, r"given no argument; its parameters are reward, boundary, read"),
        ({"reward": "length"}, r"reward per_segment: .*reward length: given no argument"),
        ({"reward": "sentiment", "read": "all"}, r"read: given 'all', must be"),
        ({"reward": "sentiment", "boundary": "("}, r"boundary: given '\(', not a valid regex"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict[str, Any], fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        build_rewards({"name": "per_segment", **arguments})


def test_rewards_inside_a_segment_are_refused() -> None:
    inside = {"name": "regex", "pattern": "a", "mode": "inside"}
    with pytest.raises(UserError, match="gives rewards inside a text itself"):
        PerSegment(inside)(["p"], ["a"])
