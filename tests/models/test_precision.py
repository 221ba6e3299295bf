"""`model.precision`: frozen weights in bf16 change no number, and what stays fp32."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_models import (
    BYTES_VOCAB,
    FAMILIES,
    byte_tokenizer,
    tiny_causal_lm,
    tiny_sequence_classifier,
)

from marlhf.common.errors import UserError
from marlhf.compat.torch import TorchDispatchMode
from marlhf.config import LoraSettings, ModelSettings
from marlhf.distributed import ALONE, Distributed, Placement
from marlhf.distributed.profile import precision_note
from marlhf.models import loading, saving
from marlhf.models.policy import Policy, backbone_of
from marlhf.models.reward_classifier import save_classifier
from marlhf.rewards import RewardModel
from marlhf.rewards.learned import encode_for_reward, right_pad, sequence_scores

IDS = torch.arange(3, 51).reshape(4, 12) % 60
MASK = torch.ones_like(IDS).bool()


@pytest.fixture(scope="module")
def bf16() -> Placement:
    """That of a process whose runs are in bf16."""
    return Distributed("bf16").placement()


def outputs(policy: Policy, placement: Placement) -> dict[str, torch.Tensor]:
    """Log-probabilities, entropies and hidden states of eight response tokens."""
    extras = ("entropy", "hidden_states")
    with placement.autocast():
        logprobs, named = policy(IDS, MASK, MASK[:, 4:], extras=extras)
    return {"logprobs": logprobs, **named}


def is_embedding(name: str) -> bool:
    return any(word in name for word in ("embed", "wte", "wpe"))


@pytest.mark.parametrize("family", [*FAMILIES, "qwen3_moe", "mistral", "phi3", "olmo2"])
def test_a_frozen_model_gives_the_same_numbers(family: str, bf16: Placement) -> None:
    model = tiny_causal_lm(family).eval().requires_grad_(False)
    expected = outputs(Policy(model), bf16)
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    bf16.place(model, backbone_of(model), "frozen")
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    halves = [name for name, dtype in dtypes.items() if dtype == torch.bfloat16]
    assert bool(halves) == (family != "gpt2")  # which has no nn.Linear but a tied head
    assert not any(is_embedding(name) or "norm" in name for name in halves)
    assert ("lm_head.weight" in halves) != is_tied
    for name, x in outputs(Policy(model), bf16).items():
        assert torch.equal(x, expected[name]), name


class _Products(TorchDispatchMode):
    """Dtypes of the inputs of products of fused experts."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "grouped_mm" in str(func):
            self.dtypes |= {args[0].dtype, args[1].dtype}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_experts_run_under_autocast_too(precision: str, bf16: Placement) -> None:
    model = tiny_causal_lm("qwen3_moe")
    with _Products() as products, bf16.autocast() if precision == "bf16" else ALONE.autocast():
        model(IDS).logits.float().square().mean().backward()
    assert products.dtypes == {torch.bfloat16 if precision == "bf16" else torch.float32}
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.parametrize("of_files", [torch.float32, torch.bfloat16])
def test_the_base_of_adapters_loses_nothing(
    of_files: torch.dtype, bf16: Placement, tmp_path: Path
) -> None:
    """In bf16 is what the files hold in bf16; gradients and what is saved are as in fp32."""
    tiny_causal_lm("llama", BYTES_VOCAB).to(of_files).save_pretrained(tmp_path / "base")
    lora = LoraSettings(r=2, target_modules=["q_proj", "down_proj"])
    settings = ModelSettings(path=str(tmp_path / "base"), lora=lora)
    config, results = loading.load_model_config(settings), []
    for placement in (bf16, ALONE):
        policy = loading.build_policy(settings, byte_tokenizer(), config, placement=placement)
        trained = {n: p for n, p in policy.named_parameters() if p.requires_grad}
        assert {p.dtype for p in trained.values()} == {torch.float32}
        generator = torch.Generator().manual_seed(1)
        for p in trained.values():
            p.data.normal_(generator=generator)
        lm: Any = policy.model
        layers: Any = backbone_of(lm.get_base_model()).layers
        is_half = placement is bf16 and of_files == torch.bfloat16
        expected_dtype = torch.bfloat16 if is_half else torch.float32
        assert layers[0].mlp.up_proj.weight.dtype == expected_dtype
        assert layers[0].input_layernorm.weight.dtype == torch.float32
        results.append(outputs(policy, bf16))
        results[-1]["logprobs"].sum().backward()
        results[-1] |= {n: p.grad for n, p in trained.items() if p.grad is not None}
        folder = tmp_path / f"final-{len(results)}"
        saving.save_policy(policy, byte_tokenizer(), folder)
        results[-1] |= load_file(folder / "model.safetensors")
    first, second = results
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_reward_models_score_under_autocast(family: str, bf16: Placement, tmp_path: Path) -> None:
    """Decoders with their head in fp32; encoders, whose score would be rounded, in fp32."""
    model = tiny_sequence_classifier(family, BYTES_VOCAB).eval()
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    reward = RewardModel(str(tmp_path))
    texts = ["a text", "another, longer text"]
    inputs = right_pad(encode_for_reward(reward.tokenizer, texts, [False, False]))
    with torch.no_grad(), bf16.autocast() if family == "llama" else ALONE.autocast():
        expected = sequence_scores(model, *inputs)
    reward.use_placement(bf16)
    assert reward(["", ""], texts) == pytest.approx(expected.tolist(), abs=1e-6)
    kinds = {str(p.dtype) for p in reward.model.parameters()}
    assert ("torch.bfloat16" in kinds) == (family == "llama")
    if family == "llama":
        assert reward.model.score.weight.dtype == torch.float32
        assert any(score != torch.tensor(score).bfloat16().item() for score in expected.tolist())


