"""Sampling: its distribution, its independence of the batch, and where responses end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiny_models import BYTES_VOCAB, byte_tokenizer, tiny_causal_lm
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from marlhf.common.types import Generation
from marlhf.config import RolloutSettings
from marlhf.models import decoding
from marlhf.models.decoding import KeysAndValues
from marlhf.models.policy import Policy
from marlhf.rollout import packed_weights
from marlhf.rollout.transformers_engine import generate, left_pad

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


@pytest.fixture
def pack_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pack the weights of tiny models, too."""
    monkeypatch.setattr(packed_weights, "SMALLEST", 0)
    monkeypatch.setattr(packed_weights, "FEWEST_TOKENS", 0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "gemma2", "qwen2", "mistral"])
@pytest.mark.usefixtures("pack_all")
def test_a_row_is_sampled_alike_in_any_batch(family: str) -> None:
    window = {"sliding_window": 5} if family in ("gemma2", "mistral") else {}
    model = tiny_causal_lm(family, BYTES_VOCAB, **window)
    model.generation_config.eos_token_id = list(range(0, BYTES_VOCAB, 10))
    prompts = PROMPTS * 3
    together = responses(sample(model, prompts=prompts, max_new_tokens=20))
    assert len({len(row) for row in together}) > 4
    for row, prompt in enumerate(prompts):
        alone = responses(sample(model, prompts=[prompt], seeds=[row], max_new_tokens=20))
        assert alone == [together[row]]
    turned = sample(model, prompts=prompts[::-1], seeds=list(range(12))[::-1], max_new_tokens=20)
    assert responses(turned) == together[::-1]
    others = sample(model, prompts=prompts, seeds=list(range(7, 19)), max_new_tokens=20)
    assert responses(others) != together


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "gemma", "gemma2", "qwen2", "qwen3", "mistral"]
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_bf16_keys_and_values_change_no_sample(
    family: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention rounds what it reads to bf16 anyway: samples are those of a cache in fp32."""
    window = {"sliding_window": 5} if family in ("gemma2", "mistral") else {}
    model = tiny_causal_lm(family, BYTES_VOCAB, attn_implementation=attention, **window)
    model.generation_config.eos_token_id = list(range(0, BYTES_VOCAB, 20))
    logits: list[Tensor] = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: logits.append(output))
    caches: list[Any] = []

    def sampled(kind: type[DynamicCache], bf16: bool = True) -> tuple[list[list[int]], Tensor]:
        def made(**arguments: Any) -> DynamicCache:
            caches.append(kind(**arguments))
            return caches[-1]

        monkeypatch.setattr(decoding, "KeysAndValues", made)
        logits.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            found = responses(sample(model, prompts=PROMPTS * 4, max_new_tokens=30))
        return found, torch.cat([x[:, -1] for x in logits])

    found, wanted, in_fp32 = (
        sampled(KeysAndValues),
        sampled(DynamicCache),
        sampled(KeysAndValues, False),
    )
    assert found[0] == wanted[0]
    assert torch.equal(found[1], wanted[1])
    dtypes = [{x.dtype for layer in c.layers for x in (layer.keys, layer.values)} for c in caches]
    assert dtypes[::2] == [{torch.bfloat16}, {torch.float32}]
    assert (torch.float32 in dtypes[1]) == (family != "gpt2")  # its positions are not rotary
    assert not torch.equal(found[1][: len(PROMPTS)].float(), in_fp32[1][: len(PROMPTS)])


def rows_of_passes(model: Any, run: Any) -> list[tuple[int, ...]]:
    """Rows and columns of every forward pass of the model's backbone."""
    shapes: list[tuple[int, ...]] = []
    hook = model.model.register_forward_pre_hook(
        lambda module, arguments, named: shapes.append(tuple(named["input_ids"].shape)),
        with_kwargs=True,
    )
    run()
    hook.remove()
    return shapes


def test_equal_prompts_are_read_once_and_the_last_token_never() -> None:
    model = tiny_causal_lm("llama", BYTES_VOCAB)
    model.generation_config.eos_token_id = None
    prompts = [[5, 6, 7]] * 4 + [[9]] * 4
    run = lambda: sample(model, byte_tokenizer(), prompts, max_new_tokens=6, min_new_tokens=6)  # noqa: E731
    assert rows_of_passes(model, run) == [(2, 3)] + [(8, 1)] * 5


def test_rows_that_ended_leave_the_batch() -> None:
    model = model_with_bias({EOS: 4.0})
    found: list[Generation] = []
    prompts = PROMPTS * 8
    run = lambda: found.append(sample(model, prompts=prompts, max_new_tokens=30))  # noqa: E731
    (_, *steps) = rows_of_passes(model, run)
    lengths = found[0].lengths
    for t, (rows, columns) in enumerate(steps, start=1):
        going = int((lengths > t).sum())
        assert columns == 1
        assert going <= rows < going + rows / 8 + 1
    assert len(steps) == lengths.max() - 1
    assert steps[-1][0] < 8


PAIRS = 32  # tokens


def pairs(response_ids: Tensor) -> Tensor:
    """[V*V] counts of the second and third token of responses."""
    return (response_ids[:, 1] * PAIRS + response_ids[:, 2]).bincount(minlength=PAIRS**2).double()


@pytest.mark.usefixtures("pack_all")
def test_samples_are_distributed_as_those_of_transformers() -> None:
    """Chi-square of two samples, on the pairs of tokens that are frequent."""
    model, draws, prompt = tiny_causal_lm("llama", PAIRS), 5000, [5, 6, 7]
    model.generation_config.eos_token_id = None

    def ours(temperature: float) -> Tensor:
        settings = {"min_new_tokens": 3, "max_new_tokens": 3, "temperature": temperature}
        tokenizer, seeds = byte_tokenizer(), list(range(draws))
        return pairs(sample(model, tokenizer, [prompt] * draws, seeds, **settings).response_ids)

    def chi_square(a: Tensor, b: Tensor) -> float:
        often = a + b >= 20
        assert often.sum() > 50
        return float((((a - b) ** 2 / (a + b))[often]).sum() / often.sum())

    torch.manual_seed(0)
    how = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=3, min_new_tokens=3, eos_token_id=1, pad_token_id=2
    )
    ids = torch.tensor([prompt] * draws)
    theirs = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=how)
    assert chi_square(ours(1.0), pairs(theirs[:, 3:])) < 1.35
    assert chi_square(ours(0.6), pairs(theirs[:, 3:])) > 2


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
