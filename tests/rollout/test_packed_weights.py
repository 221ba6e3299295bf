"""Packed weights: the same logits from fewer products, and no trace afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.tiny_models import tiny_causal_lm
from torch import Tensor

from marlhf.config import LoraSettings
from marlhf.models.adapters import add_adapter
from marlhf.models.policy import use_adapter
from marlhf.rollout import packed_weights
from marlhf.rollout.packed_weights import packed, shared_inputs

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


@pytest.fixture(autouse=True)
def pack_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny weights, too."""
    monkeypatch.setattr(packed_weights, "SMALLEST", 0)


@contextmanager
def packed_model(model: Any, adapter: str | None = None) -> Iterator[list[list[Any]]]:
    with torch.no_grad(), use_adapter(model, adapter):
        with shared_inputs(model, adapter) as groups:
            model(IDS)
        with packed(groups, adapter, batch_size=2, tokens=100):
            yield groups


def logits(model: Any, adapter: str | None = None) -> Tensor:
    with torch.no_grad(), use_adapter(model, adapter):
        return model(IDS).logits


def with_adapter(**extra: Any) -> Any:
    torch.manual_seed(0)
    family, lora = "llama", LoraSettings(r=4, extra=extra)
    if "lora_bias" in extra:  # which needs biases
        family, lora = "qwen2", replace(lora, target_modules=["q_proj", "k_proj", "v_proj"])
    if "target_parameters" in extra:
        lora = replace(lora, target_modules=[])
    model = add_adapter(tiny_causal_lm(family), lora, "policy")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model.eval()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "gemma2", "qwen2", "qwen3"])
def test_logits_are_the_same(family: str) -> None:
    model = tiny_causal_lm(family)
    plain = logits(model)
    with packed_model(model) as groups:
        assert not any("forward" not in vars(layer) for group in groups for layer in group)
        torch.testing.assert_close(logits(model), plain, rtol=0, atol=1e-5)
    assert torch.equal(logits(model), plain)
    assert not any("forward" in vars(module) for module in model.modules())


def test_layers_that_read_the_same_are_one_product() -> None:
    model = tiny_causal_lm("llama", num_hidden_layers=1)
    names = {module: name.split(".")[-1] for name, module in model.named_modules()}
    with packed_model(model) as groups:
        assert [[names[layer] for layer in group] for group in groups] == [
            ["q_proj", "k_proj", "v_proj"],
            ["o_proj"],
            ["gate_proj", "up_proj"],
            ["down_proj"],
            ["lm_head"],
        ]


def test_an_input_that_changed_is_computed_anew() -> None:
    model = tiny_causal_lm("llama")
    attention = model.model.layers[0].self_attn
    x = torch.randn(2, 1, 32)
    with packed_model(model), torch.no_grad():
        attention.q_proj(x)
        x.mul_(2)
        torch.testing.assert_close(attention.k_proj(x), x @ attention.k_proj.weight.T)
        torch.testing.assert_close(attention.k_proj(x + 1), (x + 1) @ attention.k_proj.weight.T)


def test_it_is_a_copy_that_runs() -> None:
    """Or the other tests would compare the model with itself."""
    model = tiny_causal_lm("llama")
    plain = logits(model)
    with packed_model(model):
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.data.zero_()
        torch.testing.assert_close(logits(model), plain, rtol=0, atol=1e-5)
    assert (logits(model) - plain).abs().max() > 0.1


@pytest.mark.parametrize(
    ("extra", "count"),
    [
        ({}, 14),
        ({"use_dora": True}, 0),
        ({"lora_bias": True}, 0),
        ({"use_rslora": True}, 14),
        ({"target_parameters": ["q_proj.weight", "mlp.up_proj.weight"]}, 4),
    ],
)
def test_adapters_are_merged(extra: dict[str, Any], count: int) -> None:
    model = with_adapter(**extra)
    plain, base = logits(model, "policy"), logits(model, None)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    with packed_model(model, "policy") as groups:
        whole = [layer for group in groups for layer in group if hasattr(layer, "lora_A")]
        assert len(whole) == count
        torch.testing.assert_close(logits(model, "policy"), plain, rtol=1e-5, atol=5e-5)
    with packed_model(model, None):
        torch.testing.assert_close(logits(model, None), base, rtol=0, atol=1e-5)
    assert (plain - base).abs().max() > 0.1
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert torch.equal(logits(model, "policy"), plain)


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor has no bf16"
)
def test_products_are_in_the_precision_of_autocast() -> None:
    model = tiny_causal_lm("qwen2")
    with torch.autocast("cpu", torch.bfloat16):
        plain = logits(model)
        with packed_model(model):
            found = logits(model)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, plain, rtol=0.02, atol=0.05)


def test_small_weights_and_short_responses_stay_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_causal_lm("llama")
    with torch.no_grad(), shared_inputs(model, None) as groups:
        model(IDS)
    with packed(groups, None, batch_size=2, tokens=4):
        assert not any("forward" in vars(module) for module in model.modules())
    monkeypatch.undo()
    with packed(groups, None, batch_size=2, tokens=100):
        assert not any("forward" in vars(module) for module in model.modules())


def test_double_precision_stays_as_it_is() -> None:
    model = tiny_causal_lm("llama").double()
    with packed_model(model):
        assert not any("forward" in vars(module) for module in model.modules())
