"""Which model families work: docs/models.md, made with the transformers that is installed.

    python scripts/model_families.py                    # all, a few seconds each
    python scripts/model_families.py llama mamba        # rows for some of them

A tiny model with random weights of every family in transformers' list of causal language models is
written to a folder and loaded as `marlhf ppo` and `marlhf sft` load it. What loads is then compared
with what the library has no part in: the model's own logits for each row alone, transformers' own
`generate`, and a model read back from the folder that was saved. No download; each family in a
process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import re
import tempfile
from pathlib import Path
from typing import Any

COLUMNS = ("full", "LoRA", "packing")
WORKS = "yes"
_SECONDS = 180
_LARGEST = 30_000_000  # parameters
_EXACT = 0.01  # nats, or standard deviations of the logits
_PROMPTS = [[5, 9, 17, 33, 8, 21, 40], [12, 6, 50], [44, 7, 31, 15, 29, 60, 11, 9, 35]]
_NEW = 8

# one size for every family, under the names that families have for it
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "n_embed"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "mlp_dim"), 96),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim"), 96),
    **dict.fromkeys(("out_hidden_size", "projector_input_dim", "projector_output_dim"), 64),
    **dict.fromkeys(("decoder_layers", "encoder_layers", "depth", "num_global_layers"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "num_heads"), 4),
    "rotary_dim": 8,
    "shared_experts_intermediate_size": 32,
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("expert_ffn_hidden_size", "moe_shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("shared_intermediate_size", "intermediate_size_mlp", "ffn_hidden_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "attention_heads", "n_heads"), 4),
    **dict.fromkeys(("num_key_value_heads",), 2),
    **dict.fromkeys(("head_dim", "global_head_dim", "attention_head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "kv_channels", "d_kv"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "top_k_experts", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 128),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "linear_key_head_dim"), 16),
    **dict.fromkeys(("linear_value_head_dim", "state_size", "mamba_d_state", "ssm_state_size"), 16),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "chunk_size"), 8),
    "vocab_size": 64,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 16,
}
_SSM = {"mamba_n_heads": 8, "mamba_n_groups": 1}
_MIXED = ["mamba", "mamba", "hybrid", "mamba", "hybrid", "mamba", "hybrid"]
_FULL = ["full_attention"] * 4
_LINEAR = ["linear_attention", "full_attention"] * 2
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_NEED_IDS = ("roberta", "roberta-prelayernorm", "camembert", "data2vec-text", "xlm-roberta")
_NEED_IDS += ("xlm-roberta-xl", "prophetnet", "gemma4_text", "gemma4_unified_text")
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_OWN: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "bamba": {**_SSM, "attn_layer_indices": [1, 3]},
    "falcon_h1": {**_SSM, "mamba_d_ssm": 128},
    "granitemoehybrid": {**_SSM, "layer_types": ["mamba", "attention"] * 2},
    "nemotron_h": {"mamba_num_heads": 8, "n_groups": 1},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba": {
        "num_hidden_layers": 6,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_key_value_heads": 4,
        "attention_head_dim": 32,
    },
    "zamba2": {
        "num_hidden_layers": 7,
        "layer_types": _MIXED,
        "hybrid_layer_ids": [2, 4, 6],
        "n_mamba_heads": 8,
        "mamba_ngroups": 1,
        "num_key_value_heads": 4,
        "num_mem_blocks": 1,
    },
    **dict.fromkeys(_NEED_IDS, _IDS),
    "bailing_hybrid": {"layer_types": _LINEAR},
    "kimi_linear": {"layer_types": _LINEAR},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1},
    "cohere_compass_text": {
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    "hrm_text": {"H_cycles": 2, "L_cycles": 1},
    "xmod": {**_IDS, "default_language": "en_XX"},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "moe_topk": 2},
    "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", *_FULL[:3]],
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "reformer": {"axial_pos_embds": False, "is_decoder": True},
    "zaya": {"num_experts_per_tok": 1},
    "phi3": {"pad_token_id": 0},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
}
# variants: what a family does with a setting that is off by default
_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon (alibi)": ("falcon", {"alibi": True}),
    "mixtral (jitter)": ("mixtral", {"router_jitter_noise": 0.1}),
    "phi3 (LongRoPE, below the switch)": ("phi3", {"switch": 64}),
    "phi3 (LongRoPE, across the switch)": ("phi3", {"switch": 12}),
}


class Tokens:
    """All that loading and sampling ask of a tokenizer."""

    pad_token_id, eos_token_id = 0, None

    def __len__(self) -> int:
        return _SIZES["vocab_size"]


def families() -> list[str]:
    """Model types that transformers has a causal language model for."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def small_config(family: str) -> Any:
    """The family's configuration in small. Raises whatever its own checks come to."""
    from transformers import CONFIG_MAPPING

    family, changes = _VARIANTS.get(family, (family, {}))
    changes = dict(changes)
    if (switch := changes.pop("switch", None)) is not None:
        factors = {"short_factor": [1.0] * 8, "long_factor": [8.0, 7, 6, 5, 4, 3, 2, 1]}
        limits = {"original_max_position_embeddings": switch, "rope_theta": 1e4}
        changes["rope_parameters"] = {"rope_type": "longrope", **factors, **limits}
        changes["original_max_position_embeddings"] = switch
    return _small(CONFIG_MAPPING[family], changes)


