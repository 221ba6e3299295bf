"""A base in 4 bits: what is computed with it, what it takes, what is written, what is refused."""

from __future__ import annotations

import importlib.util
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import PeftModel
from support.runs import PROMPTS, tiny_config, tiny_trainer
from support.tiny_models import BYTES_VOCAB, byte_tokenizer, tiny_causal_lm
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from marlhf import cli
from marlhf.common.errors import UserError
from marlhf.config import LoraSettings, ModelSettings, QuantizationSettings
from marlhf.distributed import QuantizedLinear
from marlhf.estimate.command import counter_of, estimates
from marlhf.models import building, loading
from marlhf.models.policy import use_adapter
from marlhf.models.quantized_base import check_quantization
from marlhf.models.reward_classifier import build_classifier, save_classifier
from marlhf.rewards import RewardModel
from marlhf.rollout.policy_weights import policy_weights
from marlhf.training.ppo import PPOTrainer

LORA = LoraSettings(r=4, extra={"init_lora_weights": False})  # adapters that do something
FOUR_BITS: dict[str, Any] = {"lora": LORA, "quantization": QuantizationSettings()}
IDS = torch.arange(40, 60)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal LM, wide enough for blocks of 64, with its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    lm = tiny_causal_lm("qwen2", BYTES_VOCAB, hidden_size=64, intermediate_size=160)
    lm.save_pretrained(folder)
    byte_tokenizer(add_bos=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reward(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model, trained on the base in 4 bits, and its adapter in `adapter/reward`."""
    settings, folder = ModelSettings(path=str(base), **FOUR_BITS), tmp_path_factory.mktemp("reward")
    tokenizer = byte_tokenizer(add_bos=True)
    model = build_classifier(settings, loading.load_model_config(settings), tokenizer)
    save_classifier(model, tokenizer, 0.75, folder)
    return folder


def trainer(base: Path, folder: Path, reward: Any, model: Any = FOUR_BITS) -> PPOTrainer:
    config = tiny_config(folder, model={"path": str(base), **model})
    return PPOTrainer(config, reward=reward, train_dataset=PROMPTS)


def logprobs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.log_softmax(-1)


@torch.no_grad()
def rounded_by_hand(base: Path) -> Any:
    """The base with the weights that NF4 leaves of its linear layers, in plain layers."""
    lm = AutoModelForCausalLM.from_pretrained(base)
    for layer in lm.model.modules():
        if isinstance(layer, nn.Linear):
            packed = quantize_4bit(layer.weight, quant_type="nf4", compress_statistics=True)
            layer.weight.copy_(dequantize_4bit(*packed))
    return lm


def test_the_trained_policy_is_the_rounded_base_and_its_adapter(base: Path, tmp_path: Path) -> None:
    """Where it trains, in `final/`, merged, in the weights for an engine, and in plain PEFT."""
    run = trainer(base, tmp_path / "run", lambda prompts, completions: list(map(len, completions)))
    policy = run.policy.model.model
    start = rounded_by_hand(base)
    with use_adapter(policy, None):  # the reference
        torch.testing.assert_close(logprobs(policy), logprobs(start), atol=1e-5, rtol=0)
    run.step(PROMPTS)
    run.save(tmp_path / "run" / "final")
    adapter = tmp_path / "run" / "final" / "adapter" / "policy"
    by_hand = logprobs(PeftModel.from_pretrained(start, adapter).eval())
    with use_adapter(policy, "policy"):
        torch.testing.assert_close(logprobs(policy), by_hand, atol=1e-5, rtol=0)
    cli.main(["merge", str(tmp_path / "run"), str(tmp_path / "merged")])
    for folder in (tmp_path / "run" / "final", tmp_path / "merged"):
        plain = AutoModelForCausalLM.from_pretrained(folder)
        torch.testing.assert_close(logprobs(plain), by_hand, atol=1e-4, rtol=0)
    for name, weight in policy_weights(run.policy.model):
        torch.testing.assert_close(weight, plain.state_dict()[name], atol=1e-5, rtol=0)
    stored = json.loads((adapter / "quantization_config.json").read_text())
    in_transformers = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=BitsAndBytesConfig(**stored, bnb_4bit_compute_dtype="float32")
    )
    in_peft = PeftModel.from_pretrained(in_transformers, adapter).train()
    torch.testing.assert_close(logprobs(in_peft), by_hand, atol=1e-5, rtol=0)
    full = AutoModelForCausalLM.from_pretrained(
        base
    )  # negative control: merged into that, it is not
    away = logprobs(PeftModel.from_pretrained(full, adapter).eval()) - by_hand
    assert away.abs().max() > 0.05


def test_gradients_are_those_over_the_rounded_base(base: Path) -> None:
    settings = ModelSettings(path=str(base), **FOUR_BITS)
    config = loading.load_model_config(settings)
    policy = loading.build_policy(settings, byte_tokenizer(), config).model
    by_hand = building.add_adapter(rounded_by_hand(base), LORA, "policy")
    by_hand.load_state_dict(
        {name: p for name, p in policy.state_dict().items() if "lora_" in name}, strict=False
    )
    gradients = []
    for model in (policy, by_hand):
        model(IDS).logits.log_softmax(-1)[:, :-1].gather(-1, IDS[:, 1:, None]).mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


def test_four_models_on_one_base_of_half_a_byte_a_parameter(
    base: Path, reward: Path, tmp_path: Path
) -> None:
    run = trainer(base, tmp_path, str(reward / "adapter" / "reward"))
    assert run.critic is not None
    assert run.reference is not None
    function: Any = run.reward.rewards[0].function
    models = [run.policy.model, run.critic.model, run.reference, function.model]
    assert len({id(next(model.parameters())) for model in models}) == 1
    layers = {m for model in models for m in model.modules() if isinstance(m, QuantizedLinear)}
    assert len(layers) == 2 * 7
    taken = sum(
        x.nbytes for layer in layers for x in (layer.weight, layer.scales, layer.scales_scale)
    )
    assert taken / sum(layer.size for layer in layers) == pytest.approx(0.5 + 1 / 64, rel=0.01)
    storages = {
        x.untyped_storage().data_ptr(): x.nbytes
        for model in models
        for name, x in (*model.named_parameters(), *model.named_buffers())
        if "inv_freq" not in name
    }
    adapter = str(reward / "adapter" / "reward")
    config = tiny_config(
        tmp_path, model={"path": str(base), **FOUR_BITS}, reward={"models": adapter}
    )
    estimated = estimates(counter_of(config), 1)["single"].weights
    assert sum(storages.values()) == pytest.approx(estimated, rel=0.03)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_update_starts_at_ratio_one(base: Path, tmp_path: Path, precision: str) -> None:
    run = trainer(
        base,
        tmp_path,
        lambda prompts, completions: [1.0] * 8,
        {**FOUR_BITS, "precision": precision},
    )
    state = {name: p.clone() for name, p in run.policy.model.named_parameters()}
    rows = [run.step(PROMPTS) for _ in range(2)]
    assert rows[0]["kl_mean"] != 0  # adapters differ from the start
    changed = {n for n, p in run.policy.model.named_parameters() if not torch.equal(p, state[n])}
    assert changed
    assert all("lora_" in name for name in changed)


def test_saving_leaves_the_policy_as_it_is(tmp_path: Path) -> None:
    """Where merging adds to biases, too."""
    lora = LoraSettings(
        r=4,
        target_modules=["query_key_value"],
        extra={"lora_bias": True, "init_lora_weights": False},
    )
    model = {"lora": lora, "quantization": QuantizationSettings()}
    run = tiny_trainer(tmp_path / "run", "gpt_neox", model=model)
    run.step(PROMPTS)
    with use_adapter(run.policy.model.model, "policy"):
        before = logprobs(run.policy.model.model)
        run.save(tmp_path / "final")
        assert torch.equal(logprobs(run.policy.model.model), before)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    torch.testing.assert_close(logprobs(saved), before, atol=1e-4, rtol=0)


def test_a_model_object_is_checked_as_files_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="only 0% are in linear layers"):
        tiny_trainer(tmp_path, "gpt2", model=FOUR_BITS)


def test_a_reward_model_scores_on_the_shared_base_as_merged(
    base: Path, reward: Path, tmp_path: Path
) -> None:
    wanted = RewardModel(str(reward))(PROMPTS, PROMPTS)
    adapter = str(reward / "adapter" / "reward")
    assert RewardModel(adapter)(PROMPTS, PROMPTS) == pytest.approx(wanted, abs=1e-4)
    run = trainer(base, tmp_path / "same", adapter)
    assert run.reward.rewards[0].function(PROMPTS, PROMPTS) == pytest.approx(wanted, abs=1e-4)
    assert not any("4 bits" in note for note in run.notes)
    other = trainer(base, tmp_path / "other", adapter, {"lora": LORA})
    (note,) = (note for note in other.notes if "4 bits" in note)
    assert "was trained on a base in 4 bits; here it is in full precision" in note


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "no linear layers": ("gpt2", {}, "only 0% are in linear layers"),
    "fused experts": ("qwen3_moe", {}, r"only \d+% are in linear layers"),
    "DoRA": ("llama", {"use_dora": True}, "use_dora: given True, .* with model.quantization"),
    "one parameter": ("llama", {"target_parameters": ["x.weight"]}, "target_parameters: given"),
    "trained layer": ("llama", {"modules_to_save": ["v_proj"]}, "given 'v_proj', whose weights"),
    "trained block": ("llama", {"modules_to_save": ["norm", "mlp"]}, "given 'mlp', whose weights"),
    "quantised already": ("quantised", {}, "is quantised already; must be a model in full prec"),
    "GGUF": ("gguf", {}, "is a GGUF file; must be a model in full precision"),
    "without the extra": ("llama", {}, r"pip install 'marlhf\[quantization\]'"),
    "broken library": ("llama", {}, "model.quantization: cannot import bitsandbytes: .*libcudart"),
}
OF_ALL_MODELS = ("GGUF", "without the extra", "broken library")


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_quantised_is_refused_before_weights_are_read(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, extra, fault = REFUSED[case]
    config = tiny_causal_lm(family if family in ("gpt2", "qwen3_moe") else "llama").config
    if family == "quantised":
        config.quantization_config = {"quant_method": "fp8"}
    config.save_pretrained(tmp_path)
    if case == "without the extra":
        real = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else real(name)
        )
    if case == "broken library":
        (tmp_path / "bitsandbytes.py").write_text("raise OSError('libcudart.so')")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "bitsandbytes")
    settings = ModelSettings(
        path=str(tmp_path), lora=LoraSettings(extra=extra), quantization=QuantizationSettings()
    )
    read = partial(loading.load_model_config, settings, weights=False)
    if case in OF_ALL_MODELS:
        read = partial(check_quantization, config, settings, is_gguf=family == "gguf")
    with pytest.raises(UserError, match=fault):
        read()
