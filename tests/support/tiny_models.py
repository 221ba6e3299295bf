"""Tiny models with random weights, the same for the same seed, and a byte tokenizer for them.

Weights are drawn on a scale at which attention, position and head all matter: with the usual
initialisation (0.02) a tiny model's outputs barely depend on its input, and tests cannot fail.
"""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

_DECODER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_BERT = {**_DECODER, "type_vocab_size": 2}
FAMILIES = ("llama", "gpt2", "gemma", "gemma2", "qwen2", "qwen3")


BYTES_VOCAB = 260  # three special tokens, 256 bytes, one spare
CHATML = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def byte_tokenizer(
    add_bos: bool = False,
    add_eos: bool = False,
    pad: str | None = "<pad>",
    chat_template: str | None = None,
    bos: str | None = "<s>",
) -> Any:
    """One token a byte: `<s>` 0, `</s>` 1, `<pad>` 2, byte b somewhere in 3..258."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<s>", "</s>", "<pad>"]
    vocab = {token: i for i, token in enumerate([*specials, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.add_special_tokens(specials)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if add_bos or add_eos:
        single = ("<s> " if add_bos else "") + "$A" + (" </s>" if add_eos else "")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token="</s>",
        pad_token=pad,
        chat_template=chat_template,
        additional_special_tokens=specials,
    )


def tiny_config(family: str, vocab_size: int = 64, **changes: Any) -> Any:
    """A configuration of hidden size 32 and two layers, without dropout.

    family: any of FAMILIES, `bert`, or another model type with Llama's names for its sizes.
    """
    special = {"gpt2": _GPT2, "bert": _BERT, "qwen3_moe": {**_DECODER, **_EXPERTS}}
    sizes = dict(special.get(family, _DECODER))
    if family == "bert":
        sizes = {k: v for k, v in sizes.items() if k not in ("head_dim", "num_key_value_heads")}
        sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if family == "gpt2":
        sizes |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    tokens: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    if family == "bert":
        tokens = {"pad_token_id": 0}
    config = AutoConfig.for_model(family, vocab_size=vocab_size, **{**sizes, **tokens, **changes})
    config._attn_implementation = "eager" if family == "gemma2" else "sdpa"
    return config


def tiny_causal_lm(family: str, vocab_size: int = 64, seed: int = 0, **changes: Any) -> Any:
    """A causal LM in eval mode, fp32. `changes` go into its configuration."""
    config = tiny_config(family, vocab_size, **changes)
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return randomize(model, seed).eval()


def tiny_sequence_classifier(
    family: str, vocab_size: int = 64, seed: int = 0, num_labels: int = 1, **changes: Any
) -> Any:
    """A sequence classifier in eval mode, fp32; a reward model with `num_labels=1`."""
    config = tiny_config(family, vocab_size, num_labels=num_labels, **changes)
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    return randomize(model, seed).eval()


@torch.no_grad()
def randomize(model: Any, seed: int) -> Any:
    """Draw every weight anew: matrices keep their input's scale, embeddings are N(0, 0.4^2),
    and vectors (norms, biases) move by N(0, 0.1^2) from where they were. Embeddings that are also
    the output head are smaller, or every token would predict itself."""
    scale = 0.2 if getattr(model.config, "tie_word_embeddings", False) else 0.4
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() < 2:
            parameter.add_(0.1 * noise)
        elif id(parameter) in embeddings:
            parameter.copy_(scale * noise)
        else:
            parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    return model
