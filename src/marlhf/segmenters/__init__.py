"""Segmenters: where macro actions start. See `base` for the contract."""

from marlhf.segmenters.base import (
    SEGMENTERS,
    Segmenter,
    SegmenterFn,
    Union,
    build_segmenter,
    close,
    learn,
    segment,
    segmenter_metrics,
    segmenter_name,
    segmenter_requires,
    validate,
)
from marlhf.segmenters.entropy import EntropyJump
from marlhf.segmenters.ngram import NGram, RandomNGram, Sequence, Token
from marlhf.segmenters.offsets import token_starts
from marlhf.segmenters.parsing import Parsing
from marlhf.segmenters.perplexity import Perplexity
from marlhf.segmenters.phrases import Phrases
from marlhf.segmenters.syntax import Syntax
from marlhf.segmenters.text import (
    Line,
    Sentence,
    TextSegmenter,
    Word,
    from_lengths,
    from_text,
)

__all__ = [
    "SEGMENTERS",
    "EntropyJump",
    "Line",
    "NGram",
    "Parsing",
    "Perplexity",
    "Phrases",
    "RandomNGram",
    "Segmenter",
    "SegmenterFn",
    "Sentence",
    "Sequence",
    "Syntax",
    "TextSegmenter",
    "Token",
    "Union",
    "Word",
    "build_segmenter",
    "close",
    "from_lengths",
    "from_text",
    "learn",
    "segment",
    "segmenter_metrics",
    "segmenter_name",
    "segmenter_requires",
    "token_starts",
    "validate",
]
