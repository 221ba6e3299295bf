"""Prompts -> responses, with everything the update needs to know of them.

Sampling sits behind one function, `generate`; all log-probabilities and values come from forward
passes of our own over the finished sequences, never from sampling.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from marlhf.advantages import AllReduceSum, whiten
from marlhf.batching import micro_batches, minibatches
from marlhf.config import PPOConfig, RewardSettings, RolloutSettings
from marlhf.data import Prompt, encode, render
from marlhf.distributed import Distributed
from marlhf.experience import Experience, MacroBatch
from marlhf.loading import eos_token_ids
from marlhf.metrics import Metrics, Timer
from marlhf.models import Policy, forward, use_adapter
from marlhf.rewards import CombinedReward, CombinedTokenReward, RewardResult, place_spans
from marlhf.segmenters.ngram import row_seed
from marlhf.types import Generation, ResponseBatch, Sequences


@dataclass(frozen=True)
class Rollout:
    """Sampled responses and what is known of them before macro actions.

    responses       token ids, mask, logprobs, ref_logprobs, row ids, step, seed
    entropy         [B,T] of the policy, nats
    values          [B,T] and last_values [B], or None without a critic
    rewards         what the reward functions said
    scores          [B] float32, weighted sum of all rewards of a response, as given
    task_rewards    [B,T] processed scores on the last tokens, and rewards inside responses
    truncated       [B] bool: the prompt lost tokens on its left
    extras          what token rewards require of the policy's scoring pass, see `models.Policy`
    """

    prompts: list[Prompt]
    prompt_texts: list[str]
    generation: Generation
    responses: ResponseBatch
    entropy: Tensor
    values: Tensor | None
    last_values: Tensor | None
    rewards: RewardResult
    scores: Tensor
    task_rewards: Tensor
    truncated: Tensor
    extras: dict[str, Tensor]

    @property
    def log_ratio(self) -> Tensor:
        """[B,T] log(policy / reference) of the sampled tokens, nats, 0 outside the mask."""
        assert self.responses.logprobs is not None
        assert self.responses.ref_logprobs is not None
        return self.responses.logprobs - self.responses.ref_logprobs

    @property
    def sequences(self) -> Sequences:
        """Prompts and responses side by side."""
        return Sequences.of(self.generation)

    def experience(self, batch: MacroBatch) -> Experience:
        """What the update learns from, with the advantages of its macro actions."""
        sequences = self.sequences
        assert self.responses.logprobs is not None
        assert self.responses.ref_logprobs is not None
        return Experience(
            input_ids=sequences.input_ids,
            attention_mask=sequences.attention_mask,
            response_mask=sequences.response_mask,
            segment_ids=batch.segment_ids,
            logprobs=self.responses.logprobs,
            ref_logprobs=self.responses.ref_logprobs,
            advantages=batch.advantages_BT,
            values=self.values,
            returns=batch.returns_BT,
        )


@dataclass(frozen=True)
class RolloutWorker:
    """Samples and scores: this rank's prompts in, its Rollout out."""

    config: PPOConfig
    policy: nn.Module
    reference: nn.Module
    critic: nn.Module | None
    reward: CombinedReward
    tokenizer: Any
    distributed: Distributed
    extras: frozenset[str] = frozenset()

    def __call__(
        self,
        prompts: Sequence[Prompt],
        row_ids: Sequence[int],
        step: int,
        timer: Timer,
        held_out: bool = False,
        with_values: bool = True,
    ) -> Rollout:
        """One response to each prompt (repeat a prompt for several).

        row_ids, step and the seed fix the noise of each row, whatever batch it is sampled in.
        held_out leaves out what only an update needs: scores compared over ranks, of which some
        may have fewer held-out rows. with_values asks for the critic's values, where there is one.
        """
        settings, seed = self.config.rollout, self.config.seed
        texts = [render(p, self.tokenizer, self.config.data) for p in prompts]
        with timer("generate"):
            encoded, truncated = encode(
                texts,
                self.tokenizer,
                settings.max_prompt_length,
                special=[p.messages is None for p in prompts],
            )
            seeds = [row_seed(seed, step, row) for row in row_ids]
            policy: Policy = self.distributed.unwrap(self.policy)
            with self.distributed.gathered(policy), self.distributed.autocast():
                generation = generate(policy, self.tokenizer, encoded, seeds, settings)
        with timer("score"):
            sequences = Sequences.of(generation)
            wanted = {"entropy"} if held_out else {"entropy", *self.extras}
            scored = self._score(self.policy, sequences, extras=wanted)
            valued: dict[str, Tensor] = {}
            if self.critic is not None and with_values:
                valued = self._score(self.critic, sequences)
            responses = ResponseBatch(
                token_ids=generation.response_ids,
                response_mask=generation.response_mask,
                logprobs=scored.pop("logprobs"),
                ref_logprobs=self._score(self.reference, sequences)["logprobs"],
                entropy=scored["entropy"],
                row_ids=torch.tensor(row_ids),
                step=step,
                seed=seed,
                tokenizer=self.tokenizer,
            )
            plain = [p.text for p in prompts]
            score = partial(self.reward, plain, responses.texts, reward_columns(prompts))
            rewards = score() if held_out else self.distributed.together(score)
            scores = torch.tensor(rewards.scores, dtype=torch.float32)
            dense = torch.zeros(generation.response_mask.shape)
            if any(rewards.spans):
                dense = place_spans(rewards.spans, responses.offsets, dense.shape)
            all_reduce = (lambda x: x) if held_out else self.distributed.all_reduce
            task_rewards = score_to_rewards(scores, generation, self.config.reward, all_reduce)
            task_rewards = task_rewards + dense.to(self.distributed.device)
        return Rollout(
            prompts=list(prompts),
            prompt_texts=texts,
            generation=generation,
            responses=responses,
            entropy=scored.pop("entropy"),
            values=valued.get("values"),
            last_values=valued.get("last_values"),
            rewards=rewards,
            scores=scores + dense.sum(1),
            task_rewards=task_rewards,
            truncated=torch.tensor(truncated),
            extras=scored,
        )

    @torch.no_grad()
    def _score(
        self, module: nn.Module, sequences: Sequences, **arguments: Any
    ) -> dict[str, Tensor]:
        """Run a policy or critic over micro-batches; its results by name, put together again."""
        model = self.distributed.unwrap(module)
        if isinstance(model, Policy):
            arguments["temperature"] = self.config.policy_temperature
        T = sequences.response_mask.shape[1]
        passes = self._passes(sequences.attention_mask)
        parts = []
        for rows in passes:
            with self.distributed.autocast():
                part = sequences.rows(rows)
                first, second = forward(model, part, **arguments)
            found = (
                {"logprobs": first, **second}
                if isinstance(model, Policy)
                else {"values": first, "last_values": second}
            )
            missing = T - part.response_mask.shape[1]
            parts.append({name: _widen(x, missing) for name, x in found.items()})
        in_order = torch.cat(passes).argsort().to(sequences.input_ids.device)
        return {name: torch.cat([part[name] for part in parts])[in_order] for name in parts[0]}

    def _passes(self, attention_mask: Tensor) -> list[Tensor]:
        """The rows of each scoring pass: those of the training passes to come."""
        config = self.config
        size = config.rollout.micro_batch_size or config.optimizer.micro_batch_size
        parts = minibatches(
            len(attention_mask), config.rollout.responses_per_prompt, config.ppo.minibatches
        )
        alike = self.distributed.world_size > 1
        return [
            rows[chosen]
            for rows in parts
            if len(rows)
            for chosen in micro_batches(attention_mask[rows.to(attention_mask.device)], size, alike)
        ]


