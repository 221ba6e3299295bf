"""The segmenter contract: a ResponseBatch in, `starts [B,T]` out.

A segmenter is any callable `ResponseBatch -> starts`; True means "a macro action starts at this
token". The built-in ones are frozen dataclasses whose fields are their configuration. The trainer
runs `validate` on every result, so that a wrong segmenter fails loudly and by name.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import torch
from torch import Tensor

from marlhf.common.errors import UserError, short_repr
from marlhf.common.plugins import copied, numbers, plugin_call, requirements, unchanged
from marlhf.common.registry import Registry, Spec, plugin_name
from marlhf.common.types import REF_LOGPROBS, ResponseBatch

SegmenterFn = Callable[[ResponseBatch], Tensor]

SEGMENTERS = Registry(
    kind="segmenter",
    group="marlhf.segmenters",
    factories={
        "token": "marlhf.segmenters.ngram.Token",
        "ngram": "marlhf.segmenters.ngram.NGram",
        "random_ngram": "marlhf.segmenters.ngram.RandomNGram",
        "sequence": "marlhf.segmenters.ngram.Sequence",
        "perplexity": "marlhf.segmenters.perplexity.Perplexity",
        "word": "marlhf.segmenters.text.Word",
        "sentence": "marlhf.segmenters.text.Sentence",
        "line": "marlhf.segmenters.text.Line",
        "parsing": "marlhf.segmenters.parsing.Parsing",
        "syntax": "marlhf.segmenters.syntax.Syntax",
        "entropy_jump": "marlhf.segmenters.entropy.EntropyJump",
        "phrases": "marlhf.segmenters.phrases.Phrases",
        "union": "marlhf.segmenters.base.Union",
    },
    arguments=("batch",),
)


@dataclass(frozen=True)
class Segmenter(abc.ABC):
    """Base of the built-in segmenters: a boundary rule plus a maximum macro-action length.

    max_length: split any longer macro action every `max_length` tokens; None: no maximum.
    """

    max_length: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 1:
            raise UserError(f"max_length: given {self.max_length}, must be at least 1")

    @abc.abstractmethod
    def starts(self, batch: ResponseBatch) -> Tensor:
        """`[B,T]` bool before `max_length`; values outside the mask and at token 0 are ignored."""

    def __call__(self, batch: ResponseBatch) -> Tensor:
        """Starts of macro actions, `[B,T]` bool. An empty response has none."""
        starts = _check_form(self.starts(batch), batch.response_mask, segmenter_name(self))
        return close(starts, batch.response_mask, self.max_length)


class Fallbacks:
    """Counts what a segmenter's last batch had, and what of it could not be parsed."""

    def __init__(self) -> None:
        self._fraction: float | None = None

    def count(self, fallbacks: int, total: int) -> None:
        """Replace the counts of the batch before."""
        self._fraction = fallbacks / max(total, 1)

    def metrics(self, name: str) -> dict[str, float]:
        """The fraction by its name; nothing before the first batch."""
        return {} if self._fraction is None else {name: self._fraction}


def close(starts: Tensor, response_mask: Tensor, max_length: int | None = None) -> Tensor:
    """Turn any `[B,T]` bool boundaries into a valid segmentation.

    No start on padding, one at the first response token, and no macro action longer than
    `max_length` tokens.
    """
    starts = starts & response_mask
    starts[:, :1] = response_mask[:, :1]
    if max_length is None:
        return starts
    positions = torch.arange(starts.shape[1], device=starts.device).expand_as(starts)
    last_start = torch.where(starts, positions, -1).cummax(1).values
    return ((positions - last_start) % max_length == 0) & response_mask


def segment(segmenter: SegmenterFn, batch: ResponseBatch) -> Tensor:
    """Call a segmenter and validate its `starts`; its faults become a UserError that names it.

    Both the batch and the result are copied, so that the segmenter cannot change the run's tensors.
    """
    name = f"segmenter {segmenter_name(segmenter)}"
    with plugin_call(name), unchanged(name, UserError, batch.tokenizer):
        starts = validate(segmenter(copied(batch)), batch, segmenter_name(segmenter))
        return starts.clone()


def learn(
    segmenter: SegmenterFn,
    batch: ResponseBatch,
    gather: Callable[[list[Any]], list[Any]],
    together: Callable[[Callable[[], None]], None],
) -> None:
    """Pass the responses of an update to a segmenter that has a method `learn`.

    They are the token ids of all ranks, in batch order, so that every rank learns the same.

    gather     concatenates the lists of all ranks
    together   runs a function on all ranks, and fails on all where it fails on one
    """
    if (method := getattr(segmenter, "learn", None)) is None:
        return
    responses = copied(gather(batch.unpadded))

    def call() -> None:
        with plugin_call(f"segmenter {segmenter_name(segmenter)}"):
            method(responses)

    together(call)


