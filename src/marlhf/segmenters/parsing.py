"""A segmenter that follows the constituents of each sentence (MA-RLHF section 3.2, "parsing").

Sentences are split by the rule of `sentence`, parsed in batches, and cached. A parser's words are
matched to the policy's tokens by character offsets, so that the two tokenizers need not agree.
"""

from __future__ import annotations

import functools
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from marlhf.common.errors import UserError
from marlhf.common.types import ResponseBatch
from marlhf.segmenters.base import Fallbacks, Segmenter
from marlhf.segmenters.offsets import TokenIndex, starts_tensor
from marlhf.segmenters.parsers import Parse, check_installed, load_parser
from marlhf.segmenters.text import run_cuts, sentence_spans

if TYPE_CHECKING:
    from nltk.tree import Tree

Node = tuple[int, int, tuple["Node", ...]]  # character span in the sentence; no children: one word

CACHED_SENTENCES = 8192  # about 40 MB
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
    be parsed is one macro action; the metric `parsing_fallback_fraction` is the share of such
    sentences in the last batch.

    parser     "spacy": constituents are the subtrees of the dependency parse; "stanza": true
               constituency; or a callable from the text of a sentence to `nltk.Tree`, or its
               import path
    pipeline   for "spacy": an installed pipeline, a package with a `load()`, or a directory
               (None: en_core_web_sm); for "stanza": a language code, or the directory of a
               language's models (None: en)
    """

    requires = frozenset()

    cutoff: int = 5
    parser: str | Callable[[str], Any] = "spacy"
    pipeline: str | None = None
    _fallbacks: Fallbacks = field(default_factory=Fallbacks, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cutoff < 1:
            raise UserError(f"cutoff: given {self.cutoff}, must be at least 1")
        check_installed(self.parser, self.pipeline)

    def metrics(self) -> dict[str, float]:
        """`parsing_fallback_fraction` of the last batch."""
        return self._fallbacks.metrics("parsing_fallback_fraction")

    def starts(self, batch: ResponseBatch) -> Tensor:
        sentences = [[(a, text[a:b]) for a, b in sentence_spans(text)] for text in batch.texts]
        parse = _sentence_parser(self.parser, self.pipeline)
        parsed = parse([sentence for row in sentences for _, sentence in row])
        self._fallbacks.count(parsed.count(None), len(parsed))
        remaining = iter(parsed)
        starts: list[set[int]] = []
        for text, spans, row in zip(batch.texts, batch.offsets, sentences, strict=True):
            index = TokenIndex(text, spans)
            chars = [
                char
                for start, _ in row
                for char in sentence_starts(next(remaining), start, index, self.cutoff)
            ]
            starts.append({t for char in chars if (t := index.token_at(char)) is not None})
        return starts_tensor(batch, starts)


def sentence_starts(
    root: Node | None, offset: int, index: TokenIndex, cutoff: int
) -> Iterator[int]:
    """Characters of the response at which a sentence's macro actions start, in any order.

    root     the sentence's tree, None where it could not be parsed
    offset   character of the response at which the sentence begins
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
    occurrences = [(sentence.find(form, position), len(form)) for form in forms]
    spans = [(start, start + length) for start, length in occurrences if start >= 0]
    if not spans or not leaf:
        raise ValueError(
            f"the parser's word {leaf!r} is not in the text after character {position}"
        )
    return min(spans)


class SentenceParser:
    """Parses sentences in batches, with an LRU cache of trees.

    parse   a batch of sentences -> a tree per sentence, in order; where it raises, the batch's
            sentences are retried one by one
    """

    def __init__(self, parse: Parse) -> None:
        self._parse = parse
        self._cache: OrderedDict[str, Node | None] = OrderedDict()
        self._warned = False

    def __call__(self, sentences: list[str]) -> list[Node | None]:
        """The tree of each sentence, None where it could not be parsed.

        Sentences with long runs of symbols are not tried: parsers take quadratic time on them.
        """
        nodes: dict[str, Node | None] = {}
        for sentence in dict.fromkeys(sentences):
            if sentence in self._cache:
                self._cache.move_to_end(sentence)
                nodes[sentence] = self._cache[sentence]
        nodes.update((sentence, None) for sentence in sentences if run_cuts(sentence))
        new = [sentence for sentence in dict.fromkeys(sentences) if sentence not in nodes]
        if new:
            nodes.update(zip(new, self._nodes(new), strict=True))
        self._cache.update((sentence, nodes[sentence]) for sentence in new)
        while len(self._cache) > CACHED_SENTENCES:
            self._cache.popitem(last=False)
        return [nodes[sentence] for sentence in sentences]

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


def _sentence_parser(parser: Any, pipeline: str | None) -> SentenceParser:
    """The process's SentenceParser for a configuration, loaded at first use.

    Segmenters themselves stay small, hashable and picklable.
    """
    if parser.__hash__ is None:
        return SentenceParser(load_parser(parser, pipeline))
    return _cached_parser(parser, pipeline)


@functools.lru_cache(maxsize=8)
def _cached_parser(parser: Any, pipeline: str | None) -> SentenceParser:
    return SentenceParser(load_parser(parser, pipeline))
