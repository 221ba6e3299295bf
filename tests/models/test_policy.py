"""Log-probabilities and values against plain full forward passes; LoRA on a shared base."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import (
    BYTES_VOCAB,
    FAMILIES,
    byte_tokenizer,
    tiny_causal_lm,
    tiny_sequence_classifier,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from marlhf.common.errors import UserError
from marlhf.common.types import Generation, Sequences
from marlhf.config import LoraSettings, ModelSettings, PPOConfig
from marlhf.models import adapters, building, loading, policy, saving
from marlhf.models.gate import check_model
from marlhf.models.policy import Critic, Policy, backbone_of, forward

LENGTHS = [(5, 4), (2, 6), (7, 1), (3, 0)]  # prompt and response tokens of each row
TEMPERATURE = 1.3
EVERY = ("entropy", "token_ranks", "hidden_states", "token_embeddings")


def batch() -> Sequences:
    generator = torch.Generator().manual_seed(1)
    P, T = max(p for p, _ in LENGTHS), max(t for _, t in LENGTHS)
    prompts = torch.randint(3, 60, (len(LENGTHS), P), generator=generator)
    responses = torch.randint(3, 60, (len(LENGTHS), T), generator=generator)
    prompt_mask = torch.tensor([[i >= P - p for i in range(P)] for p, _ in LENGTHS])
    response_mask = torch.tensor([[i < t for i in range(T)] for _, t in LENGTHS])
    finished = torch.ones(len(LENGTHS), dtype=torch.bool)
    return Sequences.of(Generation(prompts, prompt_mask, responses, response_mask, finished))


def unpadded(sequences: Sequences, row: int) -> torch.Tensor:
    return sequences.input_ids[row][sequences.attention_mask[row]][None]


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_are_those_of_a_plain_forward_pass(family: str) -> None:
    model, sequences = tiny_causal_lm(family), batch()
    with torch.no_grad():
        logprobs, extras = forward(Policy(model), sequences, temperature=TEMPERATURE, extras=EVERY)
    for row, (prompt, response) in enumerate(LENGTHS):
        ids = unpadded(sequences, row)
        with torch.no_grad():
            logits = model(ids).logits[0, prompt - 1 : -1].double() / TEMPERATURE
        log_p = logits.log_softmax(-1)
        wanted = log_p.gather(1, ids[0, prompt:, None]).squeeze(1)
        torch.testing.assert_close(logprobs[row, :response].double(), wanted, atol=1e-5, rtol=0)
        wanted_entropy = -(log_p.exp() * log_p).sum(-1)
        torch.testing.assert_close(
            extras["entropy"][row, :response].double(), wanted_entropy, atol=1e-5, rtol=0
        )
        assert not logprobs[row, response:].any()
        order = logits.argsort(-1, descending=True).tolist()
        ranks = [order[t].index(token) for t, token in enumerate(ids[0, prompt:].tolist())]
        assert extras["token_ranks"][row].tolist()[:response] == ranks
        with torch.no_grad():
            states = model(ids, output_hidden_states=True).hidden_states[-1][0, prompt - 1 :]
            embeddings = model.get_input_embeddings()(ids[0, prompt:])
        found = extras["hidden_states"][row, : response + 1]
        torch.testing.assert_close(found, states, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(extras["token_embeddings"][row, :response], embeddings)


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # gemma2: after its softcap
def test_eos_has_no_probability_before_min_tokens(family: str) -> None:
    sequences, least, eos_ids = batch(), 3, [2, 60]

    def ours(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        policy = Policy(model, eos_ids=eos_ids)
        arguments = {"temperature": TEMPERATURE, "min_tokens": least, "extras": EVERY}
        logprobs, extras = forward(policy, sequences, **arguments)
        return logprobs, extras["entropy"]

    def plain(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        T = sequences.response_mask.shape[1]
        hidden = policy.backbone_forward(model.model, sequences.input_ids, sequences.attention_mask)
        logits = policy.head_of(model)(hidden[:, -T - 1 : -1]) / TEMPERATURE
        possible = torch.ones(T, logits.shape[-1], dtype=torch.bool)
        possible[:least, eos_ids] = False
        log_p = logits.where(possible, -1e9).log_softmax(-1)
        mask = sequences.response_mask
        logprobs = log_p.gather(-1, sequences.input_ids[:, -T:, None]).squeeze(-1)
        return logprobs.where(mask, 0.0), -(log_p.exp() * log_p).sum(-1).where(mask, 0.0)

    found, wanted = tiny_causal_lm(family), tiny_causal_lm(family)
    for logprobs, _ in (ours(found), plain(wanted)):
        (logprobs * torch.linspace(-1, 1, logprobs.numel()).view_as(logprobs)).sum().backward()
    for x, y in zip(ours(found), plain(wanted), strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)
    gradients = {name: p.grad for name, p in wanted.named_parameters()}
    for name, parameter in found.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-5)
    without, _ = forward(Policy(found), sequences, temperature=TEMPERATURE)
    assert (ours(found)[0] - without)[:, :least].abs().max() > 1e-3
    torch.testing.assert_close(ours(found)[0][:, least:], without[:, least:])


def test_a_final_softcap_is_applied() -> None:
    model = tiny_causal_lm("gemma2", final_logit_softcapping=2.0)
    hidden = torch.randn(3, 32)
    with torch.no_grad():
        raw = model.lm_head(hidden)
        assert raw.abs().max() > 2
        torch.testing.assert_close(policy.head_of(model)(hidden), 2 * torch.tanh(raw / 2))


INKLING = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "mlp_layer_types": ["dense"] * 2,
    "logits_mup_width_multiplier": 3.0,
}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("cohere", {"logit_scale": 0.25}),
        ("granite", {"logits_scaling": 4.0}),
        ("inkling_text", INKLING),
        ("inkling_text", INKLING | {"unpadded_vocab_size": 60}),
        ("recurrent_gemma", {"logits_soft_cap": 2.0, "lru_width": 32}),
    ],
)
def test_logits_are_scaled_as_the_family_does(family: str, changes: dict[str, Any]) -> None:
    model, ids = tiny_causal_lm(family, **changes), torch.arange(3, 20)[None]
    hidden = policy.backbone_forward(policy.backbone_of(model), ids, torch.ones_like(ids))
    logits = model(ids, use_cache=False).logits
    torch.testing.assert_close(policy.head_of(model)(hidden), logits)
    if family != "recurrent_gemma":  # which reads padding
        forward(Policy(model), batch())[0].sum().backward()  # overwrites logits
        assert model.get_output_embeddings().weight.grad.any()


def test_chunks_do_not_change_logprobs_or_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(logits_per_chunk: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        monkeypatch.setattr(policy, "LOGITS_PER_CHUNK", logits_per_chunk)
        model = tiny_causal_lm("llama")
        settings = {"temperature": TEMPERATURE, "extras": ["entropy"]}
        logprobs, extras = forward(Policy(model), batch(), **settings)
        weights = torch.linspace(-1, 1, logprobs.numel()).view_as(logprobs)
        (logprobs * weights + extras["entropy"] * weights.abs()).sum().backward()
        return logprobs.detach(), {n: p.grad for n, p in model.named_parameters()}

    whole, gradients = run(10**9)
    chunked, chunked_gradients = run(64 * 2)  # two tokens at a time
    torch.testing.assert_close(chunked, whole, atol=5e-6, rtol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(chunked_gradients[name], gradient, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # gemma2: after its softcap
@pytest.mark.parametrize("parts", [{"logprobs"}, {"entropy"}, {"logprobs", "entropy"}])
def test_gradients_are_those_of_a_plain_log_softmax(family: str, parts: set[str]) -> None:
    def gradients(ours: bool) -> dict[str, torch.Tensor]:
        model, sequences = tiny_causal_lm(family), batch()
        if ours:
            settings = {"temperature": TEMPERATURE, "extras": parts - {"logprobs"}}
            logprobs, extras = forward(Policy(model), sequences, **settings)
            entropy = extras.get("entropy")
        else:
            T = sequences.response_mask.shape[1]
            hidden = policy.backbone_forward(
                model.model, sequences.input_ids, sequences.attention_mask
            )[:, -T - 1 : -1]
            plain = (policy.head_of(model)(hidden) / TEMPERATURE).log_softmax(-1)
            logprobs = plain.gather(-1, sequences.input_ids[:, -T:, None]).squeeze(-1)
            logprobs = logprobs.where(sequences.response_mask, 0.0)
            entropy = -(plain.exp() * plain).sum(-1).where(sequences.response_mask, 0.0)
        weights = torch.linspace(-1, 1, logprobs.numel()).view_as(logprobs)
        loss = (logprobs * weights).sum() if "logprobs" in parts else logprobs.new_zeros(())
        if "entropy" in parts:
            loss = loss + (entropy * weights.abs()).sum()
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}

    found = gradients(ours=True)
    for name, wanted in gradients(ours=False).items():
        torch.testing.assert_close(found[name], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_values_belong_to_the_state_before_each_token(family: str) -> None:
    classifier, sequences = tiny_sequence_classifier(family), batch()
    critic = building.critic_from_classifier(classifier)
    critic.offset = 0.25
    with torch.no_grad():
        values, last_values = forward(critic, sequences)
    for row, (prompt, response) in enumerate(LENGTHS):
        ids = unpadded(sequences, row)
        with torch.no_grad():
            backbone = getattr(classifier, classifier.base_model_prefix)
            states = classifier.score(backbone(ids).last_hidden_state)[0, :, 0] - 0.25
        wanted = states[prompt - 1 : prompt + response]
        torch.testing.assert_close(values[row, :response], wanted[:-1], atol=1e-5, rtol=0)
        torch.testing.assert_close(last_values[row], wanted[-1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("is_object", [True, False])
def test_reference_and_critic_start_from_the_policy_and_share_nothing(
    tmp_path: Path, is_object: bool
) -> None:
    model = tiny_causal_lm("llama", BYTES_VOCAB)
    model.save_pretrained(tmp_path)
    config = PPOConfig(model=ModelSettings(path=str(tmp_path)))
    models = building.build_models(config, byte_tokenizer(), model=model if is_object else None)
    policy, critic, reference = models
    assert critic is not None
    assert reference is not None
    values, _ = forward(critic, batch())
    assert not values.any()
    same_weights(policy.model, reference.model)
    same_weights(backbone_of(policy.model), critic.backbone)
    storages = [{p.data_ptr() for p in part.parameters()} for part in (policy, critic, reference)]
    assert len(set.union(*storages)) == sum(map(len, storages))
    trains = [any(p.requires_grad for p in m.parameters()) for m in (policy, critic, reference)]
    assert trains == [True, True, False]


def same_weights(module: torch.nn.Module, other: torch.nn.Module) -> None:
    """Compare all tensors of two modules, buffers included."""
    pairs = zip(*((*m.parameters(), *m.buffers()) for m in (module, other)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def lora_models() -> tuple[torch.nn.Module, Policy, Policy, Critic]:
    base = tiny_causal_lm("llama")
    settings = LoraSettings(r=4, extra={"init_lora_weights": False})  # adapters that do something
    adapted = loading.add_adapter(base, settings, "policy")
    policy = Policy(adapted, "policy")
    critic = building.critic_on_shared_base(adapted, settings)
    return base, policy, Policy(adapted, adapter=None), critic


def test_with_lora_policy_critic_and_reference_share_one_frozen_base() -> None:
    torch.manual_seed(0)
    plain, sequences = tiny_causal_lm("llama"), batch()
    _, policy, reference, critic = lora_models()
    with torch.no_grad():
        wanted, _ = forward(Policy(plain), sequences)
        of_policy, _ = forward(policy, sequences)
        of_reference, _ = forward(reference, sequences)
        forward(critic, sequences)
        again, _ = forward(policy, sequences)
    torch.testing.assert_close(of_reference, wanted)
    assert (of_policy - wanted).abs().max() > 1e-3
    torch.testing.assert_close(again, of_policy)
    base = {p.data_ptr() for n, p in policy.named_parameters() if "lora_" not in n}
    assert {p.data_ptr() for n, p in critic.backbone.named_parameters() if "lora_" not in n} <= base


def test_with_lora_each_loss_reaches_its_own_adapter_alone() -> None:
    torch.manual_seed(0)
    _, policy, _, critic = lora_models()
    of_policy = adapters.trainable_parameters(policy, "policy")
    of_critic = adapters.trainable_parameters(critic, "critic")
    assert of_policy
    assert not {id(p) for p in of_policy} & {id(p) for p in of_critic}

    logprobs, _ = forward(policy, batch())
    logprobs.sum().backward()
    assert all(p.grad is not None for p in of_policy)
    assert all(p.grad is None for p in of_critic)
    torch.nn.init.normal_(critic.head.weight)
    values, _ = forward(critic, batch())
    values.sum().backward()
    assert all(p.grad is not None for p in of_critic)
    frozen = [p for n, p in policy.named_parameters() if "lora_" not in n]
    assert all(p.grad is None for p in frozen)


def test_gradient_checkpointing_changes_memory_alone() -> None:
    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        model = tiny_causal_lm("llama")
        if checkpointing:
            loading.enable_checkpointing(model)
            assert model.is_gradient_checkpointing
        model.train()
        forward(Policy(model), batch())[0].sum().backward()
        return [p.grad for p in model.parameters()]

    for with_it, without in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(with_it, without)


def test_dropout_is_zero_whatever_the_checkpoint_says(tmp_path: Path) -> None:
    model = tiny_causal_lm("gpt2")
    model.config.resid_pdrop = model.config.attn_pdrop = model.config.embd_pdrop = 0.3
    model.save_pretrained(tmp_path)
    loaded = loading.load_causal_lm(ModelSettings(path=str(tmp_path))).train()
    ids = torch.arange(5)[None]
    torch.testing.assert_close(loaded(ids).logits, loaded(ids).logits)


def test_weights_are_fp32_whatever_the_checkpoint_holds(tmp_path: Path) -> None:
    copy.deepcopy(tiny_causal_lm("llama")).to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = loading.load_causal_lm(ModelSettings(path=str(tmp_path)))
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_files_of_several_dtypes_lose_nothing(tmp_path: Path, family: str) -> None:
    """Nor do experts, which are several tensors in the files and one in the model."""
    model = tiny_causal_lm(family).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"].float(), 1 / 3)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = loading.load_causal_lm(ModelSettings(path=str(tmp_path)))
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    same_weights(loaded, wanted)
    assert set(loaded.model.norm.weight.tolist()) == {torch.tensor(1 / 3).item()}


@pytest.mark.parametrize("lora", [None, LoraSettings(r=2, extra={"init_lora_weights": False})])
def test_a_saved_policy_is_a_plain_directory(tmp_path: Path, lora: LoraSettings | None) -> None:
    torch.manual_seed(0)
    model = tiny_causal_lm("llama", 260)
    if lora is not None:
        model = loading.add_adapter(model, lora, "policy")
    policy = Policy(model, "policy" if lora else None)
    saving.save_policy(policy, byte_tokenizer(), tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tmp_path)
    with torch.no_grad():
        wanted, _ = forward(policy, batch())
        found, _ = forward(Policy(plain), batch())
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_model_paths_that_cannot_work_are_named(tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "a.gguf").touch()
    (tmp_path / "two" / "b.gguf").touch()
    (tmp_path / "file").touch()
    for path, fault in [
        ("./nowhere", "does not exist"),
        (str(tmp_path / "file"), "is a file"),
        (str(tmp_path), "found neither"),
        (str(tmp_path / "two"), "a.gguf, b.gguf"),
    ]:
        with pytest.raises(UserError, match=fault) as caught:
            loading.load_model_config(ModelSettings(path=path))
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith("model.path: ")


def test_a_family_that_reads_padding_is_refused() -> None:
    config = AutoConfig.for_model("rwkv", vocab_size=64, hidden_size=32, num_hidden_layers=2)
    with pytest.raises(UserError, match="RwkvForCausalLM reads padding on the left"):
        check_model(AutoModelForCausalLM.from_config(config))
    for family in FAMILIES:
        check_model(tiny_causal_lm(family))


def test_weights_keep_the_names_that_checkpoints_know():
    model = tiny_causal_lm("llama")
    names = {
        name.split(".")[0] for name, _ in building.critic_from_policy(model).named_parameters()
    }
    assert names == {"trunk", "head"}
    assert {name.split(".")[0] for name, _ in Policy(model).named_parameters()} == {"model"}


def test_chunks_follow_the_memory_of_the_device() -> None:
    """On 24 GB of 1e9 bytes and on what such a card has, the same; on a CPU as ever."""
    sizes = {None: 24, 8e9: 24, 15.8e9: 24, 24e9: 25, 25.4e9: 25, 42.4e9: 26, 80e9: 27, 150e9: 27}
    for memory, power in sizes.items():
        assert policy.logits_per_chunk(None if memory is None else int(memory)) == 2**power
