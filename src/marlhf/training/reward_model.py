"""Training a reward model on preference pairs.

1. rows -> pairs of texts                                     preferences
2. the model with a scalar head                               loading
3. train on the Bradley-Terry loss                            supervised, losses
4. the demonstrations' mean score becomes `score_offset`
5. held-out accuracy, calibration and histograms              calibration
6. save a sequence classifier that plain transformers loads   classifier
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from marlhf.algorithm.calibration import histogram, pair_metrics, reliability
from marlhf.algorithm.losses import pairwise_loss
from marlhf.common.errors import UserError
from marlhf.common.plugins import seed_generators
from marlhf.config import RewardConfig
from marlhf.data.pairs import Pair, Preferences, choose_pad_token, load_preferences
from marlhf.data.template_checks import with_date
from marlhf.distributed import Distributed
from marlhf.models import loading
from marlhf.models.reward_classifier import build_classifier, save_classifier
from marlhf.models.sharded_base import check_adapters
from marlhf.rewards.learned import right_pad, sequence_scores
from marlhf.runs.provenance import data_labels
from marlhf.runs.state import claim
from marlhf.training.supervised import (
    Batch,
    SupervisedTrainer,
    Task,
    check_batch_size,
    placed,
    resolved,
    shares,
)

REPORT = "reward_report.json"


def run(config: RewardConfig) -> None:
    """Run the job `marlhf reward`. Raises UserError, where possible before loading any weights."""
    distributed = Distributed(config.model.precision, config.distributed_timeout_minutes)
    check_batch_size(config, distributed)
    tokenizer = loading.load_tokenizer(config.model)
    config = with_date(config, [tokenizer], distributed)
    data = load_preferences(config, tokenizer)
    base_config = loading.load_model_config(config.model)
    loading.check_tokenizer(tokenizer, base_config)
    _check_length(data, loading.position_limit(base_config))
    choose_pad_token(tokenizer, base_config.get_text_config().vocab_size, _tokens(data))
    if distributed.zero_stage == 3:
        check_adapters(config.model, base_config)
    config, demonstrations = resolved(config, len(data.pairs)), config.data.demonstrations_path
    labels = (*data_labels(config.data), f"data.demonstrations_path {demonstrations!r}")
    sets = (data.pairs, data.held_out, data.demonstrations if demonstrations else [])
    claimed = claim(config, distributed, dict(zip(labels, sets, strict=True)))

    seed_generators(config.seed)
    model = build_classifier(
        config.model, base_config, tokenizer, distributed.shard, config.max_length
    )
    scorer = Scorer(model)
    size = config.optimizer.micro_batch_size

    def loss(scores: Tensor, margins: Tensor, count: float) -> Tensor:
        chosen, rejected = scores.chunk(2)
        return pairwise_loss(chosen, rejected, margins, config.centring, count)

    def evaluate(module: nn.Module) -> dict[str, Any]:
        chosen, rejected = held_out_scores(module, data.held_out, size, distributed)
        margins = torch.tensor([pair.margin for pair in sorted(data.held_out, key=len)])
        mean = pairwise_loss(chosen, rejected, margins, config.centring)
        metrics = {"loss": float(mean), **pair_metrics(chosen, rejected)}
        return {f"eval_{name}": value for name, value in metrics.items()}

    task = Task(
        module=scorer,
        rows=data.pairs,
        held_out=data.held_out,
        collate=collate,
        loss=loss,
        evaluate=evaluate,
        selects="eval_loss",
        counts="pairs",
        summary=_summary(data),
        notes=data.notes,
    )
    trainer = SupervisedTrainer(task, config, claimed, distributed)
    with trainer.running() as folder, torch.no_grad():  # in fp32, as `RewardModel` scores
        scorer.eval()
        offset = mean_score(scorer, data.demonstrations, size, distributed)
        scores = held_out_scores(scorer, data.held_out, size, distributed)
        report = {"score_offset": offset, **held_out_report(*(s - offset for s in scores))}

        def write() -> None:
            text = json.dumps(report, indent=1) + "\n"
            (folder.parent / REPORT).write_text(text, encoding="utf-8")
            save_classifier(scorer.model, tokenizer, offset, folder)

        trainer.write_final(write)


class Scorer(nn.Module):
    """Scores right-padded texts with a sequence classifier, or a PEFT model around one."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """`[B]` fp32, not centred."""
        model: Any = self.model
        inner = model.get_base_model() if hasattr(model, "peft_config") else model
        return sequence_scores(inner, input_ids, attention_mask)


def collate(pairs: Sequence[Pair]) -> Batch:
    """The chosen texts, then the rejected ones, right-padded; the margins in `labels`."""
    texts = [*(pair.chosen for pair in pairs), *(pair.rejected for pair in pairs)]
    ids, mask = right_pad(texts)
    margins = torch.tensor([pair.margin for pair in pairs])
    return {"input_ids": ids, "attention_mask": mask, "labels": margins}


def held_out_scores(
    module: nn.Module, pairs: Sequence[Pair], size: int, distributed: Distributed
) -> tuple[Tensor, Tensor]:
    """Scores of chosen and of rejected texts, shortest pairs first, on every rank."""
    found: list[tuple[int, float, float]] = []
    for start, part, counted in shares(pairs, size, distributed):
        batch, _ = placed(collate(part), distributed.device)
        scores = module(**batch)
        chosen, rejected = (half.tolist() for half in scores.cpu().chunk(2))
        rows = zip(range(start, start + counted), chosen, rejected, strict=False)
        found += rows
    gathered = sorted(distributed.gather_objects(found))
    table = torch.tensor([row[1:] for row in gathered], dtype=torch.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def mean_score(
    module: nn.Module, texts: Sequence[list[int]], size: int, distributed: Distributed
) -> float:
    """Mean score of texts over all ranks."""
    total = torch.zeros(1, dtype=torch.float64)
    for _, part, counted in shares(texts, 2 * size, distributed):
        ids, mask = (x.to(distributed.device) for x in right_pad(part))
        total += module(ids, mask)[:counted].double().sum().cpu()
    return float(distributed.all_reduce(total)) / len(texts)


def held_out_report(chosen: Tensor, rejected: Tensor) -> dict[str, Any]:
    """The statistics of held-out pairs in `reward_report.json`, from centred scores."""
    if len(chosen) == 0:
        return {"pairs": 0}
    return {
        "pairs": len(chosen),
        **pair_metrics(chosen, rejected),
        "reliability": reliability(chosen - rejected),
        "histogram": histogram(chosen, rejected),
    }


def _tokens(data: Preferences) -> set[int]:
    pairs = [*data.pairs, *data.held_out]
    texts = [*data.demonstrations, *(p.chosen for p in pairs), *(p.rejected for p in pairs)]
    return {token for text in texts for token in text}


def _check_length(data: Preferences, positions: int | None) -> None:
    longest = max(map(len, [*data.pairs, *data.held_out, *data.demonstrations]))
    if positions is not None and longest > positions:
        raise UserError(
            f"max_length: there are texts of {longest} tokens, and the model has {positions} "
            f"positions; must be at most {positions}"
        )


def _summary(data: Preferences) -> dict[str, Any]:
    """Statistics of the data, for the first row of metrics."""
    return {
        "train_pairs": len(data.pairs),
        "truncated_fraction": data.truncated / (2 * len(data.pairs)),
        "eval_pairs": len(data.held_out),
        "demonstrations": len(data.demonstrations),
    }