def _small(config_class: Any, changes: dict[str, Any]) -> Any:
    """A small configuration, of the parts too where a model has more than text."""
    default = config_class()
    known = {*vars(default), *getattr(config_class, "attribute_map", {})}
    sizes = {name: _SIZES[name] for name in _SIZES.keys() & known if _has(default, name)}
    if "kv_lora_rank" in sizes:  # latent attention has as many keys as queries
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    parts = {name: getattr(default, name, None) for name in config_class.sub_configs}
    parts = {name: _small(type(part), {}) for name, part in parts.items() if part is not None}
    keys = {**sizes, **parts, **_OWN.get(config_class.model_type, {}), **changes}
    try:
        return config_class(**{**dict.fromkeys(_IDS), **keys})
    except Exception:  # some need numbers
        return config_class(**{**_IDS, **keys})


def _has(config: Any, name: str) -> bool:
    """Whether the configuration has one such size, and not one for each layer."""
    try:
        return getattr(config, name) is not None
    except Exception:
        return False


def small_model(family: str) -> Any:
    """A model with random weights on a scale at which context matters."""
    import torch
    from transformers import AutoModelForCausalLM

    config = small_config(family)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > _LARGEST:
        raise ValueError(f"its smallest configuration here has {size:,} parameters")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() < 2:
                weight.add_(0.1 * torch.randn(weight.shape))
            else:
                scale = 0.4 if id(weight) in embeddings else weight.shape[-1] ** -0.5
                weight.copy_(scale * torch.randn(weight.shape))
    return model


def row(family: str) -> list[str]:
    """The table's row of a family, but for its name."""
    from marlhf.config import LoraSettings

    try:
        model = small_model(family)
    except Exception as error:
        return [f"not tried: {_line(error)}", "", ""]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        model.save_pretrained(path)
        full, packing = _full(path)
        lora = _lora(path, LoraSettings(r=2, extra={"init_lora_weights": False}))
    return [full, lora if full == WORKS else "", packing if full == WORKS else ""]


def _loaded(path: Path, **arguments: Any) -> Any:
    """The policy as a run has it."""
    from marlhf.config import ModelSettings
    from marlhf.models.loading import build_policy, load_model_config

    settings = ModelSettings(path=str(path), **arguments)
    config = load_model_config(settings)
    longest = max(map(len, _PROMPTS)) + _NEW
    policy = build_policy(settings, Tokens(), config, longest=longest)
    return policy.eval()


def _full(path: Path) -> tuple[str, str]:
    """What became of full fine-tuning, and of packing in `marlhf sft`."""
    from marlhf.common.errors import UserError
    from marlhf.models.gate import check_packing

    try:
        policy = _loaded(path)
    except UserError as error:
        return f"refused: {_short(error)}", ""
    outcome = _differences(policy, path)
    try:
        check_packing(policy)
    except UserError:
        return outcome, "refused"
    return outcome, WORKS


def _lora(path: Path, lora: Any) -> str:
    """LoRA on all linear layers with random adapters: what is saved must be the policy."""
    import torch
    from transformers import AutoModelForCausalLM

    from marlhf.common.errors import UserError
    from marlhf.models.saving import save_policy

    try:
        policy = _loaded(path, lora=lora)
    except UserError as error:
        return f"refused: {_short(error)}"
    with torch.no_grad():
        adapted = [policy.model(input_ids=torch.tensor([ids])).logits for ids in _PROMPTS]
        save_policy(policy, _Nothing(), path.parent / "final")
        final: Any = AutoModelForCausalLM.from_pretrained(
            path.parent / "final", config=_with_one_rope(path.parent / "final"), dtype=torch.float32
        )
        saved = [final.eval()(input_ids=torch.tensor([ids])).logits for ids in _PROMPTS]
    worst = max(float((a - b).abs().max() / a.std()) for a, b in zip(adapted, saved, strict=True))
    return WORKS if worst < _EXACT else f"WRONG: what is saved differs by {worst:.2g}"


