"""Segmenters that read text: their rules, and how characters become tokens."""

from __future__ import annotations

import importlib.util
import itertools
import pickle
import re
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.responses import piece_batch, pieces, sampled_responses, text_batch
from support.strategies import fast
from support.tokenizer_families import FAMILIES, SAMPLES, byte_level

from marlhf.common.errors import UserError
from marlhf.common.tokenization import decode_with_offsets
from marlhf.common.types import ResponseBatch
from marlhf.segmenters import (
    Line,
    Sentence,
    Word,
    from_lengths,
    from_text,
    token_starts,
    validate,
)
from marlhf.segmenters.text import (
    line_boundaries,
    sentence_boundaries,
    sentence_spans,
    word_boundaries,
)


def cut(text: str, boundaries: list[int]) -> list[str]:
    edges = sorted({0, *boundaries, len(text)})
    return [text[a:b] for a, b in itertools.pairwise(edges)]


def starts_of(tokens: list[str], *boundaries: int) -> list[int]:
    batch = piece_batch(tokens)
    return sorted(token_starts(batch.texts[0], batch.offsets[0], boundaries))


@pytest.mark.parametrize(
    ("tokens", "boundary", "start"),
    [
        (["Hello", " world"], 6, 1),  # byte-level BPE: the space is part of the word's token
        (["Hello", " world"], 5, 1),  # the same boundary, named before the space
        (["Hello", " ", "world"], 6, 1),  # SentencePiece: a lone space leads the word
        (["Hello ", "world"], 6, 1),  # a trailing space stays with the word before
        (["Hello", " wor", "ld"], 6, 1),  # a continuation does not start
        (["end", ".\n", "Next"], 5, 2),  # a line break belongs to what precedes it
        (["end", ".", "\n", "Next"], 5, 3),
        (["if:", "\n    ", "x"], 8, 2),  # a break and indentation in one token: the break decides
        (["if:", "\n", "    ", "x"], 8, 2),  # in two: the indentation leads the line
        (["if:", "\n", "    ", "x"], 4, 2),
        (["a", ".The", " cat"], 2, 2),  # a token across the boundary stays where it begins
        (["a", "\nThe", " cat"], 2, 1),  # its first visible character decides
        (["Hello", "", " world"], 6, 2),  # a special token joins the macro action before
        (["Hello", " world", ""], 11, None),  # no token writes text there
        (["Hello", "\u3000世"], 6, 1),  # the ideographic space is a space
        (["\n\n", "Hello"], 2, None),  # only white space before: the start of the response
        (["", "Hello"], 0, None),
    ],
)
def test_boundary_to_token(tokens: list[str], boundary: int, start: int | None):
    assert starts_of(tokens, boundary) == ([] if start is None else [start])


def test_boundaries_in_one_token_start_one_macro_action():
    assert starts_of(["a", " b.c.d", " e"], 2, 4, 6) == [1, 2]


def test_only_the_first_byte_token_of_an_emoji_starts():
    tokenizer = byte_level()
    emoji = [tokenizer.convert_tokens_to_ids(c) for c in "ðŁĺĢ"]
    ids = [*tokenizer("ok").input_ids, *emoji, *tokenizer(" x").input_ids]
    first = len(tokenizer("ok").input_ids)
    batch = ResponseBatch(
        torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool), tokenizer=tokenizer
    )
    cuts = from_text(lambda text: [text.index("😀")])(batch)
    assert cuts[0].nonzero().flatten().tolist() == [0, first]


