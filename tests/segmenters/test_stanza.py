"""`parsing` with stanza's own tokenizer, tagger and constituency parser.

Its published models are downloads; these tiny ones are trained here by stanza itself, so that they
parse a handful of sentences as they should.
"""

from __future__ import annotations

import sys

import pytest
from support import stanza_models
from support.responses import piece_batch, pieces, text_batch
from support.tokenizer_families import byte_level

from marlhf.common.errors import UserError
from marlhf.segmenters import Parsing, validate
from marlhf.segmenters.parsers import constituency_tree, load_stanza

stanza = pytest.importorskip("stanza")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> str:
    return str(stanza_models.train(tmp_path_factory.mktemp("stanza_resources")))


def test_the_constituency_tree_of_a_sentence(home):
    nlp = load_stanza(home)
    tree = constituency_tree(nlp("the big dog chased a small cat."))
    assert " ".join(str(tree).split()) == (
        "(TOP (ROOT (S (NP (DET the) (ADJ big) (NOUN dog)) "
        "(VP (VERB chased) (NP (DET a) (ADJ small) (NOUN cat))) (PUNCT .))))"
    )


def test_macro_actions_are_constituents(home):
    # S holds 8 tokens; NP 3 < 5; VP 4 < 5: with "chased", which a dependency subtree would not be
    batch = piece_batch(["the", " big", " dog", " chased", " a", " small", " cat", "."])
    segmenter = Parsing(5, parser="stanza", pipeline=home)
    assert pieces(segmenter(batch), batch) == ["the big dog", " chased a small cat."]
    assert segmenter.metrics() == {"parsing_fallback_fraction": 0.0}
    assert pieces(Parsing(4, parser="stanza", pipeline=home)(batch), batch) == [
        "the big dog chased",
        " a small cat.",
    ]


def test_sentences_are_parsed_one_by_one_and_in_their_order(home):
    text = "a man saw the dog. it saw a big man.\nthe cat chased it."
    batch = text_batch(byte_level(), text, "", "it saw a big man.")
    starts = validate(Parsing(50, parser="stanza", pipeline=home)(batch), batch, "parsing")
    expected = ["a man saw the dog.", " it saw a big man.\n", "the cat chased it."]
    assert pieces(starts, batch) == expected
    assert pieces(starts, batch, 2) == ["it saw a big man."]


def test_a_token_of_several_words_is_written_once():
    from stanza.models.constituency.parse_tree import Tree

    document = stanza.Document(
        [
            [
                {"id": (1, 2), "text": "au"},
                {"id": 1, "text": "à", "head": 0, "deprel": "root"},
                {"id": 2, "text": "le", "head": 1, "deprel": "det"},
                {"id": 3, "text": "chat", "head": 1, "deprel": "obl"},
            ]
        ],
        text="au chat",
    )
    words = [Tree("X", [Tree(word)]) for word in ("à", "le", "chat")]
    document.sentences[0].constituency = Tree("PP", [words[0], Tree("NP", words[1:])])
    assert constituency_tree(document).leaves() == ["au", "chat"]


def test_what_is_missing_is_named_before_anything_loads(home, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"no constituency parser for 'xx' at .*stanza.download\("):
        Parsing(parser="stanza", pipeline="xx")
    (tmp_path / "en" / "constituency").mkdir(parents=True)
    with pytest.raises(UserError, match=r"cannot load stanza's .*resources\.json") as error:
        Parsing(parser="stanza", pipeline=str(tmp_path / "en"))(piece_batch(["a"]))
    assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "stanza", None)
    with pytest.raises(UserError, match=r"pip install 'marlhf\[stanza\]'"):
        Parsing(parser="stanza", pipeline=home)
