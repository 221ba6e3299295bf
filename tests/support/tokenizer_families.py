"""Tiny tokenizers of the families that models use, trained in place: no file, no network.

Each is a transformers tokenizer with `eos_token` and `pad_token`, and about 600 entries.
"""

from __future__ import annotations

import functools
import json

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SAMPLES = [
    "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs!",
    "\n\nI wasn't sure that it would work, but the people of the village helped us.\n",
    "def add(a, b):\n    # indented\n    if a:\n        return a + b\n\n\nprint(add(1, 2))\n",
    "你好，世界。今天天气很好！我们去公园吧。",
    "コンピュータを使う。ありがとう。",
    "مرحبا بالعالم. هذا جميل جدًا؟ نعم.",
    "हिन्दी में लिखो। यह अच्छा है।",
    "naïve café: 10.5€ — “quoted” … ok",
    "👍🏽 family: 👨‍👩‍👧‍👦 flag: 🇩🇪 keycap: 1️⃣ 😀😀",
    "1. First item\n2. Second item\n\t- nested\r\n",
]
SPECIAL = ["<pad>", "<eos>", "<im_start>", "<unk>"]


@functools.cache
def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2, Llama 3, Qwen, SmolLM."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SAMPLES * 3, trainer)
    return _wrap(tokenizer)


@functools.cache
def sentencepiece_bpe() -> PreTrainedTokenizerFast:
    """BPE over "▁word" pieces with byte fallback, as Llama 2 and Mistral."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, limit_alphabet=60, show_progress=False
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.train_from_iterator(SAMPLES * 3, trainer)
    description = json.loads(tokenizer.to_str())
    description["pre_tokenizer"] = None  # it only kept merges from crossing words
    description["model"]["byte_fallback"] = True
    vocabulary = description["model"]["vocab"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    tokenizer = Tokenizer.from_str(json.dumps(description))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return _wrap(tokenizer)


@functools.cache
def unigram() -> PreTrainedTokenizerFast:
    """Unigram with Metaspace and byte fallback, as T5 and Gemma."""
    words = {f"▁{word}" for sample in SAMPLES for word in sample.split()}
    letters = {letter for sample in SAMPLES[:2] for letter in sample if not letter.isspace()}
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += sorted((words | letters | {"▁", "▁▁"}) - set(pieces))
    tokenizer = Tokenizer(
        models.Unigram([(p, -float(i)) for i, p in enumerate(pieces)], unk_id=3, byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return _wrap(tokenizer)


@functools.cache
def wordpiece() -> PreTrainedTokenizerFast:
    """WordPiece with "##ing" continuations and a decoder that tidies spaces, as BERT."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    trainer = trainers.WordPieceTrainer(
        vocab_size=600,
        special_tokens=SPECIAL,
        continuing_subword_prefix="##",
        show_progress=False,
    )
    tokenizer.train_from_iterator(SAMPLES * 3, trainer)
    return _wrap(tokenizer, clean_up_tokenization_spaces=True)


FAMILIES = {
    "byte_level": byte_level,
    "sentencepiece_bpe": sentencepiece_bpe,
    "unigram": unigram,
    "wordpiece": wordpiece,
}


def _wrap(tokenizer: Tokenizer, **options: object) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<im_start>"],
        **options,
    )
