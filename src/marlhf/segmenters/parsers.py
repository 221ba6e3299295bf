"""Parsers behind the segmenter `parsing`: spaCy, stanza, or a function of the user's.

Each is a function from a batch of sentences to an `nltk.Tree` per sentence. They are loaded at
first use and shared by all segmenters of the process, which stay small, hashable and picklable.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marlhf.common.errors import UserError, one_line
from marlhf.common.paths import local_path
from marlhf.common.registry import import_path

if TYPE_CHECKING:
    from nltk.tree import Tree

Parse = Callable[[list[str]], "Iterable[Tree]"]

SPACY_PIPELINE, STANZA_LANGUAGE = "en_core_web_sm", "en"


def check_installed(parser: Any, pipeline: str | None) -> None:
    """Raise UserError for a parser that cannot load, before any model is."""
    if parser == "spacy":
        pipeline = pipeline or SPACY_PIPELINE
        if not local_path(pipeline, "pipeline").exists() and not is_importable(pipeline):
            raise UserError(
                f"pipeline: spaCy's {pipeline!r} is not installed; install it with `python -m "
                f"spacy download {pipeline}` or name an installed one"
            )
    elif parser == "stanza":
        if not is_importable("stanza"):
            raise UserError("parser: 'stanza' is not installed; pip install 'marlhf[stanza]'")
        home = stanza_home(pipeline or STANZA_LANGUAGE)
        if not (home / "constituency").is_dir():
            raise UserError(
                f"pipeline: stanza has no constituency parser for {home.name!r} at {home.parent}; "
                f"download it with `python -c \"import stanza; stanza.download('{home.name}', "
                "processors='tokenize,pos,constituency')\"`"
            )
    elif isinstance(parser, str):
        if "." not in parser:
            raise UserError(
                f"parser: given {parser!r}, must be 'spacy', 'stanza' or the import "
                "path of a function from text to nltk.Tree"
            )
        parser = import_path(parser, "parser")
    if not isinstance(parser, str) and not callable(parser):
        raise UserError(f"parser: given {parser!r}, must be a name or a callable")


def is_importable(module: str) -> bool:
    """Whether a module can be found, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):
        return False


def load_parser(parser: Any, pipeline: str | None) -> Parse:
    """Load a parser by name, import path or callable. Raises UserError."""
    if parser == "spacy":
        nlp = load_spacy(pipeline or SPACY_PIPELINE)
        return lambda sentences: map(dependency_tree, nlp.pipe(sentences))
    if parser == "stanza":
        stanza = load_stanza(pipeline or STANZA_LANGUAGE)
        return lambda sentences: map(constituency_tree, stanza.bulk_process(sentences))
    function = import_path(parser, "parser") if isinstance(parser, str) else parser
    return lambda sentences: map(function, sentences)


def load_spacy(pipeline: str) -> Any:
    """Load a spaCy pipeline with only the components that a dependency parse needs."""
    import spacy

    try:
        nlp = spacy.load(pipeline)
    except OSError:  # not a spaCy pipeline by name: a package that loads one
        module = importlib.import_module(pipeline)
        if not hasattr(module, "load"):
            raise UserError(f"pipeline: package {pipeline!r} has no `load()`") from None
        nlp = module.load()
    factories = {name: nlp.get_pipe_meta(name).factory for name in nlp.pipe_names}
    if "parser" not in factories.values():
        raise UserError(
            f"pipeline: {pipeline!r} has no dependency parser, only "
            f"{', '.join(factories) or 'a tokenizer'}"
        )
    for name, factory in factories.items():  # taggers, NER and others take most of the time
        if factory not in ("parser", "tok2vec") and "transformer" not in factory:
            nlp.disable_pipe(name)
    return nlp


def dependency_tree(doc: Any) -> Tree:
    """Constituents of a spaCy Doc or Span: one node per token with dependents.

    A node spans the token's subtree. One that crosses another already placed (non-projective) is
    dropped.
    """
    from nltk.tree import Tree

    words = [token.text for token in doc]
    labels = {
        (t.left_edge.i - doc[0].i, -(t.right_edge.i - doc[0].i + 1)): t.dep_
        for t in doc
        if t.n_lefts + t.n_rights
    }
    root = Tree("TOP", [])
    stack = [(root, len(words))]
    position = 0

    def fill(end: int) -> None:
        nonlocal position
        stack[-1][0].extend(words[position:end])
        position = max(position, end)

    for start, negative_end in sorted(labels):  # outer before inner, left to right
        while stack[-1][1] <= start:
            fill(stack[-1][1])
            stack.pop()
        if -negative_end > stack[-1][1]:
            continue
        fill(start)
        node = Tree(labels[start, negative_end], [])
        stack[-1][0].append(node)
        stack.append((node, -negative_end))
    while stack:
        fill(stack[-1][1])
        stack.pop()
    return root


@functools.cache
def stanza_home(pipeline: str) -> Path:
    """Folder of a language's stanza models: a language code, or the folder itself."""
    folder = local_path(pipeline, "pipeline")
    if folder.is_dir():
        return folder.resolve()
    from stanza.resources.common import DEFAULT_MODEL_DIR

    return Path(DEFAULT_MODEL_DIR) / pipeline


def load_stanza(pipeline: str) -> Any:
    """Load stanza's tokenizer, tagger and constituency parser of a language; no download."""
    import stanza
    from stanza.pipeline.core import DownloadMethod

    home = stanza_home(pipeline)
    try:
        return stanza.Pipeline(
            home.name,
            dir=str(home.parent),
            processors="tokenize,pos,constituency",
            tokenize_no_ssplit=True,  # `parsing` hands over single sentences
            download_method=DownloadMethod.NONE,
            verbose=False,
        )
    except Exception as error:  # its models' files, versions, languages
        raise UserError(
            f"pipeline: cannot load stanza's {str(home)!r}: {one_line(error)}"
        ) from error


def constituency_tree(document: Any) -> Tree:
    """The constituency trees of a stanza Document under one root.

    A leaf is a word as written in the text. A token of several words (French "au", "à" and "le")
    is one leaf: the token's text replaces the first word, and the others are left out.
    """
    from nltk.tree import Tree

    def convert(tree: Any, leaves: Any) -> Any:
        if tree.is_leaf():
            return next(leaves)
        children = (convert(child, leaves) for child in tree.children)
        return Tree(tree.label, [child for child in children if child is not None])

    return Tree(
        "TOP",
        [convert(s.constituency, iter(_written_words(s))) for s in document.sentences],
    )


def _written_words(sentence: Any) -> list[str | None]:
    words: list[str | None] = []
    for token in sentence.tokens:
        texts = [word.text for word in token.words]
        if "".join(texts) != token.text:
            texts = [token.text, *[None] * (len(texts) - 1)]
        words += texts
    return words
