"""Count the bytes that passes of a model allocate, without its weights.

Our own passes run on fake tensors, which have shapes and no data, and each storage they create is
counted while it lives. So the count holds for any model family, with adapters, gradient
checkpointing and autocast as configured, and takes seconds for a model of any size.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from marlhf.algorithm.kl import reads_reference
from marlhf.common.registry import split_spec
from marlhf.compat.torch import TorchDispatchMode, tree_leaves
from marlhf.config import PPOConfig
from marlhf.distributed import in_bf16, linear_layers, matmul_parameters, replaced_parameters
from marlhf.estimate.fake_models import FakeModels
from marlhf.estimate.memory_model import (
    FP32,
    Interval,
    RunSizes,
    SamplingBytes,
    Training,
    Weights,
)
from marlhf.models import loading
from marlhf.models.adapters import saved_adapter, trainable_parameters
from marlhf.models.decoding import Decoder
from marlhf.models.policy import (
    Critic,
    Policy,
    backbone_forward,
    backbone_of,
    head_states,
    target_logprobs,
    unwrapped,
    use_adapter,
)
from marlhf.rewards import build_token_rewards, reward_models
from marlhf.rewards.learned import sequence_scores
from marlhf.rollout.transformers_engine import Sampler
from marlhf.segmenters import build_segmenter, segmenter_requires


class LiveBytes(TorchDispatchMode):
    """Counter of the bytes of storages created within, for as long as they live.

    allocated   tensors allocated before; views of them are not counted
    """

    def __init__(self, allocated: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen = weakref.WeakSet(tensor.untyped_storage() for tensor in allocated)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        if storage in self._seen:
            return
        size = storage.nbytes()
        self._seen.add(storage)
        weakref.finalize(storage, self._forget, size)
        self.live += size
        self.peak = max(self.peak, self.live)

    def _forget(self, size: int) -> None:
        self.live -= size


def backward_intervals(
    parameters: Iterable[nn.Parameter], allocated: Iterable[Tensor], loss: Callable[[], Tensor]
) -> tuple[Interval, ...]:
    """Allocations of a forward and backward pass beyond `allocated`, one `Interval` per gradient.

    Each gradient is freed once it is complete.
    """
    intervals: list[Interval] = []

    def complete(parameter: Tensor) -> None:
        assert parameter.grad is not None
        intervals.append(Interval(count.peak, count.live, parameter.grad.nbytes))
        parameter.grad = None
        count.peak = count.live

    hooks = [p.register_post_accumulate_grad_hook(complete) for p in parameters if p.requires_grad]
    with LiveBytes(allocated) as count:
        loss().backward()
    for hook in hooks:
        hook.remove()
    return tuple(intervals)


class PassCounter:
    """Counter of allocations in a run's passes; cached across launch profiles."""

    def __init__(self, config: PPOConfig, models: FakeModels) -> None:
        self._config, self._models = config, models
        self._trainees: dict[str, Policy | Critic] = {"policy": models.policy}
        if models.critic is not None:
            self._trainees["critic"] = models.critic
        frozen = [model for model, _ in models.rewards.values()]
        self._allocated = [
            tensor
            for model in (*self._trainees.values(), *frozen)
            for tensor in (*model.parameters(), *model.buffers())
        ]
        self._weights = _weights(config, models)
        self._unmapped = _unmapped(config, self._weights)
        self._counted: dict[tuple[Any, ...], Any] = {}

    def run(self, ranks: int, sharded: bool = False) -> RunSizes:
        """All passes of one of `ranks` ranks, at maximal prompt and response lengths.

        sharded   weights are sharded, as under ZeRO-3; then autocast caches no bf16 copies of them
        """
        responses = _responses(self._config, ranks)
        cache = not sharded or self._config.model.precision == "fp32"
        training = {name: self._training(name, ranks, cache) for name in self._trainees}
        limit = self._config.rollout.micro_batch_size or self._config.optimizer.micro_batch_size
        scoring = {
            name: self._once(self._scoring, name, min(limit, responses), cache)
            for name in self._trainees
        } | {
            name: self._once(self._reward, name, min(batch, responses), cache)
            for name, (_, batch) in self._models.rewards.items()
        }
        sampling = self._once(self._sampling, _sampled_at_once(self._config, responses), cache)
        return RunSizes(self._weights, training, scoring, sampling, self._unmapped)

    def _once(self, count: Callable[..., Any], *arguments: Any) -> Any:
        key = (count.__name__, *arguments)
        if key not in self._counted:
            with self._models.mode:
                self._counted[key] = count(*arguments)
        return self._counted[key]

    @contextmanager
    def _counting(self, cache: bool, rounded: Sequence[Tensor] = ()) -> Iterator[LiveBytes]:
        allocated = [*self._allocated, *rounded]
        with torch.no_grad(), LiveBytes(allocated) as count, self._autocast(cache):
            yield count

    def _autocast(self, cache: bool) -> Any:
        enabled = self._config.model.precision == "bf16"
        return torch.autocast("cpu", torch.bfloat16, enabled=enabled, cache_enabled=cache)

    def _training(self, name: str, ranks: int, cache: bool) -> Training:
        config, limit = self._config, self._config.optimizer.micro_batch_size
        responses = max(1, _responses(config, ranks) // config.ppo.minibatches)
        # sequences, tokens per sequence, and tokens per sequence that have a loss
        shapes = [(min(limit, responses), _length(config), config.rollout.max_new_tokens)]
        if name == "policy" and config.ptx is not None:
            texts = max(1, config.ptx.batch_size // ranks)
            shapes.append((min(limit, texts), config.ptx.max_length, config.ptx.max_length - 1))
        passes = [self._once(self._backward, name, shape, cache) for shape in shapes]
        largest = max(passes, key=lambda intervals: max(interval.peak for interval in intervals))
        return Training(largest, responses > limit or len(shapes) > 1)

    def _backward(
        self, name: str, shape: tuple[int, int, int], cache: bool
    ) -> tuple[Interval, ...]:
        model = self._trainees[name]
        model.train()

        def loss() -> Tensor:
            with self._autocast(cache):
                outputs = _forward(model, self._config, *shape)
                return torch.stack([output.sum() for output in outputs]).sum()

        trained = trainable_parameters(model, name if self._config.model.lora else None)
        return backward_intervals(trained, self._allocated, loss)

    def _scoring(self, name: str, responses: int, cache: bool) -> int:
        config = self._config
        with self._counting(cache) as count:
            T = config.rollout.max_new_tokens
            _forward(self._trainees[name], config, responses, _length(config), T, ("entropy",))
        return count.peak

    def _reward(self, name: str, responses: int, cache: bool) -> int:
        model, _ = self._models.rewards[name]
        is_decoder = isinstance(model, Critic) or hasattr(model, "score")
        autocast = self._autocast(cache) if is_decoder else nullcontext()
        with torch.no_grad(), LiveBytes(self._allocated) as count, autocast:
            sequence_scores(model, *_tokens(responses, _length(self._config)))
        return count.peak

    def _sampling(self, responses: int, cache: bool) -> SamplingBytes:
        """Bytes of the prefill, and of the last decoding step of the longest responses.

        Where autocast must not cache copies, weights are rounded as by `Distributed.gathered`.
        """
        policy, config = self._models.policy, self._config
        lm = unwrapped(policy.model).eval()
        base = {p for p in lm.parameters() if not (config.model.lora and p.requires_grad)}
        linear = [] if cache else linear_layers(lm)
        weights = (p for layer in linear for p in layer.parameters(recurse=False) if p in base)
        rounded = {p: in_bf16(p) for p in weights}

        counting = partial(self._counting, cache, list(rounded.values()))
        with use_adapter(policy.model, policy.adapter), replaced_parameters(linear, rounded):
            gathered = sum(p.nbytes for p in lm.parameters() if p in base.union(rounded.values()))
            with counting() as first:
                Decoder(lm, *_tokens(responses, config.rollout.max_prompt_length))
            with counting() as last:
                decoder = Decoder(lm, *_tokens(responses, _length(config) - 1))
                cache_bytes = decoder.cache_bytes
                last.peak = last.live
                # stop strings read token ids alone, and EOS ids have no size to speak of
                settings = replace(config.rollout, stop_strings=[])
                sampler = Sampler(range(responses), [], settings, None)
                last_tokens = torch.zeros(responses, dtype=torch.int64)
                sampler(decoder.step(last_tokens), range(responses), 0)
        return SamplingBytes(cache_bytes, max(first.peak, last.peak) - cache_bytes, gathered)


def _responses(config: PPOConfig, ranks: int) -> int:
    """Responses per update on one rank."""
    responses = config.rollout.batch_size * config.rollout.responses_per_prompt
    return max(1, -(-responses // ranks))


def _sampled_at_once(config: PPOConfig, responses: int) -> int:
    """Of the responses of a rank, those in one KV cache of the engine `transformers`."""
    _, arguments = split_spec(config.rollout.engine, "engine")
    return min(responses, int(arguments.get("batch_size") or responses))


def _length(config: PPOConfig) -> int:
    """Tokens of the longest prompt plus the longest response."""
    return config.rollout.longest


def _tokens(sequences: int, length: int) -> tuple[Tensor, Tensor]:
    return (
        torch.zeros(sequences, length, dtype=torch.int64),
        torch.ones(sequences, length, dtype=torch.bool),
    )


def _forward(
    model: Policy | Critic,
    config: PPOConfig,
    sequences: int,
    length: int,
    T: int,
    extras: Collection[str] = (),
) -> list[Tensor]:
    """Log-probabilities and values of the last T tokens, unmasked.

    The outputs of `Policy.forward` [sequences*T] and of its head, if it has one, [sequences,T+1];
    or those of `Critic.forward`.
    """
    ids, mask = _tokens(sequences, length)
    if isinstance(model, Critic):
        return list(model(ids, mask, mask[:, -T:]))
    lm = unwrapped(model.model)
    with use_adapter(model.model, model.adapter):
        hidden = backbone_forward(backbone_of(lm), ids, mask)
        # `Policy.forward` picks these by the mask, which fake tensors cannot do
        before, targets = hidden[:, -T - 1 : -1].flatten(0, 1), ids[:, -T:].flatten()
        temperature = config.logprob_settings["temperature"]
        values = [] if model.head is None else [head_states(model.head, hidden[:, -T - 1 :])]
        return [target_logprobs(lm, before, targets, temperature, extras)[0], *values]


def _has_reference(config: PPOConfig) -> bool:
    required = segmenter_requires(build_segmenter(config.segmenter))
    return reads_reference(config.kl, required | build_token_rewards(config.reward.tokens).requires)


def _unmapped(config: PPOConfig, weights: Mapping[str, Weights]) -> int:
    """fp32 bytes of the largest model that is not read as it lies in files.

    These are models in GGUF, and reward models whose adapters are merged into another base.
    """
    sizes = [0]
    if "gguf_file" in loading.model_source(config.model.path, "model.path"):
        sizes.append(weights["policy"].used)
    specs = reward_models(config.reward.models)
    rewards = [model for name, model in weights.items() if name.startswith("reward model")]
    for spec, model in zip(specs, rewards, strict=True):
        # one on the policy's base has no weights of its own but the adapter's
        if saved_adapter(spec["path"]) is not None and model.frozen == model.used:
            sizes.append(model.used)
    return FP32 * max(sizes)


def _weights(config: PPOConfig, models: FakeModels) -> dict[str, Weights]:
    """Sizes of all models; parameters shared by two are counted at the first."""
    policy, critic = models.policy, models.critic
    counted: set[int] = set()
    adapters = config.model.lora is not None

    def size(module: nn.Module, adapter: str | None, trains: bool = True) -> Weights:
        parameters = {id(p): p for p in module.parameters()}
        trained = trainable_parameters(module, adapter) if trains else []
        trained_ids = {id(p) for p in trained}
        base = {i: p for i, p in parameters.items() if i not in trained_ids and not p.requires_grad}
        own = base.keys() - counted
        frozen = sum(base[i].numel() for i in own)
        halves = sum(base[i].numel() for i in own if base[i].dtype == torch.bfloat16)
        counted.update(base)
        read = base if adapters and trains else parameters
        return Weights(
            frozen=frozen,
            trained=sum(p.numel() for p in trained),
            used=sum(p.numel() for p in read.values()),
            largest=max(p.numel() for p in read.values()),
            adapters=adapters and trains,
            halves=halves,
        )

    sizes = {"policy": size(policy, "policy" if adapters else None)}
    if not adapters and _has_reference(config):
        copied = sizes["policy"]
        is_bf16 = config.model.precision == "bf16"
        halves = sum(p.numel() for p in matmul_parameters(policy.model)) if is_bf16 else 0
        sizes["reference"] = Weights(copied.trained, 0, copied.used, copied.largest, halves=halves)
    if critic is not None:
        sizes["critic"] = size(critic, "critic" if adapters else None)
    for name, (model, _) in models.rewards.items():
        sizes[name] = size(model, None, trains=False)
    return sizes