def add_token_rewards(
    rollout: Rollout, reward: CombinedTokenReward, distributed: Distributed, metrics: Metrics
) -> Rollout:
    """The rollout with its token rewards among the task rewards, and without the extras that they
    needed; they learn from it, and report."""
    if not reward.rewards:
        return rollout
    rewards, by_name = distributed.together(lambda: reward(rollout))
    learned = reward.update(rollout, distributed.all_reduce)
    for name, values in by_name.items():
        metrics.mean(f"reward_{name}_mean", values)
    for name, value in learned.items():
        metrics.add(name, value)
    return replace(rollout, task_rewards=rollout.task_rewards + rewards, extras={})


@torch.no_grad()
def generate(
    policy: Policy,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    settings: RolloutSettings,
) -> Generation:
    """Sample one response to each prompt (token ids).

    Row i is sampled by adding Gumbel noise from its own generator, seeded with seeds[i], to its
    warped logits and taking the maximum: an exact sample, the same in whatever batch the row sits.
    Sampling settings come from `settings` alone; of the model's generation config only its EOS ids
    count.
    """
    model: Any = policy.model
    model = model.get_base_model() if hasattr(model, "peft_config") else model
    eos_ids = eos_token_ids(model, tokenizer)
    pad_id = tokenizer.pad_token_id
    pad_id = pad_id if pad_id is not None else (eos_ids or [0])[0]
    prompt_ids, prompt_mask = (x.to(model.device) for x in left_pad(prompts, pad_id))

    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(settings.temperature))])
    if settings.top_k:
        warpers.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1:
        warpers.append(TopPLogitsWarper(float(settings.top_p)))
    warpers.append(_RowNoise(seeds, model.device))
    finish = _Finish(prompt_ids.shape[1], eos_ids, settings.stop_strings, tokenizer)

    training, own_config = model.training, model.generation_config
    model.eval()
    model.generation_config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        min_new_tokens=settings.min_new_tokens or None,
        eos_token_id=eos_ids or None,
        pad_token_id=pad_id,
        bos_token_id=tokenizer.bos_token_id,
        use_cache=True,
    )
    try:
        with use_adapter(policy.model, policy.adapter):
            output = model.generate(
                prompt_ids,
                attention_mask=prompt_mask.long(),
                logits_processor=warpers,
                stopping_criteria=StoppingCriteriaList([finish]),
                synced_gpus=False,  # the weights are here: no rank waits for another's tokens
            )
    finally:
        model.train(training)
        model.generation_config = own_config
    response_ids = output[:, prompt_ids.shape[1] :]
    T = response_ids.shape[1]
    lengths = torch.where(finish.lengths > 0, finish.lengths, T)
    response_mask = torch.arange(T, device=lengths.device) < lengths[:, None]
    return Generation(prompt_ids, prompt_mask, response_ids, response_mask, finish.lengths > 0)


