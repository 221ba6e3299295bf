"""Prompts -> responses with log-probs, values and rewards for the update.

All log-probabilities and values come from forward passes over the sampled sequences, never from
sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from marlhf.algorithm.advantages import whiten
from marlhf.algorithm.experience import Experience, MacroBatch
from marlhf.common.errors import UserError, one_line
from marlhf.common.seeds import row_seed
from marlhf.common.tokenization import has_text
from marlhf.common.types import AllReduceSum, Generation, ResponseBatch, Sequences
from marlhf.config import PPOConfig, RewardSettings
from marlhf.data.encoding import encode
from marlhf.data.prompts import Prompt, render
from marlhf.distributed import Distributed
from marlhf.models.policy import CriticOutput, Policy, PolicyOutput, forward
from marlhf.rewards import CombinedReward, CombinedTokenReward, RewardResult, place_spans
from marlhf.rollout.batching import micro_batches, minibatches
from marlhf.rollout.generation import Generate, generate
from marlhf.runs.metrics import Metrics, Timer


@dataclass(frozen=True)
class Rollout:
    """Sampled responses with their log-probs, values and rewards, before macro actions.

    responses       token ids, mask, logprobs, row ids, step, seed; ref_logprobs with a reference
    entropy         [B,T] of the policy, nats
    values          [B,T] and last_values [B], or None without a critic
    rewards         results of the reward functions
    scores          [B] float32, weighted sum of all rewards of a response, unprocessed
    task_rewards    [B,T] processed scores on the last tokens, and rewards inside responses
    truncated       [B] bool: the prompt was truncated on its left
    extras          outputs of the log-prob pass that token rewards require, see `models.Policy`
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
    def log_ratio(self) -> Tensor | None:
        """log(policy / reference) [B,T] of the sampled tokens, nats, 0 outside the mask.

        None without a reference.
        """
        if self.responses.ref_logprobs is None:
            return None
        assert self.responses.logprobs is not None
        return self.responses.logprobs - self.responses.ref_logprobs

    def kl_rewards(self, coef: float) -> Tensor:
        """KL reward per token [B,T]: -coef * log_ratio; zeros without a reference."""
        ratio = self.log_ratio
        return torch.zeros_like(self.task_rewards) if ratio is None else -coef * ratio

    @property
    def sequences(self) -> Sequences:
        """Prompts and responses, concatenated."""
        return Sequences.of(self.generation)

    def experience(self, batch: MacroBatch) -> Experience:
        """Training data of the update, with the advantages of the macro actions."""
        sequences = self.sequences
        assert self.responses.logprobs is not None
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
    """Samples and scores responses: this rank's prompts -> its Rollout.

    reference   None where nothing uses its log-probabilities
    extras      additional outputs of the policy's log-prob pass, see `models.Policy`
    """

    config: PPOConfig
    policy: nn.Module
    reference: nn.Module | None
    critic: nn.Module | None
    reward: CombinedReward
    tokenizer: Any
    distributed: Distributed
    extras: frozenset[str] = frozenset()
    generate: Generate = generate

    def __call__(
        self,
        prompts: Sequence[Prompt],
        row_ids: Sequence[int],
        step: int,
        timer: Timer,
        held_out: bool = False,
        with_values: bool = True,
    ) -> Rollout:
        """Sample and score one response per prompt (repeat a prompt for several).

        row_ids, step and the seed fix the noise of each response, whatever batch it is sampled in.
        held_out omits what only an update needs: `extras`, and all-reduces in whitening, as some
        ranks may have fewer held-out prompts. with_values requests the critic's values, where there
        is one.
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
                generation = self.generate(policy, self.tokenizer, encoded, seeds, settings)
        with timer("score"):
            sequences = Sequences.of(generation)
            wanted = {"entropy"} if held_out else {"entropy", *self.extras}
            if self.config.has_head and with_values:
                wanted.add("values")
            scored = self._logprobs(self.policy, sequences, wanted)
            valued: dict[str, Tensor] = {}
            if self.critic is not None and with_values:
                valued = self._values(self.critic, sequences)
            elif self.config.has_head and with_values:
                valued = {name: scored.pop(name) for name in ("values", "last_values")}
            of_reference: dict[str, Tensor] = {}
            if self.reference is not None:
                of_reference = self._logprobs(self.reference, sequences)
            responses = ResponseBatch(
                token_ids=generation.response_ids,
                response_mask=generation.response_mask,
                logprobs=scored.pop("logprobs"),
                ref_logprobs=of_reference.get("logprobs"),
                entropy=scored["entropy"],
                row_ids=torch.tensor(row_ids),
                step=step,
                seed=seed,
                tokenizer=self.tokenizer,
                continues=[has_text(ids, self.tokenizer) for ids in encoded],
                eos_ids=policy.eos_ids,
                skip_special_tokens=settings.skip_special_tokens,
            )
            plain = [p.text for p in prompts]
            score = partial(self.reward, plain, responses.texts, reward_columns(prompts))
            waits = held_out or self.distributed.zero_stage == 3  # for a reward model's weights
            rewards = self.distributed.fail_together(score, waits)
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

    def _logprobs(
        self, policy: nn.Module, sequences: Sequences, extras: Collection[str] = ()
    ) -> dict[str, Tensor]:
        """Log-probabilities under a policy as `logprobs`, and the requested extras."""

        def one_pass(model: nn.Module, part: Sequences) -> dict[str, Tensor]:
            output: PolicyOutput = forward(model, part, extras=extras, **self.config.sampled_from)
            return {"logprobs": output.logprobs, **output.extras}

        return self._over_passes(policy, sequences, one_pass)

    def _values(self, critic: nn.Module, sequences: Sequences) -> dict[str, Tensor]:
        """A critic's `values` and `last_values`."""

        def one_pass(model: nn.Module, part: Sequences) -> dict[str, Tensor]:
            output: CriticOutput = forward(model, part)
            return {"values": output.values, "last_values": output.last_values}

        return self._over_passes(critic, sequences, one_pass)

    @torch.no_grad()
    def _over_passes(
        self,
        module: nn.Module,
        sequences: Sequences,
        one_pass: Callable[[nn.Module, Sequences], dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        """Run a model in evaluation mode over micro-batches; results are in the order of input."""
        model = self.distributed.unwrap(module)
        model.eval()  # training may have left it in training mode
        T = sequences.response_mask.shape[1]
        passes = self._passes(sequences.attention_mask)
        parts = []
        for index in passes:
            part = sequences.rows(index)
            with self.distributed.autocast():
                results = one_pass(model, part)
            missing = T - part.response_mask.shape[1]
            parts.append({name: _widen(x, missing) for name, x in results.items()})
        in_order = torch.cat(passes).argsort().to(sequences.input_ids.device)
        return {name: torch.cat([part[name] for part in parts])[in_order] for name in parts[0]}

    def _passes(self, attention_mask: Tensor) -> list[Tensor]:
        """Micro-batches of the log-prob pass: the same as in training, so that both round alike."""
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
    """Add token rewards to `task_rewards` and drop `extras`.

    Then update the token rewards and log their metrics.
    """
    if not reward.rewards:
        return rollout
    rewards, by_name = distributed.fail_together(lambda: reward(rollout))
    learned = reward.update(rollout, distributed.all_reduce)
    for name, values in by_name.items():
        metrics.mean(f"reward_{name}_mean", values)
    for name, values in learned.items():
        named = {f"{name}_{metric}": value for metric, value in values.items()}
        metrics.add_foreign(named, f"token reward {name}")
    return replace(rollout, task_rewards=rollout.task_rewards + rewards, extras={})


def score_to_rewards(
    scores: Tensor, generation: Generation, settings: RewardSettings, all_reduce: AllReduceSum
) -> Tensor:
    """Scores [B] -> rewards [B,T], non-zero on the last response token alone.

    Scores are clipped, penalised for a missing EOS and whitened, as configured. The score of an
    empty response is dropped.
    """
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
    """Right-pad [B,t] or [B,t,H] with `columns` zeros along t; leave [B] unchanged."""
    if x.dim() == 1:
        return x
    return torch.nn.functional.pad(x, (*[0, 0] * (x.dim() - 2), 0, columns))


def check_rewards(reward: CombinedReward, prompts: Sequence[Prompt]) -> None:
    """Check that prompts have the columns that rewards need, before any model is loaded.

    A reward with a method `check_values(**columns)` checks the values too. Raises UserError.
    """
    columns = reward_columns(prompts)
    reward.check_columns(columns)
    for named in reward.rewards:
        check = getattr(named.function, "check_values", None)
        if callable(check):
            try:
                check(**columns)
            except (TypeError, ValueError) as error:
                raise UserError(f"reward {named.name}: {one_line(error)}") from error


def reward_columns(prompts: Sequence[Prompt]) -> dict[str, list[Any]]:
    """The prompts' other columns as lists, and `messages` where prompts are conversations.

    A data column named `messages` is omitted: rewards would take it for the prompt.
    """
    names = dict.fromkeys(n for p in prompts for n in p.columns if n != "messages")
    columns: dict[str, list[Any]] = {n: [p.columns.get(n) for p in prompts] for n in names}
    if any(p.messages is not None for p in prompts):
        columns["messages"] = [p.messages for p in prompts]
    return columns
