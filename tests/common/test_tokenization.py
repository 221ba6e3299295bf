"""The characters that each token wrote, for the tokenizer families that models use."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.responses import encode, families, sampled_ids
from support.strategies import fast
from support.tiny_models import byte_tokenizer
from support.tokenizer_families import FAMILIES, SAMPLES, byte_level, sentencepiece_bpe, wordpiece
from tokenizers import pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel

from marlhf.common.errors import UserError
from marlhf.common.tokenization import decode_with_offsets
from marlhf.config import ModelSettings
from marlhf.models.loading import load_tokenizer


def text_of(tokenizer, ids: list[int]) -> str:
    """What ids write after "a": the plain decoding of both, less the first."""
    head = encode(tokenizer, "a")
    options = {"clean_up_tokenization_spaces": False}
    before, both = tokenizer.decode(head, **options), tokenizer.decode([*head, *ids], **options)
    assert both.startswith(before)
    return both[len(before) :]


def check_spans(tokenizer, ids: list[int]) -> None:
    """Every invariant that segmenters rely on, and the plain oracle: a token ends where decoding
    all up to it gives the beginning of the text."""
    text, spans = decode_with_offsets(tokenizer, ids)
    length = len(ids)
    while length and ids[length - 1] in (tokenizer.eos_token_id, tokenizer.pad_token_id):
        length -= 1
    assert text == text_of(tokenizer, ids[:length])
    assert len(spans) == len(ids)
    covered, before = 0, (0, 0)
    for span in spans:
        assert span == before or (span[0] == covered and span[1] >= covered), (ids, spans)
        covered, before = span[1], span
    assert covered == len(text)
    for end in range(1, length + 1):
        prefix = text_of(tokenizer, ids[:end])
        assert spans[end - 1][1] == len(prefix) or not text.startswith(prefix), (ids, end, spans)


@fast
@given(families, st.data())
def test_spans_cover_the_decoded_text_in_order(family: str, data):
    tokenizer = FAMILIES[family]()
    check_spans(tokenizer, data.draw(sampled_ids(tokenizer)))


@fast
@given(st.sampled_from(["byte_level", "sentencepiece_bpe", "unigram"]), st.data())
def test_spans_of_bytes_in_any_order(family: str, data):
    """Whole characters, pieces of characters, and bytes that are none, between words."""
    tokenizer = FAMILIES[family]()
    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    if family != "byte_level":
        names = [f"<0x{byte:02X}>" for byte in (0x0A, 0x41, *range(0xC2, 0x100, 7), 0x9F, 0xA9)]
    some = st.sampled_from(tokenizer.convert_tokens_to_ids(names))
    words = st.sampled_from(SAMPLES).map(lambda sample: encode(tokenizer, sample)[-6:])
    parts = st.lists(some, max_size=9) | words
    ids = [token for part in data.draw(st.lists(parts, max_size=4)) for token in part]
    check_spans(tokenizer, ids)


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
        token: piece.encode() if token in special else bytes(alphabet[c] for c in piece)
        for piece, token in tokenizer.get_vocab().items()
    }


@fast
@given(st.lists(st.sampled_from(SAMPLES), min_size=1, max_size=3), st.data())
def test_byte_level_spans_against_byte_counts(samples: list[str], data):
    """Where a token begins and ends on characters its span is exact; elsewhere it is the span of
    the smallest run of tokens that does."""
    tokenizer = byte_level()
    ids = [token for sample in samples for token in encode(tokenizer, sample)]
    place = data.draw(st.sampled_from(clean_places(ids, bytes_of(tokenizer))))
    ids.insert(place, tokenizer.convert_tokens_to_ids("<im_start>"))
    vocabulary = bytes_of(tokenizer)
    text = b"".join(vocabulary[token] for token in ids).decode()
    chars_at = {0: 0}  # byte offset -> characters before it
    for count, char in enumerate(text, 1):
        chars_at[max(chars_at) + len(char.encode())] = count
    spans, run, start, position = [], 0, 0, 0
    for token in ids:
        position += len(vocabulary[token])
        run += 1
        if position in chars_at:
            spans += [(chars_at[start], chars_at[position])] * run
            run, start = 0, position
    assert decode_with_offsets(tokenizer, ids) == (text, spans)


def clean_places(ids: list[int], vocabulary: dict[int, bytes]) -> list[int]:
    """Where a token can be put in without parting the bytes of a character."""
    found, written = [0], b""
    for place, token in enumerate(ids, 1):
        written += vocabulary[token]
        if "\ufffd" not in written.decode(errors="replace"):
            found.append(place)
    return found


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
    assert (text, spans) == ("\ufffd", [(0, 1)] * 3 + [(1, 1)])


def test_special_tokens_are_text_but_for_eos_and_padding_at_the_end():
    tokenizer = byte_level()
    eos, pad, start = tokenizer.convert_tokens_to_ids(["<eos>", "<pad>", "<im_start>"])
    x, y = encode(tokenizer, "x")[0], encode(tokenizer, "\n")[0]
    ids = [start, x, pad, y, eos, pad, eos]
    spans = [(0, 10), (10, 11), (11, 16), (16, 17)] + [(17, 17)] * 3
    assert decode_with_offsets(tokenizer, ids) == ("<im_start>x<pad>\n", spans)
    spans = [(0, 0), (0, 1), (1, 1), (1, 2)] + [(2, 2)] * 3
    assert decode_with_offsets(tokenizer, ids, skip_special_tokens=True) == ("x\n", spans)


def test_a_model_may_have_several_tokens_that_end_a_response():
    tokenizer = byte_level()
    start = tokenizer.convert_tokens_to_ids("<im_start>")
    ids = [*encode(tokenizer, "x"), start]
    assert decode_with_offsets(tokenizer, ids)[0] == "x<im_start>"
    assert decode_with_offsets(tokenizer, ids, eos_ids=[start]) == ("x", [(0, 1), (1, 1)])


@pytest.mark.parametrize("family", ["sentencepiece_bpe", "unigram"])
def test_the_space_that_a_decoder_drops_at_the_start_of_a_text(family: str):
    tokenizer = FAMILIES[family]()
    ids = encode(tokenizer, "the lazy dog")
    for continues, expected in ((True, " the lazy dog"), (False, "the lazy dog")):
        text, spans = decode_with_offsets(tokenizer, ids, continues)
        assert text == expected
        assert "".join(text[a:b] for a, b in spans) == text
        place = text.index(" lazy")
        word = next(i for i, span in enumerate(spans) if span[0] == place)
        assert tokenizer.convert_ids_to_tokens(ids)[word].startswith("▁")


def test_byte_fallback_rewrites_what_it_printed():
    """A line break that is a byte token disappears when invalid bytes follow it."""
    tokenizer = sentencepiece_bpe()
    newline, lead = tokenizer.convert_tokens_to_ids(["<0x0A>", "<0xF0>"])
    the = encode(tokenizer, "the")
    check_spans(tokenizer, [*the, newline, lead])
    text, spans = decode_with_offsets(tokenizer, [*the, newline, lead])
    assert spans[: len(the)] == decode_with_offsets(tokenizer, the)[1]
    assert text == " the\ufffd\ufffd"


def test_spaces_are_not_tidied_up():
    """A reward model would read other tokens than the policy wrote."""
    tokenizer = wordpiece()
    assert tokenizer.clean_up_tokenization_spaces
    ids = tokenizer.convert_tokens_to_ids(["it", "'", "s", "the"])
    assert tokenizer.unk_token_id not in ids
    assert decode_with_offsets(tokenizer, ids)[0] == " it ' s the"


def test_empty_response():
    assert decode_with_offsets(byte_level(), []) == ("", [])


def decoded_tokens(tokenizer, ids: list[int], monkeypatch) -> int:
    """Tokens that the tokenizer decodes for the offsets of `ids`."""
    counts: list[int] = []
    real = type(tokenizer).decode

    def counted(self, ids, **options):
        counts.append(len(ids))
        return real(self, ids, **options)

    monkeypatch.setattr(type(tokenizer), "decode", counted)
    decode_with_offsets(tokenizer, ids)
    monkeypatch.undo()
    return sum(counts)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("cut", [0, 1, 2, 3])
def test_what_a_long_response_costs_is_linear(family: str, cut: int, monkeypatch):
    tokenizer = FAMILIES[family]()
    ids = (encode(tokenizer, SAMPLES[0] + SAMPLES[7] + SAMPLES[8]) * 12)[: 512 - cut]
    assert decoded_tokens(tokenizer, ids, monkeypatch) < 24 * len(ids)


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("byte_level", "F09F9880" * 127 + "F09F98"),  # cut inside a character
        ("byte_level", "80" * 511),  # no character at all
        ("byte_level", "80" * 300 + "61" * 200 + "F0"),
        ("byte_level", "E4BDA0" * 170 + "E4"),
        ("sentencepiece_bpe", "F09F9880" * 127 + "F09F98"),  # one byte spoils all before it
        ("sentencepiece_bpe", "0A" * 300 + "F0" + "41" * 200),
        ("sentencepiece_bpe", "E4BDA0" * 170 + "E4"),
        ("unigram", "80" * 511),
        ("unigram", "0A" * 510 + "F0"),
    ],
)
def test_bytes_that_are_no_text_cost_no_more(family: str, text: str, monkeypatch):
    tokenizer = FAMILIES[family]()
    names = [f"<0x{byte:02X}>" for byte in bytes.fromhex(text)]
    if family == "byte_level":
        by_bytes = {value: token for token, value in bytes_of(tokenizer).items()}
        ids = [by_bytes[bytes([byte])] for byte in bytes.fromhex(text)]
    else:
        ids = tokenizer.convert_tokens_to_ids(names)
    assert tokenizer.unk_token_id not in ids
    assert decoded_tokens(tokenizer, ids, monkeypatch) < 24 * len(ids)
    assert decode_with_offsets(tokenizer, ids)[1][-1][1] == len(text_of(tokenizer, ids))


@pytest.mark.parametrize("limit", ["x", [5], {"a": 1}])
def test_a_tokenizer_that_encodes_nothing_is_refused_as_it_is_loaded(limit, tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": limit}))
    with pytest.raises(UserError, match=r"^model\.path: .*tokenizer of .*") as refusal:
        load_tokenizer(ModelSettings(path=str(tmp_path)))
    assert "\n" not in str(refusal.value)
