"""What a faulty segmenter is told, and by what name."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.responses import piece_batch

from marlhf.common.errors import UserError
from marlhf.segmenters import (
    NGram,
    Segmenter,
    Token,
    Union,
    build_segmenter,
    segment,
    segmenter_metrics,
    validate,
)


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        ([[True, False]], "returned list, must be a bool tensor"),
        (None, "returned NoneType"),
        (torch.ones(2, 3).bool(), r"shape \(2, 3\), must be \(2, 2\)"),
        (torch.ones(2).bool(), r"shape \(2,\)"),
        (torch.ones(2, 2), "torch.float32, must be torch.bool"),
        (torch.tensor([[1, 0], [1, 0]]), "torch.int64"),
        (torch.tensor([[True, True], [True, True]]), "row 1 has a start on padding, beyond its 1"),
        (torch.tensor([[True, False], [False, False]]), "first response token of row 1"),
    ],
)
def test_validator_names_the_segmenter_and_the_fault(starts, message: str):
    batch = piece_batch(["a", "b"], ["c"])
    with pytest.raises(UserError, match=f"segmenter faulty: .*{message}"):
        validate(starts, batch, "faulty")


def test_validator_accepts_and_returns_what_is_right():
    batch = piece_batch(["a", "b"], [], ["c"])
    starts = torch.tensor([[True, True], [False, False], [True, False]])
    assert validate(starts, batch, "fine") is starts
    empty = piece_batch([], [])
    assert validate(Token()(empty), empty, "token").shape == (2, 0)


def test_union_validates_its_parts_by_name():
    def broken(batch):
        return batch.response_mask.float()

    with pytest.raises(UserError, match=r"segmenter broken: starts is torch.float32"):
        Union(of=(NGram(2), broken))(piece_batch(["a"]))
    with pytest.raises(UserError, match="must be a list of segmenters"):
        Union(of=())


class Forms(Segmenter):
    """Returns what it is told to."""

    def starts(self, batch):
        return batch.step


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        (torch.ones(2, 1).bool(), r"shape \(2, 1\), must be \(2, 2\)"),
        (torch.ones(2).bool(), r"shape \(2,\)"),
        (torch.ones(2, 2), "torch.float32, must be torch.bool"),
        (False, "returned bool"),
    ],
)
def test_a_subclass_is_checked_before_its_starts_are_completed(starts, message: str):
    batch = dataclasses.replace(piece_batch(["a", "b"], ["c"]), step=starts)
    with pytest.raises(UserError, match=f"segmenter Forms.*: .*{message}"):
        Forms()(batch)


def test_a_class_is_built_without_arguments():
    assert build_segmenter(Token) == Token()
    with pytest.raises(UserError, match="segmenter NGramWithout: given no argument"):
        build_segmenter(type("NGramWithout", (), {"__init__": lambda self, n: None}))


def test_an_object_that_is_no_value_is_called_by_its_class():
    class Mine:
        def __call__(self, batch):
            raise KeyError("x")

    with pytest.raises(UserError, match=r"segmenter Mine: raised KeyError.*test_segmenter_faults"):
        segment(Mine(), piece_batch(["a"]))


class Own(Segmenter):
    """One with an `__init__` of its own, which does not call the base's."""

    def __init__(self, size: int) -> None:
        object.__setattr__(self, "size", size)

    def starts(self, batch):
        return batch.response_mask


def test_a_segmenter_whose_init_does_not_call_the_base_s_has_no_metrics():
    segmenter = build_segmenter({"name": f"{__name__}.Own", "size": 2})
    batch = piece_batch(["a", "b"])
    assert segment(segmenter, batch).tolist() == [[True, True]]
    assert segmenter_metrics(segmenter) == {}
