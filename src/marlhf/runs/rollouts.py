"""Whole rollouts of a run, kept for `marlhf replay`.

rollouts/step-N/rank-R.safetensors   everything that credit is computed from, of each rank
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from marlhf.algorithm.experience import MacroBatch, Rollout, TokenData
from marlhf.common.errors import UserError, one_line
from marlhf.common.tokenization import Tokenizer
from marlhf.common.types import ResponseBatch
from marlhf.config import LogSettings
from marlhf.runs.directory import writing

_RESPONSES = ("token_ids", "response_mask", "logprobs", "ref_logprobs", "entropy", "row_ids")
_TOKENS = ("task_rewards", "values", "last_values", "finished", "continuation_values")


@dataclass(frozen=True)
class KeptRollout:
    """A rollout of one update, over all ranks.

    tensors   by name: of `ResponseBatch` and `TokenData`, `scores`, and the `starts` and
              `advantages` [B,T] of the run itself
    facts     prompts' texts and what else a ResponseBatch is made of; `kl_coef`, the penalty's
              weight in the rewards
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    @staticmethod
    def of(
        rollout: Rollout,
        kl_coef: float,
        starts: Tensor | None = None,
        batch: MacroBatch | None = None,
    ) -> KeptRollout:
        """What is kept of a rollout, and of the run's credit if it is given."""
        responses, tokens = rollout.responses, rollout.token_data(kl_coef)
        tensors = {name: getattr(responses, name) for name in _RESPONSES}
        tensors |= {name: getattr(tokens, name) for name in _TOKENS}
        advantages = None if batch is None else batch.advantages_BT
        tensors |= {"scores": rollout.scores, "starts": starts, "advantages": advantages}
        kept = {k: x.detach().cpu().contiguous() for k, x in tensors.items() if x is not None}
        facts = {
            "prompt_texts": rollout.prompt_texts,
            "continues": list(responses.continues or []),
            "eos_ids": list(responses.eos_ids),
            "skip_special_tokens": responses.skip_special_tokens,
            "step": responses.step,
            "seed": responses.seed,
            "kl_coef": kl_coef,
        }
        return KeptRollout(kept, facts)

    def responses(self, tokenizer: Tokenizer) -> ResponseBatch:
        """The responses, as segmenters get them."""
        tensors = {name: self.tensors.get(name) for name in _RESPONSES}
        names = ("continues", "eos_ids", "skip_special_tokens", "step", "seed")
        facts = {name: self.facts[name] for name in names}
        return ResponseBatch(**tensors, **facts, tokenizer=tokenizer)

    def token_data(self, kl_coef: float | None = None) -> TokenData:
        """Rewards and values per token; `kl_coef` instead of the run's own."""
        tensors = self.tensors
        coef = self.facts["kl_coef"] if kl_coef is None else kl_coef
        kl_rewards = torch.zeros_like(tensors["task_rewards"])
        if "ref_logprobs" in tensors:
            kl_rewards = -coef * (tensors["logprobs"] - tensors["ref_logprobs"])
        others: dict[str, Any] = {name: tensors.get(name) for name in _TOKENS}
        mask, ids = tensors["response_mask"], tensors["token_ids"]
        return TokenData(response_mask=mask, kl_rewards=kl_rewards, token_ids=ids, **others)


def keep_rollout(
    rollout: Rollout,
    starts: Tensor,
    batch: MacroBatch,
    kl_coef: float,
    run: Path,
    log: LogSettings,
    step: int,
    rank: int,
) -> None:
    """Write the rollout of update `step`, if it is one to keep. Raises UserError.

    Other arguments as of `KeptRollout.of`.
    """
    if not log.rollouts_every or step % log.rollouts_every:
        return
    file = run / "rollouts" / f"step-{step}" / f"rank-{rank}.safetensors"
    with writing(run):
        write_part(KeptRollout.of(rollout, kl_coef, starts, batch), file)


def write_part(kept: KeptRollout, file: Path) -> None:
    """Write a rollout, or one rank's part of it, atomically. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    save_file(kept.tensors, partial, metadata={"facts": json.dumps(kept.facts)})
    os.replace(partial, file)


def kept_steps(run: Path) -> list[int]:
    """Updates of which rollouts are kept, in order."""
    names = [f.name.removeprefix("step-") for f in (run / "rollouts").glob("step-*")]
    return sorted(int(name) for name in names if name.isdigit())


def read_rollout(run: Path, step: int) -> KeptRollout:
    """The rollout of an update, over all ranks. Raises UserError."""
    folder = run / "rollouts" / f"step-{step}"
    files = sorted(folder.glob("rank-*.safetensors"), key=lambda f: int(f.stem.split("-")[1]))
    parts = [read_part(file) for file in files]
    if not parts:
        raise UserError(f"{str(folder)!r} holds no rollout")
    return joined(parts)


def read_part(file: Path) -> KeptRollout:
    """Read what `write_part` wrote. Raises UserError."""
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            return KeptRollout(tensors, json.loads(opened.metadata()["facts"]))
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"{str(file.parent)!r} is damaged: {one_line(error)}") from error


def joined(parts: Sequence[KeptRollout]) -> KeptRollout:
    """Several parts in one."""
    if len(parts) == 1:
        return parts[0]
    width = max(part.tensors["token_ids"].shape[1] for part in parts)

    def wide(x: Tensor) -> Tensor:
        return x if x.dim() == 1 else torch.nn.functional.pad(x, (0, width - x.shape[1]))

    first = parts[0]
    tensors = {name: torch.cat([wide(p.tensors[name]) for p in parts]) for name in first.tensors}
    texts = {
        name: [text for part in parts for text in part.facts[name]]
        for name in ("prompt_texts", "continues")
    }
    return replace(first, tensors=tensors, facts=first.facts | texts)