def left_pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """`(ids [B,P] int64, mask [B,P] bool)`."""
    P = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (P - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[False] * (P - len(row)) + [True] * len(row) for row in rows])
    return ids, mask


class _RowNoise(LogitsProcessor):
    """Adds Gumbel noise, each row's from its own generator."""

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.generators = [torch.Generator(device).manual_seed(s) for s in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniform = torch.stack(
            [
                # float64: in float32 the smallest draws are too coarse for a large vocabulary
                torch.rand(scores.shape[1], generator=g, dtype=torch.float64, device=scores.device)
                for g in self.generators
            ]
        )
        return scores + uniform.log_().neg_().log_().neg_().to(torch.float32)


class _Finish(StoppingCriteria):
    """Remembers the length at which each row met EOS or a stop string; 0 while it has not."""

    def __init__(
        self,
        prompt_length: int,
        eos_ids: Sequence[int],
        stop_strings: Sequence[str],
        tokenizer: Any,
    ) -> None:
        self.prompt_length = prompt_length
        self.eos_ids = torch.tensor(list(eos_ids), dtype=torch.int64)
        self.stop = StopStringCriteria(tokenizer, list(stop_strings)) if stop_strings else None
        self.lengths = torch.zeros(0, dtype=torch.int64)

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        length = input_ids.shape[1] - self.prompt_length
        if length == 1:
            self.lengths = torch.zeros(len(input_ids), dtype=torch.int64, device=input_ids.device)
        done = torch.isin(input_ids[:, -1], self.eos_ids.to(input_ids.device))
        if self.stop is not None:
            done = done | self.stop(input_ids[:, self.prompt_length :], scores).to(done.device)
        self.lengths = torch.where(done & (self.lengths == 0), length, self.lengths)
        return self.lengths > 0


def score_to_rewards(
    scores: Tensor, generation: Generation, settings: RewardSettings, all_reduce: AllReduceSum
) -> Tensor:
    """Scores [B] -> rewards [B,T]: clipped, fined for a missing EOS, whitened, as asked for, and
    put on the last response token. A response without a token has nowhere to put its score."""
    scores = scores.to(generation.response_ids.device)
    if settings.clip is not None:
        scores = scores.clamp(-settings.clip, settings.clip)
    scores = scores - settings.missing_eos_penalty * (~generation.finished).to(scores.dtype)
    if settings.whiten:
        scores = whiten(scores, torch.ones_like(scores), all_reduce)
    positions = torch.arange(generation.response_ids.shape[1], device=scores.device)
    is_last = positions == generation.lengths[:, None] - 1
    return torch.where(is_last, scores[:, None], torch.zeros_like(scores)[:, None])


def _widen(x: Tensor, columns: int) -> Tensor:
    """More columns of zeros for [B,t] or [B,t,H]; leave [B] as it is."""
    if x.dim() == 1:
        return x
    return torch.nn.functional.pad(x, (*[0, 0] * (x.dim() - 2), 0, columns))


def reward_columns(prompts: Sequence[Prompt]) -> dict[str, list[Any]]:
    """The rows' other columns as lists, and `messages` where rows are conversations."""
    names: Iterator[str] = iter(dict.fromkeys(n for p in prompts for n in p.columns))
    columns = {name: [p.columns.get(name) for p in prompts] for name in names}
    if any(p.messages is not None for p in prompts):
        columns["messages"] = [p.messages for p in prompts]
    return columns
