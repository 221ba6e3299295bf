"""How plug-ins fail: a line that names them, whatever they raise, return, report or want kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.runs import PROMPTS, tiny_trainer, vowels
from test_plugins import Changing, Meddling, nothing, run_with

from marlhf.common.errors import UserError
from marlhf.common.types import ResponseBatch
from marlhf.rewards import RewardError, build_rewards, build_token_rewards
from marlhf.rollout.scores import check_rewards
from marlhf.runs import metrics
from marlhf.segmenters import NGram, segment


def leave(*_: Any, **__: Any) -> Any:
    raise SystemExit(0)


def close(*_: Any, **__: Any) -> Any:
    raise GeneratorExit


class Leaving:
    """A reward and a segmenter that calls sys.exit(0) in one of its methods."""

    def __init__(self, where: str) -> None:
        setattr(self, where, leave)

    def __call__(self, prompts: Any, completions: Any = ()) -> Any:
        return [0.0] * len(completions)


class UnspeakableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError


def unspeakable(*_: Any, **__: Any) -> Any:
    raise UnspeakableError


@pytest.mark.parametrize("fault", [leave, close, unspeakable])
def test_whatever_a_plug_in_raises_is_a_failure_that_names_it(fault: Any, tmp_path: Path) -> None:
    name = fault.__name__
    raises = r"raised (SystemExit|GeneratorExit|UnspeakableError)"
    with pytest.raises(UserError, match=f"segmenter {name}: {raises}"):
        run_with(tmp_path / "s", fault)
    with pytest.raises(RewardError, match=f"reward {name}: row 0 .*: {raises}"):
        tiny_trainer(tmp_path / "r", score=fault).step(PROMPTS)
    with pytest.raises(RewardError, match=f"token reward Meddling: {raises}"):
        run_with(tmp_path / "t", token_reward=Meddling(fault))


@pytest.mark.parametrize("where", ["load", "to", "state_dict"])
def test_optional_methods_are_calls_too(where: str, tmp_path: Path) -> None:
    mine = Leaving(where)
    if where == "state_dict":
        mine.load_state_dict = nothing  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(UserError, match=r"reward Leaving: raised SystemExit: 0"):
        tiny_trainer(tmp_path, score=mine, checkpoint={"every": 1}, steps=1).train()


def test_the_check_of_its_columns_is_a_call_too() -> None:
    with pytest.raises(UserError, match=r"reward Leaving: check_values: raised SystemExit: 0"):
        check_rewards(build_rewards(Leaving("check_values")), [])


def test_ctrl_c_passes_and_says_where() -> None:
    def interrupted(prompts: Any, completions: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="interrupted in"):
        build_rewards(interrupted)(["p"], ["c"])


class Keeping:
    """A reward whose state no checkpoint can hold."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def __call__(self, prompts: Any, completions: Any) -> Any:
        return vowels(prompts, completions)

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None: ...


@pytest.mark.parametrize("state", [{"f": lambda x: x}, {"a": np.ones(2)}, {"p": [Path("x")]}])
def test_a_state_that_cannot_be_kept_is_noticed_before_training(state: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"reward Keeping: .*state_dict\(\) must hold tensors"):
        tiny_trainer(tmp_path, score=Keeping(state), checkpoint={"every": 1})


# --- metrics and requirements


class Naming(Meddling):
    requires = frozenset()

    def __init__(self, learned: Any) -> None:
        super().__init__()
        self.learned = learned

    def update(self, rollout: Any, all_reduce: Any) -> Any:
        return self.learned


@pytest.mark.parametrize(
    ("name", "metric"),
    [("kl", "mean"), ("score", "std"), ("eval", "score_mean"), ("learning", "rate"),
     ("explained", "variance"), ("train", "seconds"), ("policy", "loss"),
     ("reward", "vowels_mean")],
)  # fmt: skip
def test_a_metric_with_a_name_of_the_library_is_refused(
    name: str, metric: str, tmp_path: Path
) -> None:
    mine = type(name, (Naming,), {})({metric: 99.0})
    fault = f"token reward {name}: its metric '{name}_{metric}' has the name of another"
    with pytest.raises(UserError, match=fault):
        tiny_trainer(tmp_path, token_reward=mine).step(PROMPTS)


