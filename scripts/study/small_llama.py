"""A small Llama of the study's own: a tokenizer and a random model, trained on plain text.

The text is the column `document` of a JSONL file. The model is trained by `marlhf sft` with
configs/study/pretrain.yaml; started again, that resumes where it was stopped. Its chat template is
the message and a line break, so that the same configurations serve it as an instruction model.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CONFIG = Path(__file__).parents[2] / "configs" / "study" / "pretrain.yaml"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n\\n' }}{% endif %}"
    "{% endfor %}"
)


def documents(path: Path) -> list[str]:
    """The documents of a JSONL file."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)["document"] for line in lines]


def pretrain(texts: Sequence[str], out: Path, overrides: Sequence[str] = ()) -> None:
    """Write `out/random` and `out/texts.jsonl`, and train `out/final` on them."""
    if not (out / "texts.jsonl").exists():
        write_random_model(texts, out / "random")
        lines = (json.dumps({"text": text}) + "\n" for text in texts)
        (out / "texts.jsonl").write_text("".join(lines), encoding="utf-8")
    paths = [f"model.path={out}/random", f"data.path={out}/texts.jsonl", f"output_dir={out}"]
    words = ["sft", str(CONFIG), *paths, "resume=auto", *overrides]
    subprocess.run([sys.executable, "-m", "marlhf", *words], check=True)


def write_random_model(
    texts: Sequence[str], folder: Path, seed: int = 0, vocab_size: int = 2048, **shape: Any
) -> None:
    """A byte-level BPE tokenizer learned from the texts, and a Llama with random weights."""
    import torch
    from tokenizers import ByteLevelBPETokenizer, Tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size, special_tokens=["<eos>", "<pad>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(bpe.to_str()), eos_token="<eos>", pad_token="<pad>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    defaults: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    config = LlamaConfig(
        **(defaults | shape),
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
