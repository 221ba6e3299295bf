"""Prompt and completion together are the text that the policy read and wrote, for whoever reads
them: rewards, segmenters, samples, evaluations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.evaluations import build_models, lines_of, results_of
from support.responses import batch_of, encode
from support.runs import tiny_config
from support.strategies import fast
from support.tiny_models import tiny_causal_lm
from support.tokenizer_families import FAMILIES, SAMPLES, sentencepiece_bpe
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from marlhf.common.tokenization import continuation_ids
from marlhf.data.encoding import encode as encode_prompts
from marlhf.segmenters import NGram
from marlhf.training.ppo import PPOTrainer
from marlhf.views.inspector import segment_texts

ADDED = [
    AddedToken("<think>", special=True, normalized=False),
    AddedToken("<left>", special=True, normalized=False, lstrip=True),
    AddedToken("<right>", special=True, normalized=False, rstrip=True),
    AddedToken("<tool>", special=False, normalized=False),
    AddedToken("<wide>", special=False, normalized=True, lstrip=True, rstrip=True),
]


def variant(family: str, scheme: str | None = None, tidy: bool = False) -> PreTrainedTokenizerFast:
    """A family's tokenizer with added tokens, another Metaspace, or a decoder that tidies up."""
    tokenizer = Tokenizer.from_str(FAMILIES[family]().backend_tokenizer.to_str())
    if scheme is not None:
        tokenizer.normalizer = normalizers.Sequence([])
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        metaspace = decoders.Metaspace(prepend_scheme=scheme)
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), metaspace])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=tidy,
    )
    wrapped.add_tokens(ADDED)
    return wrapped


TOKENIZERS: dict[str, Any] = {
    "byte level": variant("byte_level"),
    "byte level, tidy": variant("byte_level", tidy=True),
    "strip and byte fallback": variant("sentencepiece_bpe"),
    "strip and byte fallback, tidy": variant("sentencepiece_bpe", tidy=True),
    "metaspace, always": variant("unigram", "always"),
    "metaspace, first": variant("unigram", "first"),
    "metaspace, never": variant("unigram", "never"),
    "metaspace, tidy": variant("unigram", "first", tidy=True),
    "word pieces": variant("wordpiece", tidy=True),
}
kinds = st.sampled_from(sorted(TOKENIZERS))
PIECES = [*SAMPLES, *(token.content for token in ADDED), " ", "  ", "\n", "a", " .", " n't", "😀"]


def written(tokenizer: Any, ids: list[int]) -> str:
    """Plain decoding, from the beginning of a text."""
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@fast
@given(kinds, st.lists(st.sampled_from(PIECES), min_size=2), st.data())
def test_a_text_cut_anywhere_is_its_two_parts(kind: str, pieces: list[str], data):
    tokenizer = TOKENIZERS[kind]
    ids = encode(tokenizer, "".join(pieces))
    cut = data.draw(st.integers(0, len(ids)))
    prompt, whole = written(tokenizer, ids[:cut]), written(tokenizer, ids)
    if not whole.startswith(prompt) or (cut and not prompt):
        return  # inside a character
    batch = batch_of(tokenizer, [ids[cut:]], continues=[cut > 0])
    (text,), (spans,) = batch.texts, batch.offsets
    assert prompt + text == whole
    assert "".join(text[a:b] for a, b in dict.fromkeys(spans)) == text


@pytest.mark.parametrize("kind", sorted(set(TOKENIZERS) - {"word pieces"}))  # it knows no space
@pytest.mark.parametrize("prompt", ["Say", "Say:", "It is 5 o'clock.\n", "the people"])
def test_what_follows_a_prompt_is_what_was_asked_for(kind: str, prompt: str):
    """Against the text itself, where the tokenizer can say it at all."""
    tokenizer = TOKENIZERS[kind]
    said = 0
    for text in (" the lazy dog", "\n\nok ", " it , is .", " <think> no", " n't"):
        ids = continuation_ids(text, tokenizer)
        if written(tokenizer, [*encode(tokenizer, prompt), *ids]) == prompt + text:
            assert batch_of(tokenizer, [ids]).texts == [text]
            said += 1
    assert said


def test_a_special_token_reaches_rewards_unless_a_key_says_otherwise():
    tokenizer = TOKENIZERS["byte level"]
    ids = encode(tokenizer, "<think>say</think> yes<eos>")
    assert batch_of(tokenizer, [ids]).texts == ["<think>say</think> yes"]
    assert batch_of(tokenizer, [ids], skip_special_tokens=True).texts == ["say</think> yes"]