def validate(starts: Any, batch: ResponseBatch, name: str) -> Tensor:
    """Return `starts` unchanged. Raises UserError, naming the segmenter and its fault."""
    mask = batch.response_mask
    starts = _check_form(starts, mask, name)
    if (fault := (starts & ~mask).any(1)).any():
        row = int(fault.nonzero()[0])
        raise UserError(
            f"segmenter {name}: row {row} has a start on padding, beyond its "
            f"{int(mask[row].sum())} response tokens"
        )
    if (fault := mask[:, 0] & ~starts[:, 0] if mask.shape[1] else mask.any(1)).any():
        row = int(fault.nonzero()[0])
        raise UserError(f"segmenter {name}: the first response token of row {row} is not a start")
    return starts


def _check_form(starts: Any, mask: Tensor, name: str) -> Tensor:
    """Check that `starts` is a dense bool tensor of the mask's shape.

    Returns it on the mask's device. Raises UserError.
    """
    if not isinstance(starts, Tensor):
        raise UserError(
            f"segmenter {name}: returned {type(starts).__name__}, must be a bool tensor"
        )
    if starts.is_nested or starts.layout != torch.strided or starts.is_meta:
        kind = "meta" if starts.is_meta else "nested" if starts.is_nested else starts.layout
        raise UserError(f"segmenter {name}: starts is a {kind} tensor, must be a dense one")
    if starts.shape != mask.shape:
        raise UserError(
            f"segmenter {name}: starts has shape {tuple(starts.shape)}, must be "
            f"{tuple(mask.shape)}, one entry per response token"
        )
    if starts.dtype != torch.bool:
        raise UserError(f"segmenter {name}: starts is {starts.dtype}, must be torch.bool")
    return starts.to(mask.device)


@dataclass(frozen=True)
class Union(Segmenter):
    """A boundary wherever any of several segmenters has one.

    of: segmenters, or their specs as in YAML: `{name: union, of: [{name: ngram, n: 5}, sentence]}`.
    """

    of: tuple[Any, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.of, str) or len(self.of) == 0:
            raise UserError(f"of: given {list(self.of)!r}, must be a list of segmenters")
        object.__setattr__(self, "of", tuple(build_segmenter(s) for s in self.of))

    @property
    def requires(self) -> frozenset[str]:
        """Union of their requirements."""
        return frozenset().union(*map(segmenter_requires, self.of))

    def starts(self, batch: ResponseBatch) -> Tensor:
        starts = torch.zeros_like(batch.response_mask)
        for segmenter in self.of:
            starts = starts | segment(segmenter, batch)
        return starts

    def learn(self, responses: Sequence[Sequence[int]]) -> None:
        """Pass the responses to the segmenters that learn."""
        for segmenter in self.of:
            if hasattr(segmenter, "learn"):
                segmenter.learn(responses)

    def state_dict(self) -> dict[str, Any]:
        """The states of the segmenters combined."""
        return {"of": [s.state_dict() if hasattr(s, "state_dict") else {} for s in self.of]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from `state_dict()`."""
        for segmenter, part in zip(self.of, state["of"], strict=True):
            if part:
                segmenter.load_state_dict(part)

    def metrics(self) -> dict[str, float]:
        """The metrics of the segmenters combined."""
        metrics: dict[str, float] = {}
        for segmenter in self.of:
            metrics.update(segmenter_metrics(segmenter))
        return metrics


def build_segmenter(spec: Spec | SegmenterFn) -> SegmenterFn:
    """Build a segmenter from a name, import path, mapping with `name`, or callable.

    A class is built with the mapping's other keys, if any; a plain function is used as it is and
    takes no arguments. Raises UserError.
    """
    return SEGMENTERS.build(spec)


def segmenter_requires(segmenter: SegmenterFn) -> frozenset[str]:
    """The segmenter's attribute `requires`: `ref_logprobs` or nothing.

    A segmenter without the attribute is assumed to read them. Raises UserError.
    """
    name = f"segmenter {segmenter_name(segmenter)}"
    return requirements(segmenter, name, REF_LOGPROBS, REF_LOGPROBS)


def segmenter_name(segmenter: SegmenterFn) -> str:
    """Name of a segmenter in messages: a dataclass's repr, with its settings, or `plugin_name`."""
    is_record = is_dataclass(segmenter) and not isinstance(segmenter, type)
    return short_repr(segmenter, 300) if is_record else plugin_name(segmenter)


def segmenter_metrics(segmenter: SegmenterFn) -> dict[str, float]:
    """Metrics of a segmenter's last batch, by its optional method `metrics`. Raises UserError."""
    method: Callable[[], Mapping[str, float]] = getattr(segmenter, "metrics", dict)
    with plugin_call(f"segmenter {segmenter_name(segmenter)}"):
        return numbers(method())