@fast
@given(sampled_responses(max_rows=1), st.data())
def test_starts_follow_from_boundaries(response, data):
    """Each token start follows from a boundary: at most one start for each, none unasked."""
    family, rows = response
    text, spans = decode_with_offsets(FAMILIES[family](), rows[0])
    boundaries = data.draw(st.lists(st.integers(0, len(text)), max_size=6))
    starts = token_starts(text, spans, boundaries)
    assert len(starts) <= len(set(boundaries))
    for token in starts:
        assert spans[token][0] < spans[token][1]
        assert token == 0 or spans[token] != spans[token - 1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Hello, world. Yes!", ["Hello, ", "world. ", "Yes!"]),
        (
            "(Don't stop) it's well-known: 3.14",
            ["(Don't ", "stop) ", "it's ", "well-known: ", "3.14"],
        ),
        ('print("hi") + foo.bar[0]', ["print", '("hi") ', "+ ", "foo.", "bar", "[0]"]),
        ("foo - bar", ["foo ", "- ", "bar"]),
        ("他说「你好」。再见", ["他", "说", "「你", "好」。", "再", "见"]),
        ("コンピュータを使う", ["コンピュータ", "を", "使", "う"]),
        ("हिन्दी में लिखो", ["हिन्दी ", "में ", "लिखो"]),  # vowel signs are marks, not letters
        ("هذا جميل جدًا", ["هذا ", "جميل ", "جدًا"]),
        ("ok 👨‍👩‍👧 Hi👍🏽 1️⃣", ["ok ", "👨‍👩‍👧 ", "Hi👍🏽 ", "1️⃣"]),
        ("☎️now ❤️‍🔥!", ["☎️now ", "❤️‍🔥!"]),
        ("می‌خواهم", ["می‌خواهم"]),  # a joiner inside a Persian word
        ("snake_case x1", ["snake_case ", "x1"]),
        ("   ", ["   "]),
        ("", []),
    ],
)
def test_words(text: str, words: list[str]):
    assert cut(text, word_boundaries(text)) == words


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("Dr. No met J. K. Rowling. She left.", ["Dr. No met J. K. Rowling.", "She left."]),
        ("Use e.g. this etc. and so on. Done.", ["Use e.g. this etc. and so on.", "Done."]),
        ("i went home. then i slept... and slept", ["i went home.", "then i slept... and slept"]),
        ('"Stop!" he said. "Go." Then left.', ['"Stop!" he said.', '"Go."', "Then left."]),
        ("Pi is 3.14. See v1.2 now.", ["Pi is 3.14.", "See v1.2 now."]),
        ("It was I. You know.", ["It was I.", "You know."]),
        ("**Bold.** Next", ["**Bold.**", "Next"]),
        ("Title\n\n1. First item\n  2. Second", ["Title", "1. First item", "2. Second"]),
        ("你好。再见！「好。」他说", ["你好。", "再见！", "「好。」", "他说"]),
        ("３．１４です。はい", ["３．１４です。", "はい"]),
        ("यह है। वह भी।", ["यह है।", "वह भी।"]),
        ("هل هذا؟ نعم.", ["هل هذا؟", "نعم."]),
        (" \n ", []),
        ("", []),
    ],
)
def test_sentences(text: str, sentences: list[str]):
    assert [text[a:b] for a, b in sentence_spans(text)] == sentences


def test_lines_keep_their_breaks_and_blank_lines():
    text = "def f():\n    a\n\n\n  b\r\nc\u2028d\n"
    assert cut(text, line_boundaries(text)) == [
        "def f():\n",
        "    a\n\n\n",
        "  b\r\n",
        "c\u2028",
        "d\n",
    ]


@pytest.mark.parametrize("rule", [word_boundaries, sentence_boundaries, line_boundaries])
@fast
@given(
    st.text(alphabet=st.sampled_from("aB1 .,!?\n\t\"'()。「你かカ👍\u200d\u0301\r…"), max_size=60)
)
def test_rules_return_characters_in_order(rule, text: str):
    found = rule(text)
    assert found == sorted(set(found))
    assert all(0 <= char < len(text) for char in found)


@pytest.mark.parametrize("rule", [word_boundaries, sentence_boundaries])
@pytest.mark.parametrize(
    "unit", ["a", "(", "'a", "1. ", "Mr. ", "```\n", ". ", "a.b.", '."', "é\u0301", "ー", "-", "\n"]
)
def test_rules_are_linear_on_hostile_text(rule, unit: str):
    """No regular expression here backtracks: thousands of repeats take milliseconds."""
    begin = time.perf_counter()
    rule(unit * 5_000)
    small = time.perf_counter() - begin
    begin = time.perf_counter()
    rule(unit * 20_000)
    assert time.perf_counter() - begin < 40 * small + 0.2


@pytest.mark.parametrize("family", ["byte_level", "sentencepiece_bpe", "unigram"])
@pytest.mark.parametrize("sample", SAMPLES[:2] + SAMPLES[5:8])
def test_words_of_spaced_scripts_survive_tokenization(family: str, sample: str):
    """Where no token spans a boundary, the macro actions are the words, whatever the tokenizer."""
    batch = text_batch(FAMILIES[family](), sample)
    found = pieces(Word()(batch), batch)
    text = batch.texts[0]
    assert [p.strip() for p in found] == [
        p.strip() for p in cut(text, word_boundaries(text)) if p.strip()
    ]


def test_sentence_and_line_on_tokens():
    batch = text_batch(byte_level(), "One here. Two.\nthree", "")
    assert pieces(Sentence()(batch), batch) == ["One here.", " Two.\n", "three"]
    assert pieces(Line()(batch), batch) == ["One here. Two.\n", "three"]
    assert not Sentence()(batch)[1].any()


def test_word_language_uses_spacy():
    pytest.importorskip("spacy")
    batch = text_batch(byte_level(), "Don't stop, now")
    assert pieces(Word(language="en")(batch), batch) == ["Do", "n't", " stop", ",", " now"]
    with pytest.raises(UserError, match=r"language.*'xyz'"):
        Word(language="xyz")


def test_a_batch_without_tokenizer_says_so():
    batch = ResponseBatch(torch.zeros(1, 2).long(), torch.ones(1, 2).bool())
    with pytest.raises(UserError, match="tokenizer"):
        Word()(batch)


@from_text
def clauses(text: str) -> list[int]:
    """Where clauses start."""
    return [match.end() for match in re.finditer(", ", text)]


