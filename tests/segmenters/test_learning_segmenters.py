"""Segmenters that look at the policy's entropy and at the phrases that it uses."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.responses import batch_of
from support.runs import tiny_trainer
from support.strategies import fast

from marlhf.common.errors import UserError
from marlhf.segmenters import EntropyJump, NGram, Phrases, Union, build_segmenter, learn, segment


def lengths(segmenter, *responses: list[int]) -> list[list[int]]:
    """The lengths of the macro actions of each response."""
    starts = segment(segmenter, batch_of(None, responses, padding=1))
    found = []
    for row, ids in zip(starts, responses, strict=True):
        places = [*row.nonzero().squeeze(1).tolist(), len(ids)]
        found.append([b - a for a, b in itertools.pairwise(places)])
    return found


def taught(*responses: list[int], **arguments) -> Phrases:
    phrases = Phrases(**{"min_count": 2, **arguments})
    phrases.learn(responses)
    return phrases


def test_a_macro_action_starts_where_entropy_jumps() -> None:
    entropy = torch.tensor([[2.0, 0.5, 1.4, 1.5, 3.0, 2.9, 9.9]])
    batch = batch_of(None, [[1] * 6], padding=1, entropy=entropy)
    assert EntropyJump(1.0)(batch).tolist() == [[True, False, False, False, True, False, False]]
    assert EntropyJump(0.5)(batch).tolist() == [[True, False, True, False, True, False, False]]


def test_entropy_that_is_not_there_or_a_negative_jump_is_one_line() -> None:
    with pytest.raises(UserError, match="needs the policy's entropy"):
        segment(EntropyJump(), batch_of(None, [[1]]))
    with pytest.raises(UserError, match=r"jump: given -1\.0, must be"):
        build_segmenter({"name": "entropy_jump", "jump": -1})


def test_neighbours_that_meet_often_become_phrases_and_phrases_grow() -> None:
    text = [1, 2, 3, 9, 1, 2, 3, 8, 1, 2, 3]
    phrases = taught(text, new=1)
    assert lengths(phrases, text) == [[2, 1, 1, 2, 1, 1, 2, 1]]
    phrases.learn([text])
    assert lengths(phrases, text, [2, 3, 1], []) == [[3, 1, 3, 1, 3], [1, 1, 1], []]


def test_rare_pairs_and_long_phrases_are_not_learned() -> None:
    assert lengths(taught([1, 2, 3, 1, 2], min_count=3), [1, 2]) == [[1, 1]]
    phrases = taught(long := [1, 2, 3, 4] * 9, longest=3)
    for _ in range(9):
        phrases.learn([long])
    assert max(itertools.chain(*lengths(phrases, long))) <= 3
    assert max(itertools.chain(*lengths(taught(long, long, longest=4), long))) == 2


def test_what_is_used_no_more_is_forgotten() -> None:
    phrases = taught([1, 2] * 5, size=1, new=1)
    for _ in range(40):
        phrases.learn([[3, 4] * 5])
    assert lengths(phrases, [1, 2], [3, 4]) == [[1, 1], [2]]
    assert phrases.metrics() == {"phrases_known": 1.0}


@fast
@given(st.lists(st.lists(st.integers(0, 3), max_size=12), min_size=1, max_size=5))
def test_every_phrase_was_written_and_none_is_used_twice_for_a_token(responses) -> None:
    phrases = taught(*responses, size=6)
    phrases.learn(responses)
    written = "|".join(",".join(map(str, row)) for row in responses)
    for phrase in phrases.state_dict()["phrases"]:
        assert ",".join(map(str, phrase)) in written
    assert [sum(row) for row in lengths(phrases, *responses)] == [len(row) for row in responses]


def test_all_ranks_learn_from_the_responses_of_all_in_their_order() -> None:
    phrases = Phrases(min_count=1, new=1)
    mine = batch_of(None, [[5, 6]])
    learn(phrases, mine, lambda own: [[1, 2, 1, 2], *own], lambda work: work())
    assert phrases.state_dict()["phrases"] == [[1, 2]]
    learn(
        NGram(2), mine, pytest.fail, pytest.fail
    )  # nothing is gathered for one that does not learn


def test_a_union_hands_on_what_there_is_to_learn_and_keeps_it() -> None:
    union = Union(of=(Phrases(min_count=2), NGram(5)))
    before = lengths(union, [1, 2] * 4)
    union.learn([[1, 2] * 4])
    assert lengths(union, [1, 2] * 4) != before
    copy = Union(of=(Phrases(min_count=2), NGram(5)))
    copy.load_state_dict(union.state_dict())
    assert lengths(copy, [1, 2] * 4) == lengths(union, [1, 2] * 4)


def test_a_run_learns_phrases_and_keeps_them_in_its_checkpoints(tmp_path: Path) -> None:
    sections = {
        "steps": 2,
        "segmenter": {"name": "phrases", "min_count": 1},
        "checkpoint": {"every": 2},
        "overwrite": False,
        "resume": "auto",
    }
    trainer = tiny_trainer(tmp_path / "run", **sections)
    trainer.train()
    known = trainer.segmenter.state_dict()
    assert known["phrases"]
    resumed = tiny_trainer(tmp_path / "run", **{**sections, "steps": 3})
    assert resumed.segmenter.state_dict() == known


def test_a_run_cuts_where_its_entropy_jumps(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run", segmenter={"name": "entropy_jump", "jump": 0.0})
    row = trainer.step(trainer.stream.batch(0, trainer.config.rollout.batch_size))
    assert 1 < row["macro_length_mean"] < 4
