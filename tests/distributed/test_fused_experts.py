"""Models whose files hold experts one by one: a tensor that fuses them is made as it is placed."""

from __future__ import annotations

import ctypes
import gc
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.forked_ranks import ranks
from support.memory_of_ranks import peak
from support.tiny_models import tiny_causal_lm, tiny_config, tiny_sequence_classifier
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from marlhf.common.cpu_memory import trim_heap
from marlhf.config import LoraSettings, ModelSettings
from marlhf.distributed import ALONE, Distributed
from marlhf.models import loading
from marlhf.models.adapters import add_adapter
from marlhf.models.policy import backbone_of

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {},
    "mixtral": {"num_local_experts": 4},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    # no experts: three convolutions in one tensor, and one tensor cut into four layers
    "olmo_hybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {},
}
EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"


def read(folder: Path) -> Any:
    settings = ModelSettings(path=str(folder))
    return loading.read_causal_lm(settings, loading.load_model_config(settings))


def change(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    """Edit the tensors in a model's file."""
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def assert_same(model: Any, expected: Any) -> None:
    """The same weights, and log-probabilities, to the last bit."""
    weights = model.state_dict()
    assert weights.keys() == expected.state_dict().keys()
    for name, weight in expected.state_dict().items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=0)
    ids = torch.arange(24).view(2, 12)
    assert torch.equal(model(ids).logits, expected(ids).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_those_of_transformers(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tiny_causal_lm(family, **FAMILIES[family]).to(dtype).save_pretrained(tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    lm = read(tmp_path)
    assert any(p.isnan().any() for p in lm.parameters())  # until it is placed
    assert_same(ALONE.place(lm, backbone_of(lm)), expected)


def test_experts_of_several_dtypes_lose_nothing(tmp_path: Path) -> None:
    tiny_causal_lm("qwen3_moe").bfloat16().save_pretrained(tmp_path)
    change(tmp_path, lambda weights: weights.update({EXPERT: weights[EXPERT].float() / 3}))
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    lm = read(tmp_path)
    assert_same(ALONE.place(lm, backbone_of(lm)), expected)


def test_conversions_only_move_values() -> None:
    """Else they could give another result in the dtype of a file than in fp32."""
    conversions = [
        get_checkpoint_conversion_mapping(family) for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    ]
    names = {
        type(operation).__name__
        for conversion in conversions
        for entry in conversion or ()
        for operation in getattr(entry, "operations", ())
    }
    assert {"MergeModulelist", "Concatenate"} <= names  # of every version
    assert names <= {"MergeModulelist", "Concatenate", "Chunk", "Interleave"}


def test_a_frozen_base_keeps_its_experts_in_bf16(tmp_path: Path) -> None:
    tiny_causal_lm("qwen3_moe").bfloat16().save_pretrained(tmp_path)
    lm = read(tmp_path)
    Distributed("bf16").placement().place(lm, backbone_of(lm), "base")
    experts = {name: p.dtype for name, p in lm.named_parameters() if ".experts." in name}
    assert len(experts) == 4
    assert set(experts.values()) == {torch.bfloat16}


def test_an_adapter_is_merged_into_fused_experts(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_sequence_classifier("qwen3_moe").save_pretrained(base)
    adapted: Any = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    torch.manual_seed(0)
    lora = LoraSettings(
        r=2,
        target_modules="all-linear",
        extra={"init_lora_weights": False, "target_parameters": ["experts.gate_up_proj"]},
    )
    adapted = add_adapter(adapted, lora, "default", "SEQ_CLS")
    adapted.save_pretrained(adapter)
    adapted.config.save_pretrained(adapter)
    settings = ModelSettings(path=str(adapter))
    merged: Any = loading.read_classifier(settings, "path", base=str(base))
    ids = torch.arange(12)[None]
    with torch.no_grad():
        scores, plain = adapted(ids).logits, adapted.get_base_model()
        torch.testing.assert_close(merged(ids).logits, scores)
        with adapted.disable_adapter():
            assert not torch.allclose(plain(ids).logits, scores)


# hidden 256: 25 million weights in 8 layers, 100 MB in fp32
SIZES = {
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "hidden_size": 256,
    "num_hidden_layers": 8,
}
M_MMAP_THRESHOLD = -3  # of malloc.h
LARGEST = 4 * 16 * 512 * 256  # bytes in fp32


def written(folder: Path) -> Path:
    """A model whose experts are most of it, with files in bf16."""
    model = AutoModelForCausalLM.from_config(tiny_config("qwen3_moe", **SIZES))
    model.bfloat16().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("is_deferred", [True, False])
def test_experts_take_no_memory_until_they_are_placed(
    is_deferred: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control makes them while it reads, as transformers does."""
    if not is_deferred:
        monkeypatch.setattr(loading, "deferred", None)
    lm = read(written(tmp_path))
    experts = [p for name, p in lm.named_parameters() if ".experts." in name]
    total = sum(p.untyped_storage().nbytes() for p in experts)
    assert total < 1000 if is_deferred else total > 8 * LARGEST


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_no_rank_holds_all_experts(tmp_path: Path) -> None:
    """Of two under ZeRO-3, beyond its half."""
    written(tmp_path)

    def work(rank: int) -> str:
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 65536)  # what is freed is returned
        gc.collect()  # garbage of the tests before, which would hide as much
        trim_heap(torch.device("cpu"))
        placement, taken = Distributed().placement(), dict[str, int]()
        with peak(taken, "load"):
            lm = placement.read(lambda: read(tmp_path))
            placement.place(lm, backbone_of(lm))
        return json.dumps(taken)

    first, second = (json.loads(o)["load"] for o in ranks(2, work, tmp_path, {"stage": 3}))
    assert second < LARGEST
    assert first < 2 * LARGEST


def missing(weights: dict[str, Tensor]) -> None:
    del weights[EXPERT]


def another_shape(weights: dict[str, Tensor]) -> None:
    weights[EXPERT] = weights[EXPERT][:-1].clone()


def all_of_another_shape(weights: dict[str, Tensor]) -> None:
    for name in weights:
        if re.search(r"layers\.1\..*(gate|up)_proj", name):
            weights[name] = weights[name][:-1].clone()


def not_finite(weights: dict[str, Tensor]) -> None:
    weights[EXPERT][3, 4] = float("nan")


def not_there(weights: dict[str, Tensor]) -> None:
    for name in [name for name in weights if "layers.1.mlp.experts" in name]:
        del weights[name]


def one_layer_more(weights: dict[str, Tensor]) -> None:
    weights |= {
        name.replace("layers.1", "layers.2"): weight.clone()
        for name, weight in weights.items()
        if "layers.1.mlp.experts" in name
    }


FAULTS = {
    missing: r"cannot load '.*': model.layers.1.mlp.experts.gate_up_proj: .*Expected.*",
    another_shape: r"cannot load '.*': model.layers.1.mlp.experts.gate_up_proj: .*equal size",
    all_of_another_shape: r"1 are missing or of another shape, model.layers.1.*gate_up_proj",
    not_finite: r"the weights hold NaN or infinity, in model.layers.1.mlp.experts.gate_up_proj",
    not_there: r"2 are missing or of another shape, model.layers.1.mlp.experts.down_proj",
    one_layer_more: r"have more layers than its config.json, which says 2: model.layers.2",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_faults_of_an_expert_are_said_on_both_ranks(fault: Any, tmp_path: Path) -> None:
    tiny_causal_lm("qwen3_moe").save_pretrained(tmp_path)
    change(tmp_path, fault)

    def work(rank: int) -> str:
        Distributed().placement().read(lambda: read(tmp_path))
        return "read"

    first, second = ranks(2, work, tmp_path, {"stage": 3})
    assert re.match(f"UserError: model.path: .*{FAULTS[fault]}", first), first
    assert re.match(f"PeerError: rank 0 failed: model.path: .*{FAULTS[fault]}", second), second
    assert "\n" not in first + second


def test_two_ranks_have_the_weights_of_transformers(tmp_path: Path) -> None:
    tiny_causal_lm("mixtral", **FAMILIES["mixtral"]).bfloat16().save_pretrained(tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)

    def work(rank: int) -> str:
        import deepspeed

        placement = Distributed().placement()
        lm = placement.read(lambda: read(tmp_path))
        placement.place(lm, backbone_of(lm))
        parameters = dict(lm.named_parameters())
        with deepspeed.zero.GatheredParameters(list(parameters.values())):
            wrong = [n for n, p in expected.named_parameters() if not torch.equal(p, parameters[n])]
        return json.dumps([wrong, len(parameters)])

    outcomes = ranks(2, work, tmp_path, {"stage": 3, "stage3_param_persistence_threshold": 0})
    for outcome in outcomes:
        assert json.loads(outcome) == [[], len(list(expected.parameters()))]
