"""Sampling: its distribution, its independence of the batch, and where responses end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models_for_tests import BYTES_VOCAB, byte_tokenizer, tiny_causal_lm
from torch import Tensor

from marlhf.config import RewardSettings, RolloutSettings
from marlhf.models import Policy
from marlhf.rollout import generate, left_pad, score_to_rewards
from marlhf.types import Generation, Sequences

EOS, PAD = 1, 2
PROMPTS = [[5, 6, 7], [9], [40, 41, 42, 43, 44, 45], [8, 8]]


def model_with_bias(favoured: dict[int, float]) -> Any:
    """A tiny model whose logits are raised for some tokens."""
    model = tiny_causal_lm("llama", BYTES_VOCAB)
    bias = torch.zeros(BYTES_VOCAB)
    for token, value in favoured.items():
        bias[token] = value
    head = model.lm_head
    model.lm_head = torch.nn.Linear(head.in_features, head.out_features)
    model.lm_head.weight, model.lm_head.bias = head.weight, torch.nn.Parameter(bias)
    return model


def sample(
    model: Any = None,
    tokenizer: Any = None,
    prompts: list[list[int]] | None = None,
    seeds: list[int] | None = None,
    **settings: Any,
) -> Generation:
    prompts = PROMPTS if prompts is None else prompts
    return generate(
        Policy(model if model is not None else tiny_causal_lm("llama", BYTES_VOCAB)),
        tokenizer or byte_tokenizer(),
        prompts,
        seeds if seeds is not None else list(range(len(prompts))),
        RolloutSettings(**{"max_new_tokens": 10, **settings}),
    )


def responses(generation: Generation) -> list[list[int]]:
    pairs = zip(generation.response_ids, generation.response_mask, strict=True)
    return [ids[mask].tolist() for ids, mask in pairs]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "qwen2"])
def test_a_row_is_sampled_alike_in_any_batch(family: str) -> None:
    model = tiny_causal_lm(family, BYTES_VOCAB)
    together = responses(sample(model))
    for row, prompt in enumerate(PROMPTS):
        alone = responses(sample(model, prompts=[prompt], seeds=[row]))
        assert alone == [together[row]]
    turned = responses(sample(model, prompts=PROMPTS[::-1], seeds=[3, 2, 1, 0]))
    assert turned == together[::-1]
    assert responses(sample(model, seeds=[7, 8, 9, 10])) != together


def warped(logits: Tensor, settings: RolloutSettings) -> Tensor:
    """The distribution that the settings ask for, from their definitions."""
    logits = logits / settings.temperature
    if settings.top_k:
        logits[logits < logits.topk(settings.top_k).values.min()] = -torch.inf
    p = logits.softmax(-1)
    order = p.argsort(descending=True)
    before = p[order].cumsum(0) - p[order]
    p[order[before >= settings.top_p]] = 0
    return p / p.sum()


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.7}, {"temperature": 1.5, "top_k": 7}, {"top_p": 0.8}],
    ids=["plain", "cold", "top_k", "top_p"],
)
def test_samples_follow_the_warped_distribution(settings: dict[str, Any]) -> None:
    model, draws = tiny_causal_lm("llama", 32), 6000
    prompt = [5, 6, 7]
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1].double()
    wanted = warped(logits, RolloutSettings(**settings))
    generation = sample(
        model, prompts=[prompt] * draws, seeds=list(range(draws)), max_new_tokens=1, **settings
    )
    counts = generation.response_ids[:, 0].bincount(minlength=32).double()
    assert not counts[wanted == 0].any()
    likely = wanted > 5 / draws
    expected = wanted[likely] * draws
    chi_square = ((counts[likely] - expected) ** 2 / expected).sum() / (likely.sum() - 1)
    assert chi_square < 2.2  # 10 and more degrees of freedom: beyond 1 in 1000
    uniform = torch.full_like(expected, float(expected.mean()))
    assert ((counts[likely] - uniform) ** 2 / uniform).sum() / (likely.sum() - 1) > 5


def test_the_models_own_sampling_settings_do_not_count() -> None:
    plain = responses(sample())
    model = tiny_causal_lm("llama", BYTES_VOCAB)
    model.generation_config.update(top_k=1, temperature=0.1, repetition_penalty=5.0, do_sample=True)
    assert responses(sample(model)) == plain
    assert model.generation_config.top_k == 1  # left as it was


def test_every_eos_id_of_the_model_ends_a_response() -> None:
    model = model_with_bias({60: 50.0})
    model.generation_config.eos_token_id = [EOS, 60]
    generation = sample(model)
    assert responses(generation) == [[60]] * 4
    assert generation.finished.all()


@pytest.mark.parametrize("pad", ["<pad>", None, "</s>"])
def test_eos_belongs_to_the_response_even_if_it_is_the_pad_token(pad: str | None) -> None:
    generation = sample(model_with_bias({EOS: 4.0}), byte_tokenizer(pad=pad), max_new_tokens=30)
    rows = responses(generation)
    assert len({len(row) for row in rows}) > 1
    for row, finished in zip(rows, generation.finished.tolist(), strict=True):
        assert finished == (row[-1] == EOS)
        assert EOS not in row[:-1]


def test_a_sampled_pad_token_is_a_token() -> None:
    generation = sample(model_with_bias({PAD: 50.0}))
    assert responses(generation) == [[PAD] * 10] * 4
    assert not generation.finished.any()


def test_stop_strings_stay_and_count_as_finished() -> None:
    tokenizer = byte_tokenizer()
    a, b = tokenizer("ab")["input_ids"]
    generation = sample(model_with_bias({a: 50.0}), tokenizer, stop_strings=["aaa", "zz"])
    assert responses(generation) == [[a] * 3] * 4
    assert generation.finished.all()
    prompts = [tokenizer("aaa")["input_ids"]]  # a stop string in the prompt stops nothing
    generation = sample(model_with_bias({b: 50.0}), tokenizer, prompts, stop_strings=["aaa"])
    assert responses(generation) == [[b] * 10]


def test_no_eos_before_the_minimum_length() -> None:
    generation = sample(model_with_bias({EOS: 50.0}), min_new_tokens=4)
    assert [len(row) for row in responses(generation)] == [5] * 4


def test_prompts_are_padded_on_the_left() -> None:
    ids, mask = left_pad([[5, 6, 7], [9]], PAD)
    assert ids.tolist() == [[5, 6, 7], [PAD, PAD, 9]]
    assert mask.tolist() == [[True] * 3, [False, False, True]]


def generation_of_lengths(lengths: list[int], finished: list[bool], T: int = 4) -> Generation:
    B = len(lengths)
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    ids = torch.zeros(B, T, dtype=torch.int64)
    ones = torch.ones(B, 2, dtype=torch.int64)
    return Generation(ones, ones.bool(), ids, mask, torch.tensor(finished))


def test_a_score_sits_on_the_last_response_token() -> None:
    generation = generation_of_lengths([4, 1, 2], [True, False, True])
    scores = torch.tensor([3.0, 1.0, -0.5])
    settings = RewardSettings(clip=2.0, missing_eos_penalty=0.25)
    rewards = score_to_rewards(scores, generation, settings, lambda x: x)
    assert rewards.tolist() == [[0, 0, 0, 2.0], [0.75, 0, 0, 0], [0, -0.5, 0, 0]]


def test_scores_can_be_whitened() -> None:
    generation = generation_of_lengths([4, 1, 2, 2], [True] * 4)
    scores = torch.tensor([3.0, 1.0, -0.5, 7.0])
    rewards = score_to_rewards(scores, generation, RewardSettings(whiten=True), lambda x: x)
    found = rewards.sum(1)
    torch.testing.assert_close(found, (scores - scores.mean()) / scores.std(correction=0))


def test_taking_rows_cuts_columns_that_are_all_padding() -> None:
    generation = generation_of_lengths([4, 1, 2], [True] * 3)
    prompt_mask = torch.tensor([[True, True], [False, True], [False, True]])
    sequences = Sequences.of(
        Generation(
            generation.prompt_ids,
            prompt_mask,
            generation.response_ids,
            generation.response_mask,
            generation.finished,
        )
    )
    cut = sequences.rows(torch.tensor([1, 2]))
    assert cut.response_mask.tolist() == [[True, False], [True, True]]
    assert cut.attention_mask.tolist() == [[True, True, False], [True, True, True]]
    assert cut.input_ids.shape == (2, 3)
