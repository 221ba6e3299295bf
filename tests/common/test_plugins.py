"""Plug-ins can fail, and change whatever they hold, but nothing of the run."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.runs import PROMPTS, tiny_config, tiny_trainer, vowels
from tokenizers import decoders

from marlhf.common.errors import UserError
from marlhf.common.types import ResponseBatch
from marlhf.rewards import RewardError, TokenReward, build_rewards
from marlhf.segmenters import NGram, build_segmenter, segment
from marlhf.training.ppo import PPOTrainer

TIMES = ("_seconds", "tokens_per_second", "peak_memory_gb")


def rows(folder: Path, **given: Any) -> list[dict[str, Any]]:
    """What two updates report, without times."""
    trainer = tiny_trainer(folder, **given)
    found = [trainer.step(PROMPTS) for _ in range(2)]
    return [{k: v for k, v in row.items() if not k.endswith(TIMES)} for row in found]


# --- what they are given is theirs


class Changing:
    """Cuts as `NGram` does, and does something to what it is given, now or the next time."""

    requires = frozenset({"ref_logprobs"})
    kept: ResponseBatch | None = None

    def __init__(self, harm: Callable[[ResponseBatch], Any], late: bool = False) -> None:
        self.harm, self.late = harm, late

    def __call__(self, batch: ResponseBatch) -> Any:
        starts = NGram(3)(batch)
        if self.late and self.kept is not None:
            self.harm(self.kept)
        if not self.late:
            self.harm(batch)
        self.kept = batch
        return starts

    def learn(self, responses: list[list[int]]) -> None:
        for response in responses:
            response.clear()


def nothing(_: Any) -> None: ...


HARMS: dict[str, Callable[[Any], Any]] = {
    "texts": lambda b: (b.texts.clear(), b.offsets[0].clear(), b.unpadded[0].clear()),
    "logprobs": lambda b: b.logprobs.zero_(),
    "ref_logprobs": lambda b: b.ref_logprobs.zero_(),
    "entropy": lambda b: b.entropy.fill_(9.0),
    "mask": lambda b: b.response_mask.fill_(False),
    "tokens": lambda b: b.token_ids.zero_(),
    "data": lambda b: b.logprobs.data.mul_(3.0),
    "numpy": lambda b: b.logprobs.numpy().fill(1.0),
    "rows": lambda b: (b.row_ids.zero_(), b.rows.clear(), b.lengths.clear()),
}


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return rows(tmp_path_factory.mktemp("clean"), segmenter=NGram(3))


def run_with(folder: Path, segmenter: Any = None, token_reward: Any = None) -> list[dict[str, Any]]:
    trainer = PPOTrainer(
        tiny_config(folder),
        reward=vowels,
        segmenter=segmenter or NGram(3),
        token_reward=token_reward,
        train_dataset=PROMPTS,
        **_models(),
    )
    found = [trainer.step(PROMPTS) for _ in range(2)]
    return [{k: v for k, v in row.items() if not k.endswith(TIMES)} for row in found]


def _models() -> dict[str, Any]:
    from support.tiny_models import BYTES_VOCAB, byte_tokenizer, tiny_causal_lm

    lm = tiny_causal_lm("llama", BYTES_VOCAB)
    return {"model": lm, "tokenizer": byte_tokenizer(add_bos=True)}


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_with(tmp_path_factory.mktemp("untouched"), Changing(nothing))


def test_a_segmenter_changes_only_its_own_batch(
    untouched: list[dict[str, Any]], tmp_path: Path
) -> None:
    def all_of_them(batch: Any) -> None:
        for harm in HARMS.values():
            harm(batch)

    assert run_with(tmp_path / "now", Changing(all_of_them)) == untouched
    assert run_with(tmp_path / "late", Changing(all_of_them, late=True)) == untouched


@pytest.mark.parametrize("harm", HARMS)
def test_each_harm_by_itself(harm: str) -> None:
    from support.responses import piece_batch

    batch = piece_batch(["a", "b", "c", "d"], ["e", "f"])
    given: dict[str, Any] = {
        "logprobs": torch.rand(2, 4),
        "ref_logprobs": torch.rand(2, 4),
        "entropy": torch.rand(2, 4),
        "row_ids": torch.tensor([4, 5]),
    }
    batch = ResponseBatch(batch.token_ids, batch.response_mask, **given, tokenizer=batch.tokenizer)
    before = {name: x.clone() for name, x in vars(batch).items() if torch.is_tensor(x)}
    texts, offsets = list(batch.texts), [list(row) for row in batch.offsets]
    kept = Changing(HARMS[harm])
    starts = segment(kept, batch)
    assert all(torch.equal(x, before[name]) for name, x in vars(batch).items() if name in before)
    assert (batch.texts, batch.offsets, batch.rows) == (texts, offsets, [4, 5])
    assert starts.tolist() == NGram(3)(batch).tolist()


def test_what_a_segmenter_returns_is_copied() -> None:
    from support.responses import piece_batch

    mine = torch.tensor([[True, False, True]])
    starts = segment(lambda batch: mine, piece_batch(["a", "b", "c"]))
    mine.fill_(False)
    assert starts.tolist() == [[True, False, True]]


class Meddling(TokenReward):
    """Zero for every token, after some change of what it is given."""

    requires = frozenset({"ref_logprobs", "token_ranks", "hidden_states"})

    def __init__(self, harm: Callable[[Any], Any] = nothing) -> None:
        self.harm = harm

    def __call__(self, rollout: Any) -> torch.Tensor:
        shape = rollout.responses.response_mask.shape
        self.harm(rollout)
        return torch.zeros(shape)

    def update(self, rollout: Any, all_reduce: Any) -> dict[str, float]:
        self.harm(rollout)
        return {}


def meddle(rollout: Any) -> None:
    for harm in HARMS.values():
        harm(rollout.responses)
    rollout.task_rewards.fill_(50.0)
    rollout.scores.fill_(50.0)
    rollout.values.fill_(50.0)
    rollout.last_values.fill_(50.0)
    rollout.generation.finished.fill_(True)
    rollout.generation.prompt_ids.zero_()
    rollout.rewards.scores.clear()
    rollout.prompt_texts.clear()
    rollout.sequences.input_ids.zero_()
    rollout.extras.clear()


def test_a_token_reward_changes_only_its_own_rollout(tmp_path: Path) -> None:
    clean = run_with(tmp_path / "clean", token_reward=Meddling())
    assert run_with(tmp_path / "meddling", token_reward=Meddling(meddle)) == clean


@pytest.mark.parametrize(
    "harm",
    [
        lambda r: r.extras["token_ranks"].zero_(),
        lambda r: r.extras["hidden_states"].data.neg_(),
        lambda r: r.extras["hidden_states"].numpy()[:, ::-1].sort(1),
    ],
)
def test_changed_extras_are_an_error_that_names_them(harm: Any, tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=r"token reward Meddling: changed rollout\.extras\['"):
        run_with(tmp_path, token_reward=Meddling(harm))


@pytest.mark.parametrize(
    ("harm", "what"),
    [
        (lambda t: setattr(t, "padding_side", "left"), "padding_side"),
        (lambda t: setattr(t, "pad_token", "</s>"), "special_tokens_map"),
        (lambda t: t.add_tokens(["new"]), "vocabulary"),
        (lambda t: setattr(t, "chat_template", "x"), "chat_template"),
        (lambda t: setattr(t.backend_tokenizer, "decoder", decoders.Fuse()), "decoder"),
    ],
)
def test_a_changed_tokenizer_is_an_error_that_names_it(
    harm: Any, what: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=rf"segmenter Changing: changed the tokenizer's {what}"):
        run_with(tmp_path / "s", Changing(lambda batch: harm(batch.tokenizer)))
    with pytest.raises(RewardError, match=rf"reward Meddling: changed the tokenizer's {what}"):
        run_with(tmp_path / "t", token_reward=Meddling(lambda r: harm(r.responses.tokenizer)))


def test_a_reward_changes_only_its_own_texts_and_columns() -> None:
    def first(prompts: Any, completions: Any, facts: Any, **columns: Any) -> list[float]:
        count = len(completions)
        completions[:] = ["other"] * count
        prompts.clear()
        facts[0]["answer"].append("changed")
        facts.clear()
        columns.clear()
        return [0.0] * count

    def second(prompts: Any, completions: Any, facts: Any) -> list[float]:
        return [float(p + c + str(f) == "pc{'answer': []}") for p, c, f in
                zip(prompts, completions, facts, strict=True)]  # fmt: skip

    prompts, completions, facts = ["p", "p"], ["c", "c"], [{"answer": []}, {"answer": []}]
    combined = build_rewards([first, second, first, second])
    for _ in range(2):
        found = combined(prompts, completions, {"facts": facts, "more": [[1], [2]]})
        assert found.by_name["second"] == found.by_name["second_2"] == [1.0, 1.0]
    assert (prompts, completions) == (["p", "p"], ["c", "c"])
    assert facts == [{"answer": []}, {"answer": []}]


# --- what they leave


def seeds(*_: Any) -> None:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)


def dropout_noise(folder: Path, harm: Callable[[], Any]) -> list[dict[str, Any]]:
    """A run whose policy drops out: it draws from torch's global stream."""
    from support.tiny_models import BYTES_VOCAB, tiny_causal_lm

    def score(prompts: Any, completions: Any) -> list[float]:
        harm()
        return vowels(prompts, completions)

    lm = tiny_causal_lm("gpt2", BYTES_VOCAB, resid_pdrop=0.2)
    return rows(folder, lm=lm, score=score)