def test_a_segmenters_metric_may_not_be_the_step(tmp_path: Path) -> None:
    mine = Changing(nothing)
    mine.metrics = lambda: {"step": 3.0}  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(UserError, match="segmenter: its metric 'step' has the name of another"):
        run_with(tmp_path, mine)


def test_all_names_of_a_row_are_known_to_be_taken(tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "one two three"}\n' * 4)
    trainer = tiny_trainer(
        tmp_path / "run",
        steps=1,
        kl={"target": 3.0},
        ppo={"target_kl": 9.0},
        ptx={"path": str(tmp_path / "texts.jsonl"), "max_length": 32},
        log={"eval_every": 1},
    )
    trainer.eval_prompts = list(trainer.stream.prompts[:2])
    row = trainer.step(PROMPTS) | trainer.evaluate()
    assert {"policy_steps", "ptx_loss", "eval_kl_mean"} <= row.keys()
    assert row.keys() - metrics.RESERVED_NAMES == {"reward_vowels_mean"}


def test_a_token_reward_does_not_share_the_metric_of_a_reward() -> None:
    mine = type("vowels", (Naming,), {})({})
    (named,) = build_token_rewards(mine, ["vowels"]).rewards
    assert named.name == "vowels_2"


@pytest.mark.parametrize(
    "learned",
    ["text", torch.ones(3), [1.0], None, object(), {"x": "y"}, {"x": torch.ones(2)}, {1: 2}],
)
def test_what_is_no_metrics_is_refused(learned: Any, tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=r"token reward Naming: raised \w+Error: "):
        tiny_trainer(tmp_path, token_reward=Naming(learned)).step(PROMPTS)


@pytest.mark.parametrize("requires", ["token_ranks", "ref_logprobs", None, 3])
def test_requires_must_be_a_set_of_names(requires: Any, tmp_path: Path) -> None:
    mine = Naming({})
    mine.requires = requires  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(UserError, match=r"token reward Naming: requires: given .*must be a set"):
        build_token_rewards(mine)
    cut = Changing(nothing)
    cut.requires = requires
    with pytest.raises(UserError, match=r"segmenter Changing: requires: given .*must be a set"):
        run_with(tmp_path, cut)


# --- what they return


class Odd:
    def __repr__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ([torch.tensor([1.0, 2.0])], r"row 0 .*returned tensor\(\[1., 2.\]\), must be a number"),
        ([10**400], "row 0 .*returned 1000.*must be finite"),
        ([10**5000], "row 0 .*must be finite"),
        (torch.ones(1, device="meta"), "a batch of 1 rows: returned tensor.*must be a list"),
        ([torch.ones((), device="meta")], "row 0 .*returned tensor.*must be a number"),
        (torch.ones(1).to_sparse(), "a batch of 1 rows: returned tensor.*must be a list"),
        ([1j], "row 0 .*returned 1j, must be a number"),
        (["high"], "row 0 .*returned 'high', must be a number"),
        ([float("nan")], "row 0 .*returned nan, must be finite"),
        (np.ones((1, 2)), "row 0 .*is no list of"),
        (np.float64(1), "a batch of 1 rows: returned float"),
        ((x for x in [1.0]), "a batch of 1 rows: returned generator"),
        ([Odd()], "row 0 .*returned <Odd, which cannot be shown>, must be a number"),
        ([[(torch.ones(2), 1.0)]], "row 0 .*end_char tensor.* is not an integer"),
    ],
)
def test_what_is_no_reward_is_one_line_that_names_it(values: Any, fault: str) -> None:
    def odd(prompts: Any, completions: Any) -> Any:
        return values

    with pytest.raises(RewardError, match=f"reward odd: {fault}") as error:
        build_rewards(odd)(["p"], ["c"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda starts: starts.to("meta"), "is a meta tensor"),
        (lambda starts: starts.to_sparse(), "is a torch.sparse_coo tensor"),
        (lambda starts: torch.nested.nested_tensor([starts[0], starts[0]]), "is a nested tensor"),
    ],
)
def test_starts_are_a_dense_tensor(change: Any, fault: str) -> None:
    from support.responses import piece_batch

    def cut(batch: ResponseBatch) -> Any:
        return change(NGram(2)(batch))

    with pytest.raises(UserError, match=f"segmenter cut: starts {fault}"):
        segment(cut, piece_batch(["a", "b", "c"]))
