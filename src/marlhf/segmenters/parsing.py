"""A segmenter that follows the constituents of each sentence (MA-RLHF section 3.2, "parsing").

Sentences are split by the rule of `sentence`, parsed in batches, and cached. A parser's words are
matched to the policy's tokens by character offsets, so that the two tokenizers need not agree.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from marlhf.common.errors import UserError
from marlhf.common.paths import local_path
from marlhf.common.registry import import_path
from marlhf.common.types import ResponseBatch
from marlhf.segmenters.base import Segmenter
from marlhf.segmenters.offsets import TokenIndex, starts_tensor
from marlhf.segmenters.text import run_cuts, sentence_spans

if TYPE_CHECKING:
    from nltk.tree import Tree

Node = tuple[int, int, tuple["Node", ...]]  # character span in the sentence; no children: one word
TreeFn = Callable[[str], "Tree"]

_CACHED_SENTENCES = 8192  # about 40 MB
_PTB_ESCAPES = {
    "-LRB-": "(",
    "-RRB-": ")",
    "-LSB-": "[",
    "-RSB-": "]",
    "-LCB-": "{",
    "-RCB-": "}",
    "``": '"',
    "''": '"',
}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parsing(Segmenter):
    """Nodes of the parse tree, depth first, that hold fewer than `cutoff` policy tokens.

    A node of a single word joins the previous macro action, however many tokens it has. Each
    sentence opens a new macro action, which its leading single words share. A sentence that cannot
    be parsed is one macro action; `metrics` reports the fraction in the last batch.

    parser     "spacy": constituents are the subtrees of the dependency parse; "benepar": true
               constituency; or a callable from the text of a sentence to `nltk.Tree`, or its
               import path
    pipeline   for "spacy": an installed pipeline, a package with a `load()`, or a directory
    model      for "benepar": an installed model; its language is read off its name
    """

    requires = frozenset()

    cutoff: int = 5
    parser: str | Callable[[str], Any] = "spacy"
    pipeline: str = "en_core_web_sm"
    model: str = "benepar_en3"
    _last: dict[str, float] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cutoff < 1:
            raise UserError(f"cutoff: given {self.cutoff}, must be at least 1")
        _check_installed(self.parser, self.pipeline)

    def starts(self, batch: ResponseBatch) -> Tensor:
        sentences = [[(a, text[a:b]) for a, b in sentence_spans(text)] for text in batch.texts]
        parse = _sentence_parser(self.parser, self.pipeline, self.model)
        parsed = parse([sentence for row in sentences for _, sentence in row])
        self._last["parsing_fallback_fraction"] = parsed.count(None) / max(len(parsed), 1)
        remaining = iter(parsed)
        rows: list[set[int]] = []
        for text, spans, row in zip(batch.texts, batch.offsets, sentences, strict=True):
            index = TokenIndex(text, spans)
            chars = [
                char
                for start, _ in row
                for char in sentence_starts(next(remaining), start, index, self.cutoff)
            ]
            rows.append({t for char in chars if (t := index.token_at(char)) is not None})
        return starts_tensor(batch, rows)

    def metrics(self) -> dict[str, float]:
        """`parsing_fallback_fraction`: share of the last batch's sentences not parsed."""
        return dict(self._last)


def sentence_starts(
    root: Node | None, offset: int, index: TokenIndex, cutoff: int
) -> Iterator[int]:
    """Characters of the response at which a sentence's macro actions start, in any order.

    root     the sentence's tree, None where it could not be parsed
    offset   where in the response the sentence begins
    """
    yield offset
    stack = [] if root is None else [root]
    while stack:
        start, end, children = stack.pop()
        if not children:
            continue  # a single word joins the macro action before it
        tokens = index.count(offset + start, offset + end)
        if tokens >= cutoff:
            stack.extend(children)
        elif tokens:  # else its words are inside a token that starts before it
            yield offset + start


def tree_node(tree: Any, sentence: str) -> Node:
    """Convert an `nltk.Tree` to nested character spans; unary chains are collapsed.

    Raises ValueError where a leaf is not in the text after the previous leaf, or without leaves.
    """
    position = 0

    def node(tree: Any) -> Node | None:
        nonlocal position
        if not isinstance(tree, list):  # a leaf: nltk.Tree is a list
            start, position = _find_leaf(str(tree), sentence, position)
            return start, position, ()
        children = tuple(child for child in map(node, tree) if child is not None)
        if len(children) < 2:
            return children[0] if children else None
        return children[0][0], children[-1][1], children

    if not isinstance(tree, list) or (root := node(tree)) is None:
        raise ValueError(f"the parser must return an nltk.Tree with leaves, not {tree!r}")
    return root


def _find_leaf(leaf: str, sentence: str, position: int) -> tuple[int, int]:
    """Span of a leaf's next occurrence, as written or without Penn Treebank escapes."""
    forms = {leaf, _PTB_ESCAPES.get(leaf, leaf)}
    if leaf.startswith("-") or "B-" in leaf:
        forms.add(functools.reduce(lambda s, e: s.replace(*e), _PTB_ESCAPES.items(), leaf))
    found = [(at, at + len(form)) for form in forms if (at := sentence.find(form, position)) >= 0]
    if not found or not leaf:
        raise ValueError(
            f"the parser's word {leaf!r} is not in the text after character {position}"
        )
    return min(found)