@from_lengths
def pairs(tokens: list[str]) -> list[int]:
    return [2] * (len(tokens) // 2) + [1] * (len(tokens) % 2)


def test_from_text():
    batch = piece_batch(["One", ",", " two", ",", " three"], ["no"], [])
    starts = validate(clauses(batch), batch, "clauses")
    assert starts.tolist() == [
        [True, False, True, False, True],
        [True, False, False, False, False],
        [False] * 5,
    ]
    assert clauses.__name__ == "clauses"
    assert pickle.loads(pickle.dumps(clauses)) is clauses


def test_from_lengths_sees_the_text_of_tokens():
    seen = []

    def record(tokens):
        seen.append(tokens)
        return [len(tokens)]

    tokenizer = byte_level()
    emoji = [tokenizer.convert_tokens_to_ids(c) for c in "ðŁĺĢ"]
    ids = torch.tensor([[*emoji, tokenizer.eos_token_id, *tokenizer("x").input_ids]])
    batch = ResponseBatch(ids, torch.ones_like(ids).bool(), tokenizer=tokenizer)
    from_lengths(record)(batch)
    assert seen == [["😀", "", "", "", "<eos>", "x"]]
    batch = piece_batch(["a", "b", "c"], [], padding=2)
    assert pairs(batch).tolist() == [[True, False, True, False, False], [False] * 5]


def test_helpers_take_max_length():
    batch = piece_batch(list("abcdefg"))
    whole = from_text(lambda text: [], max_length=3)(batch)
    assert whole[0].nonzero().flatten().tolist() == [0, 3, 6]
    fours = from_lengths(lambda tokens: [4, 3], max_length=2)(batch)
    assert fours[0].nonzero().flatten().tolist() == [0, 2, 4, 6]


@pytest.mark.parametrize(
    ("returned", "message"),
    [([5], "character 5.*4 characters"), ([-1], "character -1"), (None, "None"), (["a"], "'a'")],
)
def test_from_text_faults(returned, message: str):
    def bad(text):
        return returned

    with pytest.raises(UserError, match=f"segmenter bad: .*{message}"):
        from_text(bad)(piece_batch(["ab", "cd"]))


@pytest.mark.parametrize("returned", [[1], [3], [0, 2], [-1, 3], [], None, 2])
def test_from_lengths_faults(returned):
    def bad(tokens):
        return returned

    with pytest.raises(UserError, match="segmenter bad: returned"):
        from_lengths(bad)(piece_batch(["ab", "cd"]))


def test_importing_segmenters_imports_no_parser():
    code = (
        "import sys, marlhf.segmenters, marlhf.segmenters.parsing\n"
        "heavy = {'spacy', 'nltk', 'stanza', 'tree_sitter', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def cpu_seconds(function, text: str) -> float:
    """The shortest of three tries."""
    seconds = []
    for _ in range(3):
        start = time.process_time()
        function(text)
        seconds.append(time.process_time() - start)
    return min(seconds)


RUNS = [
    ".",
    "!?",
    "…",
    '."',
    ".'*",
    "«",
    "»",
    "(",
    "-",
    "'",
    "。",
    "．",
    "．1",
    "\n",
    " ",
    ". ",
    ".\n",
]
RUNS += [
    "a",
    "a.",
    "a.b.",
    "A. ",
    "1.",
    "1. ",
    "1) ",
    "\u0301",
    "\u0301.",
    "\u200d",
    "あ",
    "漢",
    "ー",
]


@pytest.mark.parametrize("run", RUNS)
def test_what_a_collapsed_policy_writes_costs_what_other_text_does(run: str):
    """Time in proportion to the characters, whatever they are: for quadratic time on dots it was
    some hundred times as much as for other text of that length, and 25 s on apostrophes."""
    rules = [sentence_boundaries, word_boundaries, line_boundaries]
    if importlib.util.find_spec("spacy"):
        rules.append(Word(language="en").boundaries)
    for boundaries in rules:
        usual = cpu_seconds(boundaries, (SAMPLES[0] + " ") * 100)
        for end in ("", "x", " ", "\n"):
            text = "Well" + (run * 8000)[:8000] + end
            assert cpu_seconds(boundaries, text) < 10 * usual + 0.3


def test_every_boundary_of_a_blank_response_costs_the_same():
    spaces, letters = (
        (text, [(i, i + 1) for i in range(len(text))]) for text in (" " * 20000 + "x", "x" * 20001)
    )
    usual = cpu_seconds(lambda text: token_starts(text, letters[1], range(20001)), letters[0])
    blank = cpu_seconds(lambda text: token_starts(text, spaces[1], range(20001)), spaces[0])
    assert blank < 10 * usual + 0.1


def test_a_long_run_of_symbols_keeps_its_words():
    """spaCy gets it in pieces, of which each symbol is a word as in the whole."""
    spacy = pytest.importorskip("spacy")
    text = 'Well, "' + "(" * 150 + "yes" + "!?" * 100 + " and so on."
    doc = spacy.blank("en")(text)
    assert Word(language="en").boundaries(text) == [token.idx for token in doc]