def run_ppo(
    folder: Path, tokenizer: Any, eos: Any = 1, **rollout: Any
) -> list[tuple[str, str, list[int]]]:
    """Two updates: `(prompt, completion, response ids)` of every response, as a reward and a
    segmenter saw them."""
    texts: list[tuple[str, str]] = []
    ids: list[list[int]] = []

    def score(prompts: list[str], completions: list[str]) -> list[float]:
        texts.extend(zip(prompts, completions, strict=True))
        return [float(len(text)) for text in completions]

    def segmenter(batch):
        ids.extend(batch.unpadded)
        assert batch.texts == [text for _, text in texts[-len(batch.texts) :]]
        return NGram(3)(batch)

    settings = {"batch_size": 4, "max_new_tokens": 12, "max_prompt_length": 16, **rollout}
    prompts = ["the people", "Say:", "helped us", "dog jumps over"]
    model = tiny_causal_lm("llama", len(tokenizer))
    model.generation_config.eos_token_id = eos
    trainer = PPOTrainer(
        tiny_config(folder, rollout=settings, steps=2),
        reward=score,
        segmenter=segmenter,
        train_dataset=prompts,
        model=model,
        tokenizer=tokenizer,
    )
    trainer.train()
    assert len(texts) == len(ids) == 8
    return [(*both, row) for both, row in zip(texts, ids, strict=True)]


@pytest.mark.parametrize("kind", ["strip and byte fallback", "metaspace, first", "byte level"])
def test_rewards_and_segmenters_of_a_run_see_what_was_written(kind: str, tmp_path: Path):
    tokenizer = TOKENIZERS[kind]
    for prompt, completion, ids in run_ppo(tmp_path, tokenizer):
        ids = ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids
        head = encode_prompts([prompt], tokenizer, 16)[0][0]
        whole = written(tokenizer, [*head, *ids])
        assert prompt + completion == whole
    line = json.loads((tmp_path / "samples.jsonl").read_text().splitlines()[0])
    assert "".join(line["macro_actions"]) == line["response"]


def test_skip_special_tokens_is_honoured_in_a_run(tmp_path: Path):
    tokenizer = TOKENIZERS["byte level"]
    special = set(tokenizer.all_special_ids) | set(
        tokenizer.convert_tokens_to_ids(["<think>", "<left>", "<right>"])
    )
    seen = run_ppo(tmp_path, tokenizer, skip_special_tokens=True, temperature=9.0)
    for prompt, completion, ids in seen:
        kept = [token for token in ids if token not in special]
        head = encode_prompts([prompt], tokenizer, 16)[0][0]
        assert prompt + completion == written(tokenizer, [*head, *kept])


def test_the_tokens_that_end_a_response_are_the_models(tmp_path: Path):
    """Of its generation config, which lists turn ends, too."""
    tokenizer = TOKENIZERS["byte level"]
    seen = run_ppo(tmp_path, tokenizer, eos=[1, *range(4, 300)])
    ended = [(text, ids) for _, text, ids in seen if 4 <= ids[-1] < 300]
    assert len(ended) > 4
    for text, ids in ended:
        assert tokenizer.decode(ids[:-1]) == text


def test_an_evaluation_records_what_was_written(tmp_path: Path):
    folder, tokenizer = build_models(tmp_path), TOKENIZERS["strip and byte fallback"]
    for name in ("a", "b"):
        tiny_causal_lm("llama", len(tokenizer), seed=ord(name)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    results_of(folder)
    lines = lines_of(folder, "samples")
    assert len(lines) == 24
    for line in lines:
        ids = [token for token in line["tokens"] if token != tokenizer.eos_token_id]
        head = encode_prompts([line["prompt"]], tokenizer, 512)[0][0]
        assert line["prompt"] + line["response"] == written(tokenizer, [*head, *ids])


def test_the_inspector_shows_responses_as_they_were_written():
    tokenizer = sentencepiece_bpe()
    for text in ("the lazy dog", " the lazy dog"):
        (shown,) = segment_texts([text], [NGram(2)], tokenizer)
        assert "".join(shown.pieces) == text
        assert shown.ids == continuation_ids(" the lazy dog", tokenizer)
