"""The characters that each token wrote, for the tokenizer families that models use."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from responses_for_tests import encode, families, sampled_ids
from strategies import fast
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers_for_tests import FAMILIES, SAMPLES, byte_level, sentencepiece_bpe, wordpiece

from marlhf import tokenization
from marlhf.tokenization import decode_with_offsets


def check_spans(tokenizer, ids: list[int]) -> None:
    """Every invariant that segmenters rely on."""
    text, spans = decode_with_offsets(tokenizer, ids)
    assert text == tokenizer.decode(ids, skip_special_tokens=True)
    assert len(spans) == len(ids)
    covered, before = 0, (0, 0)
    for span in spans:
        assert span == before or (span[0] == covered and span[1] >= covered), (ids, spans)
        covered, before = span[1], span
    assert covered == len(text) or not ids


@fast
@given(families, st.data())
def test_spans_cover_the_decoded_text_in_order(family: str, data):
    tokenizer = FAMILIES[family]()
    check_spans(tokenizer, data.draw(sampled_ids(tokenizer)))


@fast
@given(families, st.data())
def test_slow_path_has_the_same_invariants(family: str, data):
    tokenizer = FAMILIES[family]()
    ids = data.draw(sampled_ids(tokenizer))
    text = tokenizer.decode(ids, skip_special_tokens=True)
    spans = tokenization._prefix_spans(tokenizer, ids, text)
    assert [s for s, _ in spans] == sorted(s for s, _ in spans)
    assert not ids or spans[-1][1] == len(text)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("text", SAMPLES)
def test_truncation_at_every_token(family: str, text: str):
    ids = encode(FAMILIES[family](), text)
    for end in range(len(ids) + 1):
        check_spans(FAMILIES[family](), ids[:end])


def bytes_of(tokenizer) -> dict[int, bytes]:
    """Token id -> bytes of a byte-level tokenizer, from the published GPT-2 byte alphabet."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}
    assert set(alphabet) == set(ByteLevel.alphabet())
    special = set(tokenizer.all_special_ids)
    return {
        token: b"" if token in special else bytes(alphabet[c] for c in piece)
        for piece, token in tokenizer.get_vocab().items()
    }


@fast
@given(st.lists(st.sampled_from(SAMPLES), min_size=1, max_size=3), st.data())
def test_byte_level_spans_against_byte_counts(samples: list[str], data):
    """Where a token begins and ends on characters its span is exact; elsewhere it is the span of
    the smallest run of tokens that does."""
    tokenizer = byte_level()
    ids = [token for sample in samples for token in encode(tokenizer, sample)]
    special = data.draw(st.integers(0, len(ids)))
    ids.insert(special, tokenizer.eos_token_id)
    vocabulary = bytes_of(tokenizer)
    chars_at = {0: 0}  # byte offset -> characters before it
    for count, char in enumerate("".join(samples), 1):
        chars_at[max(chars_at) + len(char.encode())] = count
    spans, run, start, position = [], 0, 0, 0
    for token in ids:
        position += len(vocabulary[token])
        run += 1
        if position in chars_at:
            spans += [(chars_at[start], chars_at[position])] * run
            run, start = 0, position
    assert decode_with_offsets(tokenizer, ids) == ("".join(samples), spans)


def test_bytes_of_one_emoji_share_its_span():
    tokenizer = byte_level()
    ids = [*encode(tokenizer, "ok"), *(tokenizer.convert_tokens_to_ids(c) for c in "ðŁĺĢ")]
    text, spans = decode_with_offsets(tokenizer, ids)
    assert text == "ok😀"
    assert spans[-4:] == [(2, 3)] * 4


def test_emoji_cut_at_the_limit_and_eos_after_it():
    tokenizer = byte_level()
    emoji = [tokenizer.convert_tokens_to_ids(c) for c in "ðŁĺĢ"]
    text, spans = decode_with_offsets(tokenizer, [*emoji[:3], tokenizer.eos_token_id])
    assert (text, spans) == ("\ufffd", [(0, 1)] * 4)


def test_special_tokens_write_nothing():
    tokenizer = byte_level()
    eos = tokenizer.eos_token_id
    x, y = encode(tokenizer, "x")[0], encode(tokenizer, "\n")[0]
    assert decode_with_offsets(tokenizer, [eos, x, eos, y, eos]) == (
        "x\n",
        [(0, 0), (0, 1), (1, 1), (1, 2), (2, 2)],
    )


def test_the_leading_space_that_a_decoder_drops():
    tokenizer = sentencepiece_bpe()
    ids = encode(tokenizer, "the lazy dog")
    text, spans = decode_with_offsets(tokenizer, ids)
    assert text == "the lazy dog"
    assert "".join(text[a:b] for a, b in spans) == text
    word = next(span for token, span in zip(ids, spans, strict=True) if span[0] == 3)
    assert text[word[0]] == " "
    assert tokenizer.convert_ids_to_tokens(ids)[spans.index(word)].startswith("▁")


def test_byte_fallback_rewrites_what_it_printed():
    """A line break that is a byte token disappears when invalid bytes follow it."""
    tokenizer = sentencepiece_bpe()
    newline, lead = tokenizer.convert_tokens_to_ids(["<0x0A>", "<0xF0>"])
    the = encode(tokenizer, "the")
    check_spans(tokenizer, [*the, newline, lead])
    text, spans = decode_with_offsets(tokenizer, [*the, newline, lead])
    assert spans[: len(the)] == decode_with_offsets(tokenizer, the)[1]
    assert text.startswith("the\ufffd")


def test_a_decoder_that_tidies_across_tokens():
    tokenizer = wordpiece()
    ids = tokenizer.convert_tokens_to_ids(["it", "'", "s", "the"])
    assert tokenizer.unk_token_id not in ids
    text, spans = decode_with_offsets(tokenizer, ids)
    # "it '" becomes "it's" only with the third token, which therefore wrote the apostrophe.
    assert (text, spans) == ("it's the", [(0, 2), (2, 2), (2, 4), (4, 8)])
    assert tokenization._incremental_spans(tokenizer, ids, text) is None


def test_empty_response():
    assert decode_with_offsets(byte_level(), []) == ("", [])


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_long_response_is_decoded_in_windows(family: str, monkeypatch):
    """Linear, not quadratic: decoded tokens in all stay within a few times the length."""
    tokenizer = FAMILIES[family]()
    ids = encode(tokenizer, SAMPLES[0] + " " + SAMPLES[7]) * 12  # no character is cut at the end
    assert len(ids) > 256
    decoded = []
    real = tokenization._decode
    monkeypatch.setattr(tokenization, "_decode", lambda t, i: decoded.append(len(i)) or real(t, i))
    decode_with_offsets(tokenizer, ids)
    assert sum(decoded) < 10 * len(ids)
