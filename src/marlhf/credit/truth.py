"""The Monte-Carlo truth: values of prefixes from continuations, and advantages from values.

The value of a prefix is the expected discounted return from there on, under the policy and with
the rewards of the run, the KL penalty among them. That of a complete response is 0, of one that the
length limit cuts too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt
from torch import Tensor

from marlhf.algorithm.advantages import gae
from marlhf.algorithm.experience import Rollout, TokenData
from marlhf.algorithm.macro import discounts, macro_mask, reduce, segment_ids
from marlhf.credit.agreement import Halves
from marlhf.data.prompts import Prompt
from marlhf.evaluation.records import Records
from marlhf.rollout.continuations import Prefix, distinct_prefixes, sample_continuations
from marlhf.rollout.worker import RolloutWorker
from marlhf.runs.metrics import Timer

RETURNS = "returns.jsonl"


def advantages(values_BT: Tensor, starts: Tensor, tokens: TokenData, gamma: float) -> Tensor:
    """Advantage of each macro action, [B,M].

    Its reward, plus gamma^w times the value after it, less the value before it.

    values_BT   of the prefixes before tokens; read at starts alone
    """
    ids = segment_ids(starts, tokens.response_mask)
    rewards_BT = (tokens.kl_rewards + tokens.task_rewards).double()
    rewards_BM = reduce(rewards_BT, ids, "sum", gamma)
    values_BM = reduce(values_BT.double(), ids, "first")
    result_BM, _ = gae(rewards_BM, values_BM, macro_mask(ids), discounts(ids, gamma), 0.0)
    return result_BM


def halves(returns_BTK: Tensor) -> tuple[Tensor, Tensor]:
    """Values [B,T] from the first and the second half of the continuations."""
    one, other = returns_BTK.chunk(2, dim=2)
    return one.mean(2), other.mean(2)


def true_values(returns_BTK: Tensor, places: Tensor) -> Halves:
    """Values of the prefixes before `places [B,T]`, in order."""
    one, other = (x[places].double().numpy() for x in halves(returns_BTK))
    return Halves(one, other)


def true_advantages(returns_BTK: Tensor, starts: Tensor, tokens: TokenData, gamma: float) -> Halves:
    """Advantages of all macro actions, in order; see `advantages`."""
    mask_BM = macro_mask(segment_ids(starts, tokens.response_mask))
    parts = [advantages(x, starts, tokens, gamma)[mask_BM] for x in halves(returns_BTK)]
    return Halves(*(part.numpy() for part in parts))


# --- sampling


class Returns(BaseModel):
    """Returns of the continuations of a prefix: a line of returns.jsonl.

    response   its number in the audit
    position   tokens of the response that the prefix holds
    first      number of the first continuation
    """

    model_config = ConfigDict(strict=True)

    response: NonNegativeInt
    position: NonNegativeInt
    first: NonNegativeInt
    returns: list[float]


@dataclass(frozen=True)
class Part:
    """Some prompts of an audit with their responses: what is sampled at a time.

    number   of its first response in the audit
    """

    prompts: Sequence[Prompt]
    rollout: Rollout
    number: int


@dataclass(frozen=True)
class ReturnStore:
    """Returns of continuations, on disk as soon as they are sampled."""

    worker: RolloutWorker
    kl_coef: float
    records: Records

    @staticmethod
    def of(folder: Path, worker: RolloutWorker, kl_coef: float) -> ReturnStore:
        """That of an audit's folder, with what an earlier one has left there."""
        key = ("response", "position", "first")
        return ReturnStore(worker, kl_coef, Records(folder / RETURNS, key, schema=Returns))

    def _distinct(self, part: Part, places: Tensor) -> dict[Prefix, Prefix]:
        """For each place of a part the first prefix that is the same."""
        prefixes = [Prefix(int(b), int(t)) for b, t in places.nonzero()]
        copies = self.worker.config.rollout.responses_per_prompt
        unpadded = part.rollout.responses.unpadded
        return dict(zip(prefixes, distinct_prefixes(prefixes, unpadded, copies), strict=True))

    def distinct(self, part: Part, places: Tensor) -> int:
        """How many prefixes before `places [B,T]` differ: responses may begin alike."""
        return len(set(self._distinct(part, places).values()))

    def missing(self, part: Part, places: Tensor, first: int, count: int) -> list[Prefix]:
        """Prefixes before `places [B,T]` that are still to be continued, the shortest first."""
        distinct = dict.fromkeys(self._distinct(part, places).values())
        known = self.records.lines

        def is_missing(prefix: Prefix) -> bool:
            line = known.get((part.number + prefix.response, prefix.length, first))
            return line is None or len(line["returns"]) < count

        return sorted(filter(is_missing, distinct), key=lambda prefix: prefix.length)

    def sample(
        self, part: Part, prefixes: Sequence[Prefix], first: int, count: int
    ) -> Iterator[int]:
        """Continue prefixes, and keep their returns; yields how many are done, batch by batch."""
        size = max(1, len(part.rollout.scores) // count)
        gamma, places = self.worker.config.ppo.gamma, part.rollout.responses.response_mask
        for begin in range(0, len(prefixes), size):
            batch = prefixes[begin : begin + size]
            chosen = torch.zeros_like(places)
            for b, t in batch:
                chosen[b, t] = True
            sampled = sample_continuations(
                self.worker,
                part.prompts,
                part.rollout,
                chosen,
                count,
                self.kl_coef,
                gamma,
                Timer(),
                first,
            )
            lines: list[dict[str, Any]] = [
                {
                    "response": part.number + b,
                    "position": t,
                    "first": first,
                    "returns": sampled.returns_BTK[b, t].tolist(),
                }
                for b, t in batch
            ]
            self.records.append(lines)
            yield len(batch)

    def returns(self, part: Part, places: Tensor, first: int, count: int) -> Tensor:
        """[B,T,count] returns before `places`, NaN elsewhere."""
        returns_BTK = torch.full((*places.shape, count), torch.nan, dtype=torch.float64)
        for (b, t), prefix in self._distinct(part, places).items():
            line = self.records.lines[part.number + prefix.response, prefix.length, first]
            returns_BTK[b, t] = torch.tensor(line["returns"][:count], dtype=torch.float64)
        return returns_BTK
