"""Prompts -> responses with log-probs, values and rewards for the update.

All log-probabilities and values come from forward passes over the sampled sequences, never from
sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import cast

import torch
from torch import Tensor, nn

from marlhf.algorithm.experience import Rollout
from marlhf.common.errors import UserError
from marlhf.common.seeds import row_seed
from marlhf.common.tokenization import Tokenizer, has_text
from marlhf.common.types import Generation, ResponseBatch, RewardResult, Sequences
from marlhf.config import PPOConfig
from marlhf.data.encoding import encode
from marlhf.data.order import PromptStream
from marlhf.data.prompts import Prompt, render
from marlhf.distributed import Distributed, in_use
from marlhf.models.policy import CriticOutput, PolicyOutput, forward
from marlhf.rewards import CombinedReward, place_spans
from marlhf.rollout.ahead import Ahead, Request
from marlhf.rollout.batching import micro_batches, minibatches, rank_share
from marlhf.rollout.engine import AheadEngine, Engine, engine_name
from marlhf.rollout.policy_weights import policy_weights
from marlhf.rollout.scores import reward_columns, score_to_rewards
from marlhf.rollout.transformers_engine import pad_token_id
from marlhf.runs.metrics import Timer


@dataclass(frozen=True)
class RolloutWorker:
    """Samples and scores responses: this rank's prompts -> its Rollout.

    reference   None where nothing uses its log-probabilities
    requested_extras   additional outputs of the policy's log-prob pass; see `models.Policy`
    stream      the prompts of updates, for `rollout.ahead`
    """

    config: PPOConfig
    policy: nn.Module
    reference: nn.Module | None
    critic: nn.Module | None
    reward: CombinedReward
    tokenizer: Tokenizer
    distributed: Distributed
    engine: Engine
    requested_extras: frozenset[str] = frozenset()
    stream: PromptStream[Prompt] | None = None

    @cached_property
    def ahead(self) -> Ahead | None:
        """What samples one update ahead, if configured."""
        if not self.config.rollout.ahead or self.stream is None:
            return None
        return Ahead(
            cast("AheadEngine", self.engine),
            self.config.rollout,
            self.distributed,
            pad_token_id(self.tokenizer, self.distributed.unwrap(self.policy).eos_ids),
            self._upcoming,
            keeps=self.config.checkpoint.every > 0,
        )

    def update_engine(self) -> None:
        """Give the engine the policy's weights, once it has sampled what it began."""
        if self.ahead is not None:
            self.ahead.finish()
        self.engine.update_weights(policy_weights(self.distributed.unwrap(self.policy)))

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

        row_ids, step and the seed fix the noise of each response, in any batch. held_out omits
        the requested extras, which only an update needs, and the all-reduces of whitening, as some
        ranks have fewer held-out prompts. with_values requests the critic's values, if any.
        """
        texts = [render(p, self.tokenizer) for p in prompts]
        with timer("generate"):
            request, truncated = self._request(prompts, texts, row_ids, step)
            generation, lag = self._sample(request, held_out)
        with timer("score"):
            rollout = self.score(
                prompts,
                texts,
                generation,
                row_ids,
                step,
                held_out=held_out,
                with_values=with_values,
            )
        return replace(rollout, truncated=torch.tensor(truncated), lag=lag)

    def score(
        self,
        prompts: Sequence[Prompt],
        texts: list[str],
        generation: Generation,
        row_ids: Sequence[int],
        step: int,
        held_out: bool = False,
        with_values: bool = True,
        with_logprobs: bool = True,
    ) -> Rollout:
        """Log-probs, values and rewards of responses; arguments as of the call.

        texts           the prompts as the policy read them
        with_logprobs   False, for held-out responses whose rewards alone matter: no pass of policy
                        and reference, hence no log-probs, no entropy and no values of a head
        """
        assert with_logprobs or (held_out and not with_values)
        sequences = Sequences.of(generation)
        requested = frozenset() if held_out else self.requested_extras
        with_head = self.config.has_head and with_values
        extras = {"entropy", *requested, *(("values",) if with_head else ())}
        outputs: dict[str, Tensor] = {}
        if with_logprobs:
            outputs = self._logprobs(self.policy, sequences, extras)
        values = outputs if with_head else {}
        if self.critic is not None and with_values:
            values = self._values(self.critic, sequences)
        reference: dict[str, Tensor] = {}
        if self.reference is not None and with_logprobs:
            reference = self._logprobs(self.reference, sequences)
        responses = ResponseBatch(
            token_ids=generation.response_ids,
            response_mask=generation.response_mask,
            logprobs=outputs.get("logprobs"),
            ref_logprobs=reference.get("logprobs"),
            entropy=outputs.get("entropy"),
            row_ids=torch.tensor(row_ids),
            step=step,
            seed=self.config.seed,
            tokenizer=self.tokenizer,
            continues=[has_text(ids, self.tokenizer) for ids in generation.prompts],
            eos_ids=self.distributed.unwrap(self.policy).eos_ids,
            skip_special_tokens=self.config.rollout.skip_special_tokens,
        )
        rewards, scores, task_rewards = self._reward(prompts, generation, responses, held_out)
        return Rollout(
            prompt_texts=texts,
            generation=generation,
            sequences=sequences,
            responses=responses,
            values=values.get("values"),
            last_values=values.get("last_values"),
            rewards=rewards,
            scores=scores,
            task_rewards=task_rewards,
            truncated=torch.zeros(len(prompts), dtype=torch.bool),
            extras={name: outputs[name] for name in requested},
        )

    def _request(
        self, prompts: Sequence[Prompt], texts: list[str], row_ids: Sequence[int], step: int
    ) -> tuple[Request, Sequence[bool]]:
        """What the engine is asked for, and which prompts were truncated."""
        ids, truncated = encode(
            texts,
            self.tokenizer,
            self.config.rollout.max_prompt_length,
            special=[p.messages is None for p in prompts],
        )
        seeds = [row_seed(self.config.seed, step, row_id) for row_id in row_ids]
        return Request(step, ids, seeds, row_ids), truncated

    def _upcoming(self, step: int) -> Request | None:
        """This rank's request of an update, before its time; None after the last one."""
        config, ranks = self.config, self.distributed
        if self.stream is None or step >= config.steps:
            return None
        batch = self.stream.batch(step, config.rollout.batch_size)
        copies = config.rollout.responses_per_prompt
        prompts, row_ids = rank_share(batch, copies, ranks.rank, ranks.world_size)
        texts = [render(prompt, self.tokenizer) for prompt in prompts]
        return self._request(prompts, texts, row_ids, step)[0]

    def _sample(self, request: Request, held_out: bool) -> tuple[Generation, int | None]:
        """Responses and their lag, see `Rollout`. Raises UserError without log-probs needed."""
        settings, lag = self.config.rollout, None
        if self.ahead is None or held_out:
            generation = self.engine.generate(request.ids, request.seeds, settings)
            self.engine.sleep()
        else:
            generation, lag = self.ahead(request)
        if settings.needs_sampling_logprobs and generation.logprobs is None and not held_out:
            raise UserError(
                f"rollout.engine: {engine_name(self.engine)} does not tell the "
                "log-probabilities that it samples with, which rollout.importance and "
                "rollout.old_logprobs=engine need"
            )
        return generation, lag

    def _reward(
        self,
        prompts: Sequence[Prompt],
        generation: Generation,
        responses: ResponseBatch,
        held_out: bool,
    ) -> tuple[RewardResult, Tensor, Tensor]:
        """Rewards of responses: `(results, scores [B], task rewards [B,T])`, see `Rollout`."""
        raw = [p.text for p in prompts]  # rewards read prompts without the chat template
        reward = partial(self.reward, raw, responses.texts, reward_columns(prompts))
        blocks = held_out or self.distributed.needs_peers  # to gather a reward model's weights
        results = self.distributed.fail_together(reward, blocks_on_peers=blocks)
        scores = torch.tensor(results.scores, dtype=torch.float32)
        inside = torch.zeros(responses.response_mask.shape)
        if any(results.spans):
            inside = place_spans(results.spans, responses.offsets, inside.shape)
        all_reduce = (lambda x: x) if held_out else self.distributed.all_reduce
        task_rewards = score_to_rewards(scores, generation, self.config.reward, all_reduce)
        task_rewards = task_rewards + inside.to(self.distributed.device)
        return results, scores + inside.sum(1), task_rewards

    def _logprobs(
        self, policy: nn.Module, sequences: Sequences, extras: Collection[str] = ()
    ) -> dict[str, Tensor]:
        """Log-probabilities under a policy as `logprobs`, and the requested extras."""

        def one_pass(model: nn.Module, part: Sequences) -> dict[str, Tensor]:
            settings = self.config.logprob_settings
            output: PolicyOutput = forward(model, part, extras=extras, **settings)
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
        with in_use(model):
            for index in passes:
                part = sequences.select(index)
                with self.distributed.autocast():
                    results = one_pass(model, part)
                missing = T - part.response_mask.shape[1]
                parts.append({name: _widen(x, missing) for name, x in results.items()})
        in_order = torch.cat(passes).argsort()
        return {name: torch.cat([part[name] for part in parts])[in_order] for name in parts[0]}

    def _passes(self, attention_mask: Tensor) -> list[Tensor]:
        """Micro-batches of the log-prob pass: those of training, for the same rounding."""
        config = self.config
        size = config.rollout.micro_batch_size or config.optimizer.micro_batch_size
        parts = minibatches(
            len(attention_mask), config.rollout.responses_per_prompt, config.ppo.minibatches
        )
        several_ranks = self.distributed.world_size > 1
        return [
            minibatch[part]
            for minibatch in (part.to(attention_mask.device) for part in parts)
            if len(minibatch)
            for part in micro_batches(attention_mask[minibatch], size, same_count=several_ranks)
        ]


def _widen(x: Tensor, columns: int) -> Tensor:
    """Right-pad [B,t] or [B,t,H] with `columns` zeros along t; leave [B] unchanged."""
    if x.dim() == 1:
        return x
    return torch.nn.functional.pad(x, (*[0, 0] * (x.dim() - 2), 0, columns))
