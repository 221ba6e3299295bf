"""Continuations: the rest of a response, sampled again from a prefix of it.

The mean return of several continuations is a Monte-Carlo estimate of the prefix's value, unbiased
and without a critic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import StopStringCriteria

from marlhf.algorithm.estimators import Estimator, continuation_plan, estimator_requires
from marlhf.algorithm.experience import Rollout
from marlhf.algorithm.kl import KLCoefficient
from marlhf.algorithm.monte_carlo import spread_starts
from marlhf.common.seeds import row_seed
from marlhf.common.types import Generation
from marlhf.config import RolloutSettings
from marlhf.data.prompts import Prompt
from marlhf.rollout.transformers_engine import left_pad, pad_token_id
from marlhf.rollout.worker import RolloutWorker
from marlhf.runs.metrics import Metrics, Timer


class Prefix(NamedTuple):
    """The prompt of a response, and the first `length` tokens of it."""

    response: int
    length: int


@dataclass(frozen=True)
class Continuations:
    """Returns of `K` continuations of each prefix of interest.

    returns_BTK   discounted return from token t on, of responses that share the tokens before it;
                  NaN where none was sampled
    prefixes      how many were continued
    tokens        how many were sampled
    """

    returns_BTK: Tensor
    prefixes: int
    tokens: int


@dataclass(frozen=True)
class ContinuationSampler:
    """Continuations for an estimator: what it asks for, from a worker."""

    worker: RolloutWorker
    estimator: Estimator
    kl: KLCoefficient

    def __call__(
        self,
        starts: Tensor,
        prompts: Sequence[Prompt],
        rollout: Rollout,
        timer: Timer,
        metrics: Metrics,
    ) -> Rollout:
        """The rollout with `continuation_values`, if the estimator reads them.

        Arguments as of `sample_continuations`.
        """
        if "continuations" not in estimator_requires(self.estimator):
            return rollout
        count, most = continuation_plan(self.estimator)
        config = self.worker.config
        starts = starts & rollout.responses.response_mask
        places = spread_starts(starts, most, config.rollout.max_new_tokens)
        coef, gamma = self.kl.in_rewards_coef, config.ppo.gamma
        sampled = sample_continuations(
            self.worker, prompts, rollout, places, count, coef, gamma, timer
        )
        metrics.add("continued_prefixes_mean", sampled.prefixes, len(starts))
        metrics.add("continuation_tokens_mean", sampled.tokens, len(starts))
        return replace(rollout, continuation_values=sampled.returns_BTK.mean(2))


def sample_continuations(
    worker: RolloutWorker,
    prompts: Sequence[Prompt],
    rollout: Rollout,
    places: Tensor,
    count: int,
    kl_coef: float,
    gamma: float,
    timer: Timer,
    first_draw: int = 0,
) -> Continuations:
    """Continue each response `count` times from every place, and score what comes out.

    prompts   of the responses
    places    [B,T] bool: before these tokens
    kl_coef   weight of the KL penalty in the rewards; at 0 neither policy nor reference is run
    gamma     discount per token
    first_draw   number of the first continuation of a prefix: others are independent of it

    Every rank must call it. Responses to a prompt that share a prefix share its continuations.
    """
    config, responses = worker.config, rollout.responses
    copies = config.rollout.responses_per_prompt
    prefixes = [Prefix(int(b), int(t)) for b, t in places.nonzero()]
    distinct = distinct_prefixes(prefixes, responses.unpadded, copies)
    asked = [prefix for prefix in dict.fromkeys(distinct) for _ in range(count)]
    most = max(worker.distributed.gather_objects([len(asked)]))
    # every rank runs as many passes, as ranks that share weights must
    padded = [*asked, *([Prefix(0, 0)] * (most - len(asked)))]
    noise = [row_seed(config.seed, responses.step, row) for row in responses.rows]
    seeds = [
        row_seed(noise[prefix.response], prefix.length, 1 + first_draw + i % count)
        for i, prefix in enumerate(padded)
    ]
    with timer("generate"):
        generation = continue_prefixes(worker, rollout.generation, padded, seeds)
    with timer("score"):
        of_response = [prefix.response for prefix in padded]
        scored = worker.score(
            [prompts[b] for b in of_response],
            [rollout.prompt_texts[b] for b in of_response],
            generation,
            [responses.rows[b] for b in of_response],
            responses.step,
            held_out=True,
            with_values=False,
            with_logprobs=kl_coef != 0,
        )
    tokens = scored.token_data(kl_coef)
    rewards_BT = (tokens.kl_rewards + tokens.task_rewards).double()
    first_B1 = torch.tensor([prefix.length for prefix in padded], device=rewards_BT.device)[:, None]
    since_BT = torch.arange(rewards_BT.shape[1], device=rewards_BT.device) - first_B1
    counted_BT = tokens.response_mask & (since_BT >= 0)
    weights_BT = torch.as_tensor(gamma, dtype=torch.float64) ** since_BT.clamp(min=0)
    returns = (rewards_BT * weights_BT).where(counted_BT, 0.0).sum(1)[: len(asked)]
    by_prefix = dict(zip(dict.fromkeys(distinct), returns.reshape(-1, count), strict=True))
    returns_BTK = torch.full((*places.shape, count), torch.nan, dtype=torch.float64)
    for (b, t), prefix in zip(prefixes, distinct, strict=True):
        returns_BTK[b, t] = by_prefix[prefix].cpu()
    sampled = int(counted_BT[: len(asked)].sum())
    return Continuations(returns_BTK.to(places.device), len(by_prefix), sampled)


def continue_prefixes(
    worker: RolloutWorker,
    generation: Generation,
    prefixes: Sequence[Prefix],
    seeds: Sequence[int],
) -> Generation:
    """Sample the rest of responses: one Generation of whole ones, in the order of `prefixes`.

    They obey the limits of `rollout` as whole responses. At most as many are sampled at a time as
    there are responses in `generation`.
    """
    settings = worker.config.rollout
    prompts, responses = generation.prompts, generation.responses
    begun = [responses[prefix.response][: prefix.length] for prefix in prefixes]
    inputs = [prompts[p.response] + ids for p, ids in zip(prefixes, begun, strict=True)]
    whole: dict[int, list[int]] = {}
    finished = torch.zeros(len(prefixes), dtype=torch.bool)
    parts = list(_parts(prefixes, len(responses), settings))
    calls = max(worker.distributed.gather_objects([len(parts)]))
    for index in parts + [parts[0]] * (calls - len(parts)):
        lengths = [prefixes[i].length for i in index]
        limited = replace(
            settings,
            max_new_tokens=settings.max_new_tokens - min(lengths),
            min_new_tokens=max(0, settings.min_new_tokens - lengths[0]),
        )
        rest = worker.engine.generate(
            [inputs[i] for i in index], [seeds[i] for i in index], limited
        )
        for i, ids, ended in zip(index, rest.responses, rest.finished.tolist(), strict=True):
            limit = settings.max_new_tokens - prefixes[i].length
            whole[i] = begun[i] + ids[:limit]
            finished[i] = ended and len(ids) <= limit
    worker.engine.sleep()
    rows = [whole[i] for i in range(len(prefixes))]
    if settings.stop_strings:
        rows, finished = _stopped(rows, finished, prefixes, worker)
    device = generation.response_ids.device
    T = max(map(len, rows))
    pad_id = pad_token_id(worker.tokenizer, worker.distributed.unwrap(worker.policy).eos_ids)
    lengths_B = torch.tensor([len(ids) for ids in rows])
    padded_ids = torch.tensor([ids + [pad_id] * (T - len(ids)) for ids in rows])
    tensors = (
        *left_pad([prompts[prefix.response] for prefix in prefixes], pad_id),
        padded_ids,
        torch.arange(T) < lengths_B[:, None],
        finished,
    )
    return Generation(*(x.to(device) for x in tensors))


def distinct_prefixes(
    prefixes: Sequence[Prefix], responses: Sequence[Sequence[int]], copies: int
) -> list[Prefix]:
    """For each prefix the first that is the same, of the prompt's `copies` responses."""
    first: dict[tuple[int, tuple[int, ...]], Prefix] = {}
    firsts = []
    for prefix in prefixes:
        tokens = tuple(responses[prefix.response][: prefix.length])
        firsts.append(first.setdefault((prefix.response // copies, tokens), prefix))
    return firsts


def _parts(prefixes: Sequence[Prefix], size: int, settings: RolloutSettings) -> Iterator[list[int]]:
    """Indices of prefixes to continue together: of like lengths, at most `size`.

    Before `min_new_tokens` those of one length alone, as EOS has no probability up to there.
    """

    def kind(i: int) -> int:
        return max(0, settings.min_new_tokens - prefixes[i].length)

    part: list[int] = []
    for i in sorted(range(len(prefixes)), key=lambda i: prefixes[i].length):
        if part and (len(part) == size or kind(i) != kind(part[0])):
            yield part
            part = []
        part.append(i)
    yield part


def _stopped(
    rows: list[list[int]], finished: Tensor, prefixes: Sequence[Prefix], worker: RolloutWorker
) -> tuple[list[list[int]], Tensor]:
    """Cut after stop strings that begin in the prefix, which the engine did not see."""
    tokenizer: Any = worker.tokenizer
    stop = StopStringCriteria(tokenizer, list(worker.config.rollout.stop_strings))
    rows, finished = list(rows), finished.clone()
    for i, (ids, prefix) in enumerate(zip(rows, prefixes, strict=True)):
        for end in range(prefix.length + 1, len(ids) + 1):
            if bool(stop(torch.tensor([ids[:end]]), None)[0]):  # pyright: ignore[reportArgumentType]
                rows[i], finished[i] = ids[:end], True
                break
    return rows, finished