class SentenceParser:
    """Parses sentences in batches, with an LRU cache of trees.

    parse   a batch of sentences -> a tree per sentence, in order; where it raises, the batch's
            sentences are retried one by one
    """

    def __init__(self, parse: Callable[[list[str]], Iterable[Tree]]) -> None:
        self._parse = parse
        self._cache: OrderedDict[str, Node | None] = OrderedDict()
        self._warned = False

    def __call__(self, sentences: list[str]) -> list[Node | None]:
        """The tree of each sentence, None where it could not be parsed.

        Sentences with long runs of symbols are not tried: parsers take quadratic time on them.
        """
        found: dict[str, Node | None] = {}
        for sentence in dict.fromkeys(sentences):
            if sentence in self._cache:
                self._cache.move_to_end(sentence)
                found[sentence] = self._cache[sentence]
        found.update((sentence, None) for sentence in sentences if run_cuts(sentence))
        new = [sentence for sentence in dict.fromkeys(sentences) if sentence not in found]
        if new:
            found.update(zip(new, self._nodes(new), strict=True))
        self._cache.update((sentence, found[sentence]) for sentence in new)
        while len(self._cache) > _CACHED_SENTENCES:
            self._cache.popitem(last=False)
        return [found[sentence] for sentence in sentences]

    def _nodes(self, sentences: list[str]) -> list[Node | None]:
        trees: list[Tree | None]
        try:
            trees = list(self._parse([_plain(sentence) for sentence in sentences]))
            if len(trees) != len(sentences):
                raise ValueError(f"{len(trees)} trees for {len(sentences)} sentences")
        except Exception as error:  # a parser may raise anything; training continues
            if len(sentences) == 1:
                self._warn(sentences[0], error)
                return [None]
            return [node for sentence in sentences for node in self._nodes([sentence])]
        return [self._node(tree, s) for tree, s in zip(trees, sentences, strict=True)]

    def _node(self, tree: Any, sentence: str) -> Node | None:
        try:
            return tree_node(tree, sentence)
        except (ValueError, RecursionError) as error:
            self._warn(sentence, error)
            return None

    def _warn(self, sentence: str, error: Exception) -> None:
        if not self._warned:
            _log.warning(
                "parsing: a sentence could not be parsed and is one macro action (%s: %s): %.80r; "
                "said once, later ones are counted in parsing_fallback_fraction",
                *(type(error).__name__, error, sentence),
            )
        self._warned = True


def _plain(sentence: str) -> str:
    """Normalise white space for parsers; words are then matched in the original text."""
    return " ".join(sentence.split())


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

    def fill(to: int) -> None:
        nonlocal position
        stack[-1][0].extend(words[position:to])
        position = max(position, to)

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


def _check_installed(parser: Any, pipeline: str) -> None:
    """Raise UserError for a parser that cannot load, without importing it."""
    if parser == "spacy":
        if not local_path(pipeline, "pipeline").exists() and not _is_importable(pipeline):
            raise UserError(
                f"pipeline: spaCy's {pipeline!r} is not installed; install it with `python -m "
                f"spacy download {pipeline}` or name an installed one"
            )
    elif parser == "benepar":
        if not _is_importable("benepar"):
            raise UserError("parser: 'benepar' is not installed; pip install marlhf[benepar]")
    elif isinstance(parser, str):
        if "." not in parser:
            raise UserError(
                f"parser: given {parser!r}, must be 'spacy', 'benepar' or the import "
                "path of a function from text to nltk.Tree"
            )
        parser = import_path(parser, "parser")
    if not isinstance(parser, str) and not callable(parser):
        raise UserError(f"parser: given {parser!r}, must be a name or a callable")


def _is_importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):
        return False


def _sentence_parser(parser: Any, pipeline: str, model: str) -> SentenceParser:
    """The process's SentenceParser for a configuration, loaded at first use.

    Segmenters themselves stay small, hashable and picklable.
    """
    try:
        return _loaded_parser(parser, pipeline, model)
    except TypeError:
        if parser.__hash__ is not None:
            raise
        return _loaded_parser.__wrapped__(parser, pipeline, model)  # unhashable: not cached


@functools.lru_cache(maxsize=8)
def _loaded_parser(parser: Any, pipeline: str, model: str) -> SentenceParser:
    if parser == "spacy":
        nlp = load_spacy(pipeline)
        return SentenceParser(lambda sentences: map(dependency_tree, nlp.pipe(sentences)))
    if parser == "benepar":
        return SentenceParser(_benepar_parser(model))
    function: TreeFn = import_path(parser, "parser") if isinstance(parser, str) else parser
    return SentenceParser(lambda sentences: map(function, sentences))


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


def _benepar_parser(model: str) -> Callable[[list[str]], Iterable[Tree]]:
    """benepar as a component of a blank spaCy pipeline, which has only a tokenizer."""
    import benepar  # pyright: ignore[reportMissingImports]  # noqa: F401  (adds the factory)
    import spacy
    from nltk.tree import Tree

    language = model.partition("_")[2][:2] or "en"  # benepar_en3 -> en
    nlp = spacy.blank(language)
    nlp.add_pipe("sentencizer")  # benepar needs sentences; most texts here are one
    try:
        nlp.add_pipe("benepar", config={"model": model})
    except LookupError as error:
        raise UserError(
            f"model: benepar's {model!r} is not installed; run "
            f"`python -c \"import benepar; benepar.download('{model}')\"`"
        ) from error

    def tree(doc: Any) -> Tree:
        bracketed = " ".join(sentence._.parse_string for sentence in doc.sents)
        return Tree.fromstring(f"(TOP {bracketed})")

    return lambda sentences: map(tree, nlp.pipe(sentences))
