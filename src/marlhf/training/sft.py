"""Supervised fine-tuning.

1. rows -> examples, and with `packing` several examples per row   demonstrations
2. the model and its log-probabilities of the trained tokens       loading, models
3. train                                                           supervised, losses
4. save a plain `from_pretrained` directory                        loading
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from marlhf.algorithm.losses import sft_loss
from marlhf.common.errors import UserError
from marlhf.common.plugins import seed_generators
from marlhf.config import SFTConfig
from marlhf.data.demonstrations import Example, Examples, load_examples, pack
from marlhf.data.template_checks import with_date
from marlhf.distributed import Distributed
from marlhf.models import loading
from marlhf.models.sharded_base import check_adapters
from marlhf.runs.provenance import data_labels
from marlhf.runs.state import claim
from marlhf.training.supervised import (
    NOT_TRAINED,
    Batch,
    SupervisedTrainer,
    Task,
    check_batch_size,
    placed,
    resolved,
    shares,
)


def run(config: SFTConfig) -> None:
    """Run the job `marlhf sft`. Raises UserError, where possible before loading any weights."""
    distributed = Distributed(config.model.precision, config.distributed_timeout_minutes)
    check_batch_size(config, distributed)
    tokenizer = loading.load_tokenizer(config.model)
    config = with_date(config, [tokenizer], distributed)
    examples, held_out = load_examples(config, tokenizer)
    rows, held_out_rows = _rows(examples, config), _rows(held_out, config)
    lm_config = loading.load_model_config(config.model)
    _check_length([*rows, *held_out_rows], loading.position_limit(lm_config))
    if distributed.zero_stage == 3:
        check_adapters(config.model, lm_config)
    config = resolved(config, len(rows))
    sets = (examples.rows, held_out.rows)
    claimed = claim(config, distributed, dict(zip(data_labels(config.data), sets, strict=True)))

    seed_generators(config.seed)
    policy = loading.build_policy(
        config.model,
        tokenizer,
        lm_config,
        shard=distributed.shard,
        longest=config.max_length,
        samples=False,
    )
    if config.packing:
        loading.check_packing(policy)

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
    with trainer.running() as folder:
        trainer.write_final(lambda: loading.save_policy(policy, tokenizer, folder))


class Row:
    """One row of a batch: an example, or several packed ones."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples
        self._length = sum(map(len, examples))

    def __len__(self) -> int:
        return self._length


def _rows(examples: Examples, config: SFTConfig) -> list[Row]:
    if config.packing:
        return [Row(group) for group in pack(examples.rows, config.max_length)]
    return [Row([example]) for example in examples.rows]


def collate(rows: Sequence[Row]) -> Batch:
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
    module: nn.Module, rows: Sequence[Row], size: int, distributed: Distributed
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


def _check_length(rows: Sequence[Row], positions: int | None) -> None:
    longest = max((len(e) for row in rows for e in row.examples), default=0)
    if positions is not None and longest > positions:
        raise UserError(
            f"max_length: there are examples of {longest} tokens, and the model has {positions} "
            f"positions; must be at most {positions}"
        )


def _summary(examples: Examples, held_out: Examples) -> dict[str, Any]:
    """Statistics of the data, for the first row of metrics."""
    return {
        "train_examples": len(examples.rows),
        "train_tokens": sum(map(len, examples.rows)),
        "truncated_fraction": examples.truncated / (len(examples.rows) + examples.left_out),
        "rows_left_out": examples.left_out,
        "eval_examples": len(held_out.rows),
    }
