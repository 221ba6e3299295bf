"""Weights of tokens in the policy loss: the built-in ones, others' faults, and whole updates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import PROMPTS, tiny_trainer

from marlhf.algorithm.experience import MacroBatch
from marlhf.algorithm.loss_weights import LowProbability, Positive, build_loss_weights, weighted
from marlhf.common.errors import UserError
from marlhf.common.types import ResponseBatch
from marlhf.segmenters import NGram

IDS = torch.tensor([[0, 0, 1], [0, 1, -1]])
ADVANTAGES = torch.tensor([[1.0, -1.0], [0.0, 2.0]])
RESPONSES = ResponseBatch(
    torch.zeros_like(IDS),
    IDS >= 0,
    logprobs=torch.tensor([[-3.0, -0.05, -0.2], [-0.01, -1.0, 0.0]]),
)


def batch(weights: torch.Tensor | None = None) -> MacroBatch:
    nothing = torch.zeros(2, 2)
    filled = {
        "lengths_BM": nothing,
        "advantages_BM": ADVANTAGES,
        "advantages_BT": torch.zeros(2, 3),
    }
    none = dict.fromkeys(("returns_BM", "returns_BT", "values_BM"))
    return MacroBatch(segment_ids=IDS, mask_BM=nothing > -1, **filled, **none, weights_BT=weights)


def found(*functions: Any, before: torch.Tensor | None = None) -> Any:
    weights = weighted(batch(before), functions, RESPONSES).weights_BT
    return None if weights is None else weights.tolist()


def test_the_built_in_ones() -> None:
    assert found() is None
    assert found(LowProbability()) == [[1, 0, 1], [0, 1, 0]]
    assert found(LowProbability(0.5)) == [[1, 0, 0], [0, 1, 0]]
    assert found(Positive(3.0)) == [[3, 3, 1], [1, 3, 0]]


def test_weights_are_multiplied() -> None:
    of_estimator = torch.tensor([[2.0, 2.0, 4.0], [1.0, 1.0, 0.0]])
    functions = build_loss_weights(["low_probability", {"name": "positive", "weight": 3.0}])
    assert found(*functions, before=of_estimator) == [[6, 0, 4], [0, 3, 0]]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (torch.ones(2, 2), r"mine: gave shape \(2, 2\), must be \(2, 3\)"),
        (torch.full((2, 3), -1.0), "mine: gave -1, must be finite and at least 0"),
        (torch.full((2, 3), float("nan")), "mine: gave nan, must be finite"),
        ([1.0], r"mine: gave \[1.0\], must be a tensor"),
    ],
)
def test_wrong_weights_are_named(returned: Any, message: str) -> None:
    def mine(responses: Any, segment_ids: Any, advantages: Any) -> Any:
        return returned

    with pytest.raises(UserError, match=message):
        found(mine)


def test_they_get_copies() -> None:
    def spoils(responses: Any, segment_ids: Any, advantages: Any) -> Any:
        advantages.zero_()
        responses.logprobs.zero_()
        return torch.ones_like(responses.logprobs)

    assert found(spoils, LowProbability(), Positive(3.0)) == [[3, 0, 1], [0, 3, 0]]


class Marked(NGram):
    """Only every other macro action is trained."""

    def loss_weights(self, responses: Any, segment_ids: Any, advantages: Any) -> Any:
        return (segment_ids % 2 == 0).float()


def test_a_segmenter_may_weigh_and_nothing_moves_under_weights_of_zero(tmp_path: Path) -> None:
    for name, weights, moved in [("Marked", [], True), ("NGram", f"{__name__}.nothing", False)]:
        trainer = tiny_trainer(
            tmp_path / name,
            segmenter={"name": f"{__name__}.{name}", "n": 3},
            ppo={"weights": weights},
            optimizer={"weight_decay": 0.0},
        )
        before = trainer.policy.model.model.lm_head.weight.clone()
        row = trainer.step(PROMPTS)
        assert 0.3 < row["loss_weight_mean"] < 0.9 if moved else row["loss_weight_mean"] == 0
        assert bool((trainer.policy.model.model.lm_head.weight != before).any()) == moved


def nothing(responses: Any, segment_ids: Any, advantages: Any) -> Any:
    return torch.zeros_like(responses.logprobs)


def test_the_key_names_what_is_possible() -> None:
    with pytest.raises(
        UserError, match="no loss weights is called 'positiv'; did you mean 'positi"
    ):
        build_loss_weights("positiv")
    with pytest.raises(UserError, match="its parameters are specs"):
        build_loss_weights(f"{__name__}.build_loss_weights")
