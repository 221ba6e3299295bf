"""Training a reward model on preference pairs.

1. rows -> pairs of texts                                     data.pairs
2. the model with a scalar head                               models.reward_classifier
3. train on the Bradley-Terry loss                            supervised, algorithm.losses
4. the demonstrations' mean score becomes `score_offset`
5. held-out accuracy, calibration and histograms              algorithm.calibration
6. save a sequence classifier that plain transformers loads   models.reward_classifier
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from marlhf.algorithm.calibration import histogram, pair_metrics, reliability
from marlhf.algorithm.losses import pairwise_loss
from marlhf.common.plugins import seed_generators
from marlhf.config import RewardConfig
from marlhf.config.loading import check_kind
from marlhf.data.pairs import Preferences, TokenizedPair, choose_pad_token, load_preferences
from marlhf.distributed import Distributed
from marlhf.models import loading
from marlhf.models.policy import unwrapped
from marlhf.models.reward_classifier import build_classifier, save_classifier
from marlhf.models.saving import final_dtype
from marlhf.rewards.learned import right_pad, sequence_scores
from marlhf.runs.provenance import data_labels
from marlhf.runs.state import claim_run
from marlhf.training.supervised import (
    Batch,
    SupervisedTrainer,
    Task,
    checked_model_config,
    placed,
    resolved,
    set_up,
    shares,
)

REPORT = "reward_report.json"


def run(config: RewardConfig) -> None:
    """Run the job `marlhf reward`. Raises UserError, where possible before loading any weights."""
    check_kind(config, RewardConfig)
    config, distributed, tokenizer = set_up(config)
    data = load_preferences(config, tokenizer)
    base_config = checked_model_config(config, distributed, [data.longest], "texts")
    loading.check_tokenizer(tokenizer, base_config)
    choose_pad_token(tokenizer, base_config.get_text_config().vocab_size, data.tokens)
    config, demonstrations = resolved(config, len(data.pairs)), config.data.demonstrations_path
    labels = (*data_labels(config.data), f"data.demonstrations_path {demonstrations!r}")
    sets = (data.pairs, data.held_out, data.demonstrations if demonstrations else [])
    claimed = claim_run(config, distributed, dict(zip(labels, sets, strict=True)))

    seed_generators(config.seed)
    model = build_classifier(
        config.model, base_config, tokenizer, distributed.placement(), config.max_length
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
    with trainer.running() as folder, torch.no_grad():
        scorer.eval()
        with distributed.autocast():  # as `RewardModel` scores
            offset = mean_score(scorer, data.demonstrations, size, distributed)
            scores = held_out_scores(scorer, data.held_out, size, distributed)
        report = {"score_offset": offset, **held_out_report(*(s - offset for s in scores))}

        def write() -> None:
            text = json.dumps(report, indent=1) + "\n"
            (folder.parent / REPORT).write_text(text, encoding="utf-8")
            dtype = final_dtype(config.model, base_config)
            save_classifier(scorer.model, tokenizer, offset, folder, dtype)

        trainer.write_final(write)


class Scorer(nn.Module):
    """Scores right-padded texts with a sequence classifier, or a PEFT model around one."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Scores `[B]`, fp32, not centred."""
        return sequence_scores(unwrapped(self.model), input_ids, attention_mask)


def collate(pairs: Sequence[TokenizedPair]) -> Batch:
    """The chosen texts, then the rejected ones, right-padded; the margins in `labels`."""
    texts = [*(pair.chosen for pair in pairs), *(pair.rejected for pair in pairs)]
    ids, mask = right_pad(texts)
    margins = torch.tensor([pair.margin for pair in pairs])
    return {"input_ids": ids, "attention_mask": mask, "labels": margins}


def held_out_scores(
    module: nn.Module, pairs: Sequence[TokenizedPair], size: int, distributed: Distributed
) -> tuple[Tensor, Tensor]:
    """Scores of chosen and of rejected texts, shortest pairs first, on every rank."""
    scored: list[tuple[int, float, float]] = []
    for start, part, counted in shares(pairs, size, distributed):
        batch, _ = placed(collate(part), distributed.device)
        scores = module(**batch)
        chosen, rejected = (half.tolist() for half in scores.cpu().chunk(2))
        scored += zip(range(start, start + counted), chosen, rejected, strict=False)
    on_all_ranks = sorted(distributed.gather_objects(scored))
    scores = torch.tensor([pair[1:] for pair in on_all_ranks], dtype=torch.float64).reshape(-1, 2)
    return scores[:, 0], scores[:, 1]


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


def _summary(data: Preferences) -> dict[str, Any]:
    """Statistics of the data, for the first row of metrics."""
    return {
        "train_pairs": len(data.pairs),
        "truncated_fraction": data.truncated / (2 * len(data.pairs)),
        "eval_pairs": len(data.held_out),
        "demonstrations": len(data.demonstrations),
    }
