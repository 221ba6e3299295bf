"""Models that are not read exactly are refused at load, in one line."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.runs import tiny_config as run_config
from support.runs import tiny_trainer, vowels
from support.tiny_models import BYTES_VOCAB, byte_tokenizer, randomize, tiny_config
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from marlhf.common.errors import UserError
from marlhf.config import LoraSettings, ModelSettings, RolloutSettings
from marlhf.models.loading import build_policy, check_architecture, load_model_config, load_policy
from marlhf.models.policy import Policy
from marlhf.rewards import RewardModel
from marlhf.rollout.transformers_engine import generate
from marlhf.training.ppo import PPOTrainer

SSM: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 8},
    "falcon_mamba": {"state_size": 8},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
}
SWITCH = 16
LONGROPE = {
    "original_max_position_embeddings": SWITCH,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [8.0, 4.0, 2.0, 1.5],
        "original_max_position_embeddings": SWITCH,
    },
}
MOE = {"num_local_experts": 4}


PLAIN = {"minibatches": 1, "epochs": 1}
BATCH = ["a", "b c", "hello", "q", "r", "long one", "x", "y"]


def model_of(family: str, **changes: Any) -> Any:
    """A causal LM with the attention of its family."""
    config = tiny_config(family, BYTES_VOCAB, **changes)
    config._attn_implementation = None
    with torch.random.fork_rng(devices=[]):
        return randomize(AutoModelForCausalLM.from_config(config), 0).eval()


def greedy(policy: Policy, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    settings = RolloutSettings(max_new_tokens=tokens, top_k=1)
    sampled = generate(policy, byte_tokenizer(), prompts, [0] * len(prompts), settings)
    pairs = zip(sampled.response_ids, sampled.response_mask, strict=True)
    return [ids[mask].tolist() for ids, mask in pairs]


@torch.no_grad()
def assert_are_argmax(model: Any, prompts: list[list[int]], responses: list[list[int]]) -> None:
    for prompt, response in zip(prompts, responses, strict=True):
        logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == response


@pytest.mark.parametrize("family", SSM)
def test_state_spaces_are_sampled_with_their_context(family: str) -> None:
    model = model_of(family, **SSM[family])
    prompts = [list(range(5, 19)), [7, 8, 9], list(range(30, 50)), [7, 8, 9]]
    responses = greedy(Policy(model), prompts, 20)
    assert_are_argmax(model, prompts, responses)
    assert responses[0] != responses[2]


@pytest.mark.parametrize("new_tokens", [6, 40])  # with a prompt of 8: 14 and 48 tokens
def test_longrope_has_one_set_of_factors_in_a_run(tmp_path: Path, new_tokens: int) -> None:
    """Those of the longest sequence that may be, whatever a batch holds."""
    rollout = {"max_prompt_length": 8, "max_new_tokens": new_tokens, "batch_size": 8}
    entropies = []
    for size in (1, 8):
        torch.manual_seed(0)
        trainer = tiny_trainer(
            tmp_path / str(size),
            lm=model_of("phi3", **LONGROPE),
            rollout={**rollout, "micro_batch_size": size},
        )
        policy: Any = trainer.policy.model
        prompts = [[5, 6, 7], list(range(40, 48))]
        assert_are_argmax(policy.model, prompts, greedy(policy, prompts, new_tokens))
        entropies.append(trainer.step(BATCH)["entropy"])
    assert entropies[0] == pytest.approx(entropies[1], abs=1e-6)


@pytest.mark.parametrize("long", [False, True])
def test_the_factors_are_those_of_transformers(long: bool) -> None:
    plain, model = model_of("phi3", **LONGROPE), model_of("phi3", **LONGROPE)
    longest = 40 if long else SWITCH
    settings = ModelSettings(path="given in Python")
    build_policy(settings, byte_tokenizer(), model.config, model, longest=longest)
    few, many = torch.arange(10)[None], torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(model(few).logits, plain(few).logits) != long
        assert torch.equal(model(many).logits, plain(many).logits) == long


def test_a_longrope_reward_model_scores_a_text_as_it_does_alone(tmp_path: Path) -> None:
    config = tiny_config("phi3", BYTES_VOCAB, num_labels=1, pad_token_id=2, **LONGROPE)
    randomize(AutoModelForSequenceClassification.from_config(config), 1).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    reward, texts = RewardModel(str(tmp_path)), ["abc", "hello", "a text of many more letters", "z"]
    alone = [reward([""], [text])[0] for text in texts]
    assert reward([""] * 4, texts) == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize(
    ("family", "changes", "fault"),
    [
        ("minimax", MOE, "MiniMaxForCausalLM fails when it is sampled from: ValueError"),
        ("openai-gpt", {"n_embd": 32, "n_layer": 2, "n_head": 4}, "fails when it is sampled from"),
        ("phimoe", MOE, "or something random"),
        ("rwkv", {}, "RwkvForCausalLM"),
        ("bert", {}, "reads tokens to come"),
    ],
)
def test_families_that_cannot_be_read_are_refused(
    tmp_path: Path, family: str, changes: dict[str, Any], fault: str
) -> None:
    with pytest.raises(UserError, match=fault) as caught:
        tiny_trainer(tmp_path, lm=model_of(family, **changes))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("model.path: ")


def test_llama_4_works(tmp_path: Path) -> None:
    lm = model_of("llama4_text", num_local_experts=2, intermediate_size_mlp=64)
    trainer = tiny_trainer(tmp_path, lm=lm, ppo=PLAIN)
    assert trainer.step(BATCH)["ratio_max"] == pytest.approx(1, abs=1e-4)


def test_adapters_on_what_a_family_calls_in_a_way_of_its_own_are_refused(tmp_path: Path) -> None:
    sizes = {"num_local_experts": 2, "intermediate_size_mlp": 64}
    lm, lora = model_of("llama4_text", **sizes), LoraSettings(r=2)
    with pytest.raises(UserError, match="Llama4ForCausalLM cannot run with adapters on these"):
        tiny_trainer(tmp_path, lm=lm, model={"lora": lora})  # the router, too
    lm, few = model_of("llama4_text", **sizes), LoraSettings(r=2, target_modules=["q_proj"])
    tiny_trainer(tmp_path, lm=lm, model={"lora": few}).step(BATCH)


JAMBA = {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4}
GEMMA3N = {
    "num_kv_shared_layers": 0,
    "layer_types": ["sliding_attention", "full_attention"],
    "activation_sparsity_pattern": [0.0] * 2,
}


@pytest.mark.parametrize(
    ("family", "changes", "layers"),
    [
        ("jamba", JAMBA, ["dt_proj"]),
        ("gemma3n_text", GEMMA3N, ["prediction_coefs", "correction_coefs"]),
    ],
)
def test_adapters_that_a_family_reads_a_weight_past_are_refused(
    tmp_path: Path, family: str, changes: dict[str, Any], layers: list[str]
) -> None:
    names = ", ".join(layers)
    with pytest.raises(UserError, match="reads weights past their adapters") as caught:
        tiny_trainer(tmp_path, lm=model_of(family, **changes), model={"lora": LoraSettings(r=2)})
    line = str(caught.value)
    assert line.startswith("model.lora: ")
    assert f"in {names}; " in line
    assert line.endswith(f"model.lora.extra.exclude_modules=[{names}]")
    # adapters that are not zero at the start
    lora = LoraSettings(r=2, extra={"exclude_modules": layers, "init_lora_weights": False})
    trainer = tiny_trainer(
        tmp_path, lm=model_of(family, **changes), model={"lora": lora}, ppo=PLAIN
    )
    assert trainer.step(BATCH)["ratio_max"] == pytest.approx(1, abs=1e-4)
    model: Any = trainer.policy.model.model.eval()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        trained, merged = model(ids).logits, model.merge_and_unload()(ids).logits
    assert torch.allclose(trained, merged, atol=1e-4)


def read_in_sampling_alone(model: Any) -> Any:
    """A layer whose weight is read directly for one token, as convolutions of state spaces are."""
    mlp = model.model.layers[1].mlp

    def forward(x: Any) -> Any:
        hidden = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
        if x.shape[1] > 1:
            return mlp.down_proj(hidden)
        return torch.nn.functional.linear(hidden, mlp.down_proj.weight)

    mlp.forward = forward
    return model


def test_a_weight_that_sampling_alone_reads_past_its_adapter(tmp_path: Path) -> None:
    lm = read_in_sampling_alone(model_of("llama"))
    with pytest.raises(UserError, match="past their adapters, in down_proj; "):
        tiny_trainer(tmp_path, lm=lm, model={"lora": LoraSettings(r=2)})
    lm, few = (
        read_in_sampling_alone(model_of("llama")),
        LoraSettings(r=2, target_modules=["q_proj"]),
    )
    tiny_trainer(tmp_path, lm=lm, model={"lora": few})


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.mark.parametrize(
    ("family", "lora"),
    [
        ("llama", {"extra": {"use_dora": True}}),
        ("opt", {"extra": {"lora_bias": True}}),
        # 12 tokens do not reach 64 experts
        ("mixtral", {"target_modules": ["q_proj"], "extra": {"target_parameters": EXPERTS}}),
    ],
)
def test_adapters_that_read_a_weight_themselves_are_none_past_it(
    tmp_path: Path, family: str, lora: dict[str, Any]
) -> None:
    sizes = {"num_local_experts": 64} if family == "mixtral" else {}
    tiny_trainer(tmp_path, lm=model_of(family, **sizes), model={"lora": LoraSettings(r=2, **lora)})


class Experts(torch.nn.Module):
    """Experts of which every token goes to the first."""

    def __init__(self, first: torch.nn.Module) -> None:
        super().__init__()
        self.experts = torch.nn.ModuleList([first, copy.deepcopy(first)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts[0](x)


def test_experts_that_no_token_reaches_may_have_adapters(tmp_path: Path) -> None:
    lm = model_of("llama")
    lm.model.layers[0].mlp = Experts(lm.model.layers[0].mlp)
    trainer = tiny_trainer(tmp_path, lm=lm, model={"lora": LoraSettings(r=2)})
    assert trainer.step(BATCH)["ratio_max"] > 0


def test_jitter_of_routers_is_off(tmp_path: Path) -> None:
    model = model_of("mixtral", router_jitter_noise=0.3, **MOE)
    trainer = tiny_trainer(tmp_path, lm=model, ppo=PLAIN)
    assert trainer.step(BATCH)["ratio_max"] == pytest.approx(1, abs=1e-4)


def test_log_probabilities_are_of_evaluation_mode_whatever_training_left(tmp_path: Path) -> None:
    trainer, modes = tiny_trainer(tmp_path), []
    policy: Any = trainer.policy.model
    policy.register_forward_hook(
        lambda module, *_: modes.append((torch.is_grad_enabled(), module.model.training))
    )
    for _ in range(2):
        trainer.step(BATCH)
    assert set(modes) == {(False, False), (True, True)}


def shared(model: Any) -> Any:
    """Two layers with one weight, as the blocks that Zamba repeats."""
    first, second = (layer.mlp.down_proj for layer in model.model.layers)
    second.weight = first.weight
    return model


@pytest.mark.parametrize("layers", [None, [1]])  # adapters in both layers, or in one
def test_adapters_of_a_weight_that_layers_share_are_refused(
    tmp_path: Path, layers: list[int] | None
) -> None:
    extra = {} if layers is None else {"layers_to_transform": layers}
    lora = LoraSettings(r=2, target_modules=["down_proj"], extra=extra)
    with pytest.raises(UserError, match="weight that 2 layers share"):
        tiny_trainer(tmp_path, lm=shared(model_of("llama")), model={"lora": lora})
    lora = LoraSettings(r=2, target_modules=["q_proj"])
    tiny_trainer(tmp_path, lm=shared(model_of("llama")), model={"lora": lora})


def test_zamba_with_adapters_on_its_shared_blocks_is_refused(tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 6, "attn_layer_period": 2, "attn_layer_offset": 1}
    lm = model_of("zamba", num_key_value_heads=4, mamba_d_state=8, **sizes)
    with pytest.raises(UserError, match="weight that 2 layers share"):
        tiny_trainer(tmp_path, lm=lm, model={"lora": LoraSettings(r=2)})


def written(folder: Path, family: str = "llama", **changes: Any) -> Path:
    model_of(family, **changes).save_pretrained(folder)
    byte_tokenizer(add_bos=True).save_pretrained(folder)
    (folder / "prompts.jsonl").write_text('{"prompt": "ab"}\n{"prompt": "hello"}\n')
    return folder


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def trainer_of(folder: Path) -> PPOTrainer:
    data = {"path": str(folder / "prompts.jsonl")}
    config = run_config(folder / "run", model={"path": str(folder)}, data=data)
    return PPOTrainer(config, reward=vowels)


def fault_of(folder: Path) -> str:
    """What PPO and evaluation say of a model, which is the same but for the key."""
    settings, texts = ModelSettings(path=str(folder)), []

    def load() -> Any:
        lm_config = load_model_config(settings, "policies")
        check_architecture(lm_config, settings, "policies")
        return load_policy(settings, byte_tokenizer(), lm_config, "policies")

    for work in (lambda: trainer_of(folder), load):
        with pytest.raises(UserError) as caught:
            work()
        texts.append(str(caught.value))
    assert not any("\n" in text for text in texts)
    assert texts[0].startswith("model.path: ")
    assert texts[1] == texts[0].replace("model.path", "policies")
    return texts[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, value: float) -> None:
    weights = load_file(written(tmp_path) / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 2] = value
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert "hold NaN or infinity, in model.layers.1.mlp.up_proj.weight" in fault_of(tmp_path)


@pytest.mark.parametrize("layers", [0, 1, -1])
def test_layers_that_the_configuration_does_not_have_are_refused(
    tmp_path: Path, layers: int
) -> None:
    change(written(tmp_path) / "config.json", num_hidden_layers=layers, layer_types=None)
    assert "layers" in fault_of(tmp_path)


def test_layers_that_predict_further_tokens_may_be_left_over(tmp_path: Path) -> None:
    weights = load_file(written(tmp_path) / "model.safetensors")
    weights["model.layers.2.eh_proj.weight"] = torch.zeros(3, 3)
    weights["model.rotary_emb.inv_freq"] = torch.zeros(4)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert "have more layers than its config.json, which says 2" in fault_of(tmp_path)
    change(tmp_path / "config.json", num_nextn_predict_layers=1)
    trainer_of(tmp_path)


@pytest.mark.parametrize("ids", ["x", [1, None, "a"], 1.5, [True]])
def test_ids_that_end_a_response_are_integers(tmp_path: Path, ids: Any) -> None:
    file = written(tmp_path) / "generation_config.json"
    change(file, eos_token_id=ids)
    assert "eos_token_id" in fault_of(tmp_path)


def test_an_id_that_the_model_has_no_logit_for_ends_nothing(tmp_path: Path) -> None:
    lm = model_of("llama")
    lm.generation_config.eos_token_id = [1, BYTES_VOCAB]
    trainer = tiny_trainer(tmp_path, lm=lm, rollout={"min_new_tokens": 2})
    trainer.step(BATCH)


def test_the_gate_leaves_no_trace() -> None:
    from marlhf.models.gate import check_model

    model = model_of("llama")
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state, buffers = torch.get_rng_state(), [b.clone() for b in model.buffers()]
    check_model(model, longest=100)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, model.buffers(), buffers))
    assert all(p.grad is None for p in model.parameters())


def test_a_head_reads_states_that_are_narrower_than_those_inside(tmp_path: Path) -> None:
    """OPT-350M projects its last states down."""
    sizes = {"word_embed_proj_dim": 16, "ffn_dim": 64, "do_layer_norm_before": False}
    trainer = tiny_trainer(tmp_path, lm=model_of("opt", **sizes), ppo=PLAIN)
    assert trainer.step(BATCH)["ratio_max"] == pytest.approx(1, abs=1e-4)


def test_a_family_without_checkpointing_says_so(tmp_path: Path) -> None:
    lm = model_of("llama")
    lm.__class__ = type("Odd", (type(lm),), {"supports_gradient_checkpointing": False})
    with pytest.raises(
        UserError, match=r"model\.gradient_checkpointing: given true, must be false"
    ):
        tiny_trainer(tmp_path, lm=lm, model={"gradient_checkpointing": True})