def _differences(policy: Any, path: Path) -> str:
    """Log-probabilities, cached sampling and training mode against the model on its own."""
    import torch
    from transformers import AutoModelForCausalLM

    from marlhf.common.types import Sequences
    from marlhf.config import RolloutSettings
    from marlhf.models.policy import forward
    from marlhf.rollout.transformers_engine import generate

    settings = RolloutSettings(max_new_tokens=_NEW, top_k=1)
    sampled = generate(policy, Tokens(), _PROMPTS, [0, 1, 2], settings)
    plain: Any = AutoModelForCausalLM.from_pretrained(
        path, config=_with_one_rope(path), dtype=torch.float32
    ).eval()
    faults = []
    with torch.no_grad():
        policy.train()
        trained, _ = forward(policy, Sequences.of(sampled))
        policy.eval()
        logprobs, _ = forward(policy, Sequences.of(sampled))
        for i, prompt in enumerate(_PROMPTS):
            response = sampled.response_ids[i].tolist()
            ids = torch.tensor([prompt + response])
            logits = plain(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
            expected = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]
            worst = float((logprobs[i] - expected).abs().max())
            if worst > _EXACT:
                faults.append(f"log-probabilities differ by {worst:.2g}")
            if float((trained[i] - expected).abs().max()) > _EXACT:
                faults.append("training mode differs")
            gap = logits.max(-1).values - logits.gather(1, ids[0, len(prompt) :, None])[:, 0]
            if float(gap.max()) > _EXACT:
                faults.append("sampled tokens are not the likeliest")
        ids = torch.tensor(_PROMPTS[:1])
        try:
            theirs = plain.generate(
                ids, do_sample=False, max_new_tokens=_NEW, pad_token_id=0, eos_token_id=None
            )[0, ids.shape[1] :].tolist()
        except Exception:  # there is nothing to compare with
            theirs = None
        if theirs is not None and theirs != sampled.response_ids[0].tolist():
            faults.append("transformers' generate gives other tokens")
    return "WRONG: " + "; ".join(dict.fromkeys(faults)) if faults else WORKS


def _with_one_rope(path: Path) -> Any:
    """The configuration, with LongRoPE's factors for long sequences alone where the run has them:
    transformers would change them on the way."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path)
    rope = getattr(config, "rope_parameters", None) or {}
    is_long = max(map(len, _PROMPTS)) + _NEW > rope.get("original_max_position_embeddings", 1e9)
    if rope.get("rope_type") == "longrope" and is_long:
        rope["short_factor"] = rope["long_factor"]
    return config


class _Nothing:
    """A tokenizer that writes no files."""

    def save_pretrained(self, folder: Path) -> None:
        """Do nothing."""


def _line(error: object) -> str:
    return " ".join(str(error).split())[:110].replace("|", "/") or type(error).__name__


def _short(error: Exception) -> str:
    """A refusal without the key and the model's class."""
    words = " ".join(str(error).split()).partition(": ")[2]
    words = re.sub(r"'[^']*/model'", "the folder", words).partition(" Model type should be")[0]
    return words.partition("ForCausalLM ")[2] or words


def main() -> None:
    """Print the table."""
    from marlhf.common.third_party_output import hide_loading_bars, quiet_libraries

    quiet_libraries()
    # once, not in every process
    import transformers  # noqa: F401

    import marlhf.models.loading
    import marlhf.rollout.packed_weights  # noqa: F401

    with contextlib.suppress(ImportError):
        import deepspeed  # noqa: F401  which PEFT imports
    hide_loading_bars()
    parser = argparse.ArgumentParser(description="Which model families work")
    parser.add_argument("families", nargs="*", help="model types; default: all")
    options = parser.parse_args()
    print("| family | " + " | ".join(COLUMNS) + " |\n|" + "---|" * (len(COLUMNS) + 1))
    for family in options.families or [*families(), *_VARIANTS]:
        print(f"| {family} | " + " | ".join(_apart(family)) + " |", flush=True)


def _apart(family: str) -> list[str]:
    """The row of a family, from a separate process: it may take long or crash."""
    context = multiprocessing.get_context("fork")  # with what is imported already
    ours, theirs = context.Pipe()
    process = context.Process(target=lambda: theirs.send(_traced(family)))
    process.start()
    cells = ours.recv() if ours.poll(_SECONDS) else [f"not tried: over {_SECONDS} s", "", ""]
    process.kill()
    process.join()
    return cells


def _traced(family: str) -> list[str]:
    try:
        return row(family)
    except Exception as error:
        return [f"TRACEBACK: {type(error).__name__}: {_line(error)}", "", ""]


if __name__ == "__main__":
    main()