def test_a_reward_that_seeds_changes_no_noise_of_the_run(tmp_path: Path) -> None:
    clean = dropout_noise(tmp_path / "a", lambda: None)
    assert dropout_noise(tmp_path / "b", seeds) == clean
    assert dropout_noise(tmp_path / "c", lambda: torch.rand(5)) == clean


@pytest.fixture
def settings() -> Iterator[None]:
    folder, handler = os.getcwd(), signal.getsignal(signal.SIGTERM)
    yield
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    signal.signal(signal.SIGTERM, handler)
    os.chdir(folder)


def spoil(*_: Any) -> None:
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.chdir("/")


@pytest.mark.usefixtures("settings")
def test_settings_of_the_process_stay_the_runs(
    untouched: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = (os.getcwd(), signal.getsignal(signal.SIGTERM))
    assert run_with(Path("run"), Changing(spoil)) == untouched
    (tmp_path / "spoils_at_import.py").write_text(
        "import os, signal, torch\ntorch.set_grad_enabled(False)\ntorch.set_default_dtype("
        "torch.float64)\nos.chdir('/')\ndef cut(batch): return batch.response_mask\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    build_segmenter("spoils_at_import.cut")
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32
    assert torch.get_default_device().type == "cpu"
    assert (os.getcwd(), signal.getsignal(signal.SIGTERM)) == before
