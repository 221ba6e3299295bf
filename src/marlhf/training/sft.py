"""Supervised fine-tuning.

1. rows -> examples, and with `packing` several examples per row   data.demonstrations
2. the model and its log-probabilities of the trained tokens       models
3. train                                                           supervised, algorithm.losses
4. save a plain `from_pretrained` directory                        models.loading
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from marlhf.algorithm.losses import sft_loss
from marlhf.common.plugins import seed_generators
from marlhf.config import SFTConfig
from marlhf.config.loading import check_kind
from marlhf.data.demonstrations import SFTExample, SFTExamples, load_examples
from marlhf.data.packing import pack
from marlhf.distributed import Distributed
from marlhf.models import loading, saving
from marlhf.models.gate import check_packing
from marlhf.runs.provenance import data_labels
from marlhf.runs.state import claim_run
from marlhf.training.supervised import (
    NOT_TRAINED,
    Batch,
    SupervisedTrainer,
    Task,
    checked_model_config,
    placed,
    resolved,
    set_up,
    shares,
)


def run(config: SFTConfig) -> None:
    """Run the job `marlhf sft`. Raises UserError, where possible before loading any weights."""
    check_kind(config, SFTConfig)
    config, distributed, tokenizer = set_up(config)
    examples, held_out = load_examples(config, tokenizer)
    rows, held_out_rows = _rows(examples, config), _rows(held_out, config)
    lengths = (int(part.lengths.max(initial=0)) for part in (examples, held_out))
    lm_config = checked_model_config(config, distributed, lengths, "examples")
    config = resolved(config, len(rows))
    sets = (examples.rows, held_out.rows)
    claimed = claim_run(config, distributed, dict(zip(data_labels(config.data), sets, strict=True)))

    seed_generators(config.seed)
    policy = loading.build_policy(
        config.model,
        tokenizer,
        lm_config,
        placement=distributed.placement(),
        longest=config.max_length,
        samples=False,
    )
    if config.packing:
        check_packing(policy)

    size = config.optimizer.micro_batch_size
    task = Task(
        module=policy,
        rows=rows,
        held_out=held_out_rows,
        collate=collate,
        loss=loss,
        evaluate=lambda model: held_out_loss(model, held_out_rows, size, distributed),
        selects="eval_loss",
        counts="tokens",
        summary=_summary(examples, held_out),
        notes=[*examples.notes, *held_out.notes],
    )
    trainer = SupervisedTrainer(task, config, claimed, distributed)
    dtype = saving.final_dtype(config.model, lm_config)
    with trainer.running() as folder:
        trainer.write_final(lambda: saving.save_policy(policy, tokenizer, folder, dtype))


class PackedRow:
    """One row of a batch: an example, or several packed ones."""

    def __init__(self, examples: Sequence[SFTExample]) -> None:
        self.examples = examples
        self._length = sum(map(len, examples))

    def __len__(self) -> int:
        return self._length


class PackedRows(Sequence[PackedRow]):
    """Packed rows of examples, put together lazily.

    groups    the row of each example, int64 [N]; in a row, longer examples come first
    lengths   tokens of each row, int64 [R]
    """

    def __init__(self, examples: SFTExamples, groups: np.ndarray) -> None:
        self._examples = examples.rows
        self._order = np.lexsort((-examples.lengths, groups))
        self.lengths = np.bincount(groups, examples.lengths).astype(int)
        self._ends = np.cumsum(np.bincount(groups))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        last = self._ends[index]
        first = self._ends[index - 1] if index else 0
        return PackedRow([self._examples[int(i)] for i in self._order[first:last]])


def _rows(examples: SFTExamples, config: SFTConfig) -> PackedRows:
    if config.packing:
        return PackedRows(examples, pack(examples.lengths, config.max_length))
    return PackedRows(examples, np.arange(len(examples.rows)))


def collate(rows: Sequence[PackedRow]) -> Batch:
    """A right-padded batch of rows.

    input_ids, position_ids [B,L]   positions count from 0 in each example, and continue over the
                                    padding up to those of the longest example: the model may have
                                    no more
    response_mask [B,L-1]           which tokens after the first are trained on
    labels [B,L-1]                  the token, or NOT_TRAINED
    """
    length = max(map(len, rows))
    shape = (len(rows), length)
    ids = torch.zeros(shape, dtype=torch.long)
    positions = torch.zeros(shape, dtype=torch.long)
    trained = torch.zeros(shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        end = 0
        for example in row.examples:
            start, end = end, end + len(example)
            ids[i, start:end] = torch.tensor(example.ids)
            trained[i, start:end] = torch.tensor(example.trained)
            positions[i, start:] = torch.arange(length - start)
    longest = max(len(example) for row in rows for example in row.examples)
    positions.clamp_(max=longest - 1)
    mask = trained[:, 1:]
    return {
        "input_ids": ids,
        "attention_mask": None,
        "position_ids": positions,
        "response_mask": mask,
        "labels": ids[:, 1:].masked_fill(~mask, NOT_TRAINED),
    }


def loss(outputs: tuple[Tensor, None], labels: Tensor, count: float) -> Tensor:
    """A batch's share of the mean over all trained tokens of the optimiser step."""
    return sft_loss(outputs[0], labels != NOT_TRAINED, count)


def held_out_loss(
    module: nn.Module, rows: Sequence[PackedRow], size: int, distributed: Distributed
) -> dict[str, Any]:
    """Mean cross-entropy of all trained tokens, and its exponential."""
    total = torch.zeros(2, dtype=torch.float64)
    for _, part, counted in shares(rows, size, distributed):
        batch, labels = placed(collate(part), distributed.device)
        logprobs, _ = module(**batch)
        mask = (labels != NOT_TRAINED)[:counted]
        total += torch.stack([sft_loss(logprobs[:counted], mask, 1.0), mask.sum()]).double().cpu()
    nats, tokens = distributed.all_reduce(total).tolist()
    mean = nats / tokens
    return {"eval_loss": mean, "eval_perplexity": math.exp(min(mean, 700.0))}


def _summary(examples: SFTExamples, held_out: SFTExamples) -> dict[str, Any]:
    """Statistics of the data, for the first row of metrics."""
    return {
        "train_examples": len(examples.rows),
        "train_tokens": int(examples.lengths.sum()),
        "truncated_fraction": examples.truncated / (len(examples.rows) + examples.left_out),
        "rows_left_out": examples.left_out,
        "eval_examples": len(held_out.rows),
    }