@pytest.fixture
def matmul_precision() -> Iterator[None]:
    """Restores it."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("matmul_precision")
def test_tf32_is_torchs_own_setting() -> None:
    Distributed("fp32")
    assert torch.get_float32_matmul_precision() == "highest"
    distributed = Distributed("tf32")
    assert torch.get_float32_matmul_precision() == "high"
    with distributed.autocast():
        assert not torch.is_autocast_enabled("cpu")


def test_fp32_on_a_gpu_is_said_in_a_line() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    line = precision_note("fp32", cuda)
    assert line is not None
    assert "bf16 is about ten times as fast" in line
    assert [precision_note(*pair) for pair in (("bf16", cuda), ("tf32", cuda), ("fp32", cpu))] == [
        None
    ] * 3


@pytest.mark.parametrize(
    ("capabilities", "said"),
    [
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": False}, True),
        ({"architecture": "x86_64", "avx512_bf16": True, "amx_bf16": False}, False),
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": True}, False),
        ({"architecture": "aarch64"}, False),
        ({}, False),
    ],
)
def test_bf16_on_a_cpu_that_emulates_it_is_said_in_a_line(
    capabilities: dict[str, Any], said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    line = precision_note("bf16", torch.device("cpu"))
    slow = "model.precision is bf16: this CPU has no instructions for it, fp32 is faster"
    assert line == (slow if said else None)


def test_this_cpu_says_what_it_can() -> None:
    note = precision_note("bf16", torch.device("cpu"))
    flags = Path("/proc/cpuinfo")
    if not flags.exists() or not hasattr(torch.cpu, "get_capabilities"):
        pytest.skip("nothing to compare with")
    words = set(flags.read_text().split())
    is_x86 = "sse2" in words
    assert (note is not None) == (is_x86 and not words & {"avx512_bf16", "amx_bf16"})


@pytest.mark.parametrize(
    ("chosen", "name"), [("fp32", "float32"), ("bf16", "bfloat16"), ("checkpoint", "bfloat16")]
)
@pytest.mark.parametrize("kind", ["policy", "reward"])
def test_final_is_written_in_the_dtype_of_choice(
    chosen: Any, name: str, kind: str, tmp_path: Path
) -> None:
    make = tiny_causal_lm if kind == "policy" else tiny_sequence_classifier
    make("gemma", BYTES_VOCAB).bfloat16().save_pretrained(tmp_path / "base")
    settings = ModelSettings(path=str(tmp_path / "base"), final_dtype=chosen)
    config = loading.load_model_config(settings)
    dtype = saving.final_dtype(settings, config)
    read = loading.read_causal_lm(settings, config) if kind == "policy" else None
    model: Any = read or loading.read_classifier(settings, "model.path")
    ALONE.place(model)
    if kind == "policy":
        saving.save_policy(Policy(model), byte_tokenizer(), tmp_path / "final", dtype)
    else:
        save_classifier(model, byte_tokenizer(), 0.5, tmp_path / "final", dtype)
    weights = load_file(tmp_path / "final" / "model.safetensors")
    assert {str(x.dtype) for x in weights.values()} == {f"torch.{name}"}
    assert json.loads((tmp_path / "final" / "config.json").read_text())["dtype"] == name
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    again = loading.load_model_config(ModelSettings(path=str(tmp_path / "final")))
    assert again.get_text_config().tie_word_embeddings == config.tie_word_embeddings


def test_attention_is_the_one_that_was_asked_for(tmp_path: Path) -> None:
    tiny_causal_lm("llama", BYTES_VOCAB).save_pretrained(tmp_path)
    ids, logits = torch.arange(9)[None], {}
    for name in (None, "sdpa", "eager"):
        settings = ModelSettings(path=str(tmp_path), attention=name)
        lm = loading.load_causal_lm(settings).eval()
        assert lm.config._attn_implementation == (name or "sdpa")
        with torch.no_grad():
            logits[name] = lm(ids).logits
    assert torch.equal(logits[None], logits["sdpa"])
    torch.testing.assert_close(logits["eager"], logits["sdpa"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["flash_attention_2", "some/kernel", "nonsense"])
def test_attention_that_cannot_be_had_is_refused_before_weights_are_read(
    name: str, tmp_path: Path
) -> None:
    tiny_causal_lm("llama", BYTES_VOCAB).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    settings = ModelSettings(path=str(tmp_path), attention=name)
    with pytest.raises(UserError, match=f"model.attention: given '{name}', which .* cannot have"):
        loading.load_model_config(settings)
