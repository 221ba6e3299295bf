"""Rewards that compare the completion with a reference text in one of the dataset's columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from marlhf.common.errors import UserError, one_line
from marlhf.common.extras import require
from marlhf.rewards.learned import longest_input


@dataclass(frozen=True)
class Rouge:
    """ROUGE F-measure of the completion against `column`, 0 to 1.

    None where the column is empty. Lin, 2004, as computed by torchmetrics: words are runs of a-z
    and 0-9 in lower case; `stemmer` first strips English word endings (Porter) from words of more
    than three letters.
    """

    column: str = "summary"
    metric: Literal["rouge1", "rouge2", "rougeL"] = "rougeL"
    stemmer: bool = True

    def __post_init__(self) -> None:
        if self.metric not in ("rouge1", "rouge2", "rougeL"):
            raise UserError(f"metric: given {self.metric!r}, must be rouge1, rouge2 or rougeL")
        require("torchmetrics", "rouge")

    @property
    def needed_columns(self) -> tuple[str, ...]:
        """Columns that the data must have."""
        return (self.column,)

    def check_values(self, **columns: Sequence[Any]) -> None:
        """Raise TypeError where the column holds anything but text."""
        _references(columns[self.column], self.column)

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], **columns: Any
    ) -> list[float | None]:
        references = _references(columns[self.column], self.column)
        return [
            None if reference is None else self._score(reference, completion)
            for reference, completion in zip(references, completions, strict=True)
        ]

    def _score(self, reference: str, completion: str) -> float:
        from torchmetrics.functional.text import rouge_score

        scores = rouge_score(
            completion, reference, use_stemmer=self.stemmer, rouge_keys=(self.metric,)
        )
        return float(scores[f"{self.metric}_fmeasure"])


class EmbeddingSimilarity:
    """Cosine similarity, -1 to 1, of sentence embeddings of the completion and of `column`.

    None where the column is empty. Embeddings are those of sentence-transformers (Reimers &
    Gurevych, 2019): with the pooling that the model's folder names, or else the mean over tokens.

    path: a directory or hub name
    max_length: longer texts lose their end; default: the model's own limit
    """

    def __init__(
        self,
        column: str = "summary",
        path: str = "sentence-transformers/all-MiniLM-L6-v2",
        batch_size: int = 32,
        max_length: int | None = None,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size: given {batch_size}, must be at least 1")
        if max_length is not None and max_length < 1:
            raise UserError(f"max_length: given {max_length}, must be at least 1")
        require("sentence_transformers", "embedding")
        from marlhf.models import loading

        loading.model_source(path, "path")
        self.column, self.path = column, path
        self.batch_size, self.max_length = batch_size, max_length
        self._model: Any = None
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
        return str(Path(self.path).expanduser())

    def load(self) -> EmbeddingSimilarity:
        """Load model and tokenizer, unless loaded. Raises UserError."""
        if self._model is None:
            from sentence_transformers import SentenceTransformer

            try:
                model: Any = SentenceTransformer(
                    self.source, device="cpu", model_kwargs={"dtype": torch.float32}
                )
            except Exception as error:
                raise UserError(f"path: cannot load {self.source!r}: {one_line(error)}") from error
            model.eval()
            encoder = model[0].auto_model
            longest = longest_input(
                encoder,
                self.max_length or model.max_seq_length or 512,
                lambda ids, mask: encoder(input_ids=ids, attention_mask=mask.long()),
            )
            if self.max_length is not None and longest < self.max_length:
                raise UserError(f"max_length: given {self.max_length}, must be 1 to {longest}")
            model.max_seq_length = longest
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

    def embed(self, texts: Sequence[str]) -> Tensor:
        """`[len(texts),H]` float32 embeddings of length 1, on the CPU."""
        self.load()
        return self._model.encode(
            list(texts),
            batch_size=self.batch_size,
            normalize_embeddings=True,
            convert_to_tensor=True,
            show_progress_bar=False,
        ).cpu()


def _references(values: Sequence[Any], column: str) -> list[str | None]:
    """A column's texts, None where empty. Raises TypeError for values other than text."""
    for row, value in enumerate(values):
        if not isinstance(value, str | None):
            kind = type(value).__name__
            raise TypeError(f"column {column!r} holds {kind} in row {row}, must be text")
    return [value if value and value.strip() else None for value in values]
