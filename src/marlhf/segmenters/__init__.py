"""Segmenters: where macro actions start. See `base` for the contract."""

from marlhf.segmenters.base import (
    SEGMENTERS,
    Segmenter,
    SegmenterFn,
    Union,
    build_segmenter,
    close,
    segmenter_name,
    validate,
)
from marlhf.segmenters.ngram import NGram, RandomNGram, Sequence, Token

__all__ = [
    "SEGMENTERS",
    "NGram",
    "RandomNGram",
    "Segmenter",
    "SegmenterFn",
    "Sequence",
    "Token",
    "Union",
    "build_segmenter",
    "close",
    "segmenter_name",
    "validate",
]
