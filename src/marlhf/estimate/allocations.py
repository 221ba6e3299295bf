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
from marlhf.compat.torch import TorchDispatchMode, on_fakes, tree_leaves
from marlhf.config import EvaluateConfig, PPOConfig, RewardConfig, RolloutSettings, SFTConfig
from marlhf.distributed import (
    QuantizedLinear,
    in_bf16,
    linear_layers,
    matmul_parameters,
    replaced_parameters,
)
from marlhf.estimate.fake_models import (
    REWARD_MODEL,
    SEGMENT_MODEL,
    FakeModels,
    policy_paths,
    reward_specs,
)
from marlhf.estimate.memory_model import (
    BF16,
    FP32,
    Interval,
    RunSizes,
    SamplingBytes,
    Training,
    Weights,
)
from marlhf.estimate.shapes import (
    Batch,
    JobConfig,
    Sampled,
    engine_settings,
    fitted,
    shapes_of,
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
    logits_per_chunk,
    target_logprobs,
    unwrapped,
    use_adapter,
)
from marlhf.models.saving import final_dtype
from marlhf.rewards import build_token_rewards, reward_models, segment_reward_models
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
        out = on_fakes(func, args, kwargs or {})
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
    """Counter of allocations in a job's passes; cached across launch profiles.

    config          with lengths that the model admits
    device_memory   bytes of a GPU, of which an engine may reserve a share, and from which the size
                    of chunks of logits follows; None: a CPU
    """

    def __init__(
        self, config: JobConfig, models: FakeModels, device_memory: int | None = None
    ) -> None:
        config = fitted(config, models.positions)
        self.config = config
        self._models, self._memory = models, device_memory
        self._named = models.trained | models.frozen
        self._allocated = [
            tensor
            for model in self._named.values()
            for tensor in (*model.parameters(), *model.buffers())
        ]
        self._weights = _weights(config, models)
        self._unmapped = _unmapped(config, self._weights)
        self._counted: dict[tuple[Any, ...], Any] = {}

    def run(self, ranks: int, sharded: bool = False) -> RunSizes:
        """All passes of one of `ranks` ranks, at maximal lengths.

        sharded   weights are sharded, as under ZeRO-3; then autocast caches no bf16 copies of them
        """
        config = self.config
        shapes = shapes_of(config, self._models.trained, self._models.texts, ranks)
        in_turn = isinstance(config, EvaluateConfig)
        cache = in_turn or not sharded or config.model.precision != "bf16"
        training = {
            name: self._training(name, batches, name in shapes.accumulates, cache)
            for name, batches in shapes.training.items()
        }
        scoring = {
            name: self._once(self._scoring, name, batch, cache)
            for name, batch in shapes.scoring.items()
        }
        sampling = None
        if shapes.sampling is not None:
            sampling = self._once(self._sampling, shapes.sampling, cache)
        elif not isinstance(config, SFTConfig | RewardConfig):
            sampling = self._by_engine(config.rollout)
        saved = 0 if isinstance(config, EvaluateConfig) else _saved(config, self._weights)
        weights, offloaded = self._weights, _offloaded(config, self._weights)
        sizes = weights, training, scoring, sampling, self._unmapped, saved, in_turn, offloaded
        return RunSizes(*sizes)

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
        enabled = self.config.model.precision == "bf16"
        return torch.autocast("cpu", torch.bfloat16, enabled=enabled, cache_enabled=cache)

    def _training(
        self, name: str, batches: Sequence[Batch], accumulates: bool, cache: bool
    ) -> Training:
        passes = [self._once(self._backward, name, batch, cache) for batch in batches]
        largest = max(passes, key=lambda intervals: max(interval.peak for interval in intervals))
        return Training(largest, accumulates)

    def _backward(self, name: str, batch: Batch, cache: bool) -> tuple[Interval, ...]:
        model = self._models.trained[name]
        model.train()

        def loss() -> Tensor:
            with self._autocast(cache):
                outputs = _forward(
                    model, batch, _temperature(self.config), device_memory=self._memory
                )
                return torch.stack([output.sum() for output in outputs]).sum()

        trained = trainable_parameters(model, _adapter(self.config, name))
        return backward_intervals(trained, self._allocated, loss)

    def _scoring(self, name: str, batch: Batch, cache: bool) -> int:
        model = self._named[name]
        is_decoder = isinstance(model, Policy | Critic) or hasattr(unwrapped(model), "score")
        extras = () if isinstance(self.config, SFTConfig | EvaluateConfig) else ("entropy",)
        in_fp32 = not is_decoder or name.startswith(SEGMENT_MODEL)
        autocast = nullcontext() if in_fp32 else self._autocast(cache)
        with torch.no_grad(), LiveBytes(self._allocated) as count, autocast:
            _forward(model, batch, _temperature(self.config), extras, self._memory)
        return count.peak

    def _sampling(self, sampled: Sampled, cache: bool) -> SamplingBytes:
        """Bytes of the prefill, and of the last decoding step of the longest responses.

        Where autocast must not cache copies, weights are rounded as by `Distributed.gathered`.
        """
        policy, config = self._models.policy, self.config
        assert isinstance(config, PPOConfig | EvaluateConfig)
        lm = unwrapped(policy.model).eval()
        lora = policy.adapter is not None
        base = {p for p in lm.parameters() if not (lora and p.requires_grad)}
        linear = [] if cache else linear_layers(lm)
        weights = (p for layer in linear for p in layer.parameters(recurse=False) if p in base)
        rounded = {p: in_bf16(p) for p in weights if p.is_floating_point()}

        responses = sampled.sequences
        counting = partial(self._counting, cache, list(rounded.values()))
        with use_adapter(policy.model, policy.adapter), replaced_parameters(linear, rounded):
            gathered = sum(p.nbytes for p in lm.parameters() if p in base.union(rounded.values()))
            with counting() as first:
                Decoder(lm, *_tokens(responses, sampled.prompt))
            with counting() as last:
                decoder = Decoder(lm, *_tokens(responses, sampled.prompt + sampled.response - 1))
                cache_bytes = decoder.cache_bytes
                last.peak = last.live
                # stop strings read token ids alone, and EOS ids have no size to speak of
                settings = replace(config.rollout, stop_strings=[])
                sampler = Sampler(range(responses), [], settings, None)
                last_tokens = torch.zeros(responses, dtype=torch.int64)
                sampler(decoder.step(last_tokens), range(responses), 0)
        return SamplingBytes(cache_bytes, max(first.peak, last.peak) - cache_bytes, gathered)

    def _by_engine(self, rollout: RolloutSettings) -> SamplingBytes:
        """What an engine that is not ours takes of this rank's device and host.

        vLLM in this process reserves a share of the device; asleep, it keeps its weights on the
        host. Servers, and engines of the user, are not counted. Weights go over one at a time.
        """
        name, engine = engine_settings(rollout)
        policy = self._weights["policy"]
        largest = FP32 * policy.largest
        if name != "vllm" or engine.address is not None:
            return SamplingBytes(0, 0, largest)
        is_auto = engine.dtype == "auto" and self.config.model.precision != "bf16"
        is_fp32 = engine.dtype == "float32" or is_auto
        reserved = round(engine.memory_fraction * (self._memory or 0))
        return SamplingBytes(0, reserved, largest, (FP32 if is_fp32 else BF16) * policy.used)


def _adapter(config: JobConfig, name: str) -> str | None:
    """The adapter that is trained in a model, where it may hold others."""
    return name if isinstance(config, PPOConfig) and config.model.lora else None


def _temperature(config: JobConfig) -> float:
    has_rollout = isinstance(config, PPOConfig | EvaluateConfig)
    return config.rollout.temperature if has_rollout else 1.0


def _tokens(sequences: int, length: int) -> tuple[Tensor, Tensor]:
    return (
        torch.zeros(sequences, length, dtype=torch.int64),
        torch.ones(sequences, length, dtype=torch.bool),
    )


def _forward(
    model: Any,
    batch: Batch,
    temperature: float,
    extras: Collection[str] = (),
    device_memory: int | None = None,
) -> list[Tensor]:
    """Log-probabilities, values or scores of a batch, unmasked; in chunks as on that device.

    The outputs of `Policy.forward` [sequences*scored] and of its head, if it has one,
    [sequences,scored+1]; those of `Critic.forward`; or a classifier's scores [sequences].
    """
    sequences, length, T = batch
    ids, mask = _tokens(sequences, length)
    if isinstance(model, Critic) and T:
        return list(model(ids, mask, mask[:, -T:]))
    if not isinstance(model, Policy):
        return [sequence_scores(unwrapped(model), ids, mask)]
    lm = unwrapped(model.model)
    with use_adapter(model.model, model.adapter):
        hidden = backbone_forward(backbone_of(lm), ids, mask)
        # `Policy.forward` picks these by the mask, which fake tensors cannot do
        before, targets = hidden[:, -T - 1 : -1].flatten(0, 1), ids[:, -T:].flatten()
        values = [] if model.head is None else [head_states(model.head, hidden[:, -T - 1 :])]
        settings = {"temperature": temperature, "extras": extras}
        per_chunk = logits_per_chunk(device_memory)
        return [target_logprobs(lm, before, targets, **settings, per_chunk=per_chunk)[0], *values]


def _has_reference(config: JobConfig) -> bool:
    if not isinstance(config, PPOConfig) or config.model.lora:
        return False  # with adapters it is the base
    required = segmenter_requires(build_segmenter(config.segmenter))
    return reads_reference(config.kl, required | build_token_rewards(config.reward.tokens).requires)


def _unmapped(config: JobConfig, weights: Mapping[str, Weights]) -> int:
    """fp32 bytes of the largest model that is not read as it lies in files.

    These are models in GGUF, and reward models whose adapters are merged into another base.
    """
    sizes = [0]
    paths = [config.model.path] if not isinstance(config, EvaluateConfig) else policy_paths(config)
    if any("gguf_file" in loading.model_source(path, "model.path") for path in paths):
        sizes.append(next(iter(weights.values())).used)
    rewards = reward_specs(config)
    specs = [*reward_models(rewards), *segment_reward_models(rewards)]
    prefixes = (REWARD_MODEL, SEGMENT_MODEL)
    models = [model for name, model in weights.items() if name.startswith(prefixes)]
    for spec, model in zip(specs, models, strict=True):
        # one on the policy's base has no weights of its own but the adapter's
        if saved_adapter(spec["path"]) is not None and model.frozen == model.used:
            sizes.append(model.used)
    return FP32 * max(sizes)


def _offloaded(config: JobConfig, weights: Mapping[str, Weights]) -> frozenset[str]:
    """What is on the host but in its phase, as `RunSizes` names it."""
    if not isinstance(config, PPOConfig):
        return frozenset()
    names = {name for name in ("reference", "optimizer") if name in config.offload}
    if "reward" in config.offload:  # one on the policy's base has but its adapter, and stays
        rewards = {n: model for n, model in weights.items() if n.startswith(REWARD_MODEL)}
        names |= {name for name, model in rewards.items() if model.frozen == model.used}
    return frozenset(names)


def _saved(config: PPOConfig | SFTConfig | RewardConfig, weights: Mapping[str, Weights]) -> int:
    """Host bytes for writing `final/`: in its dtype, or in fp32 where adapters are merged."""
    model_config = loading.load_model_config(config.model, weights=False)
    size = FP32 if config.model.lora else final_dtype(config.model, model_config).itemsize
    return size * next(iter(weights.values())).used


def _weights(config: JobConfig, models: FakeModels) -> dict[str, Weights]:
    """Sizes of all models; parameters shared by two are counted at the first."""
    counted: set[int] = set()
    adapters = not isinstance(config, EvaluateConfig) and config.model.lora is not None

    def size(module: nn.Module, adapter: str | None, trains: bool) -> Weights:
        parameters = {id(p): p for p in module.parameters()}
        trained = trainable_parameters(module, adapter) if trains else []
        trained_ids = {id(p) for p in trained}
        base = {i: p for i, p in parameters.items() if i not in trained_ids and not p.requires_grad}
        own = base.keys() - counted
        layers = {id(m.weight): m for m in module.modules() if isinstance(m, QuantizedLinear)}
        sizes = {i: layers[i].size if i in layers else p.numel() for i, p in parameters.items()}
        counted.update(base)
        read = base if adapters and trains else parameters
        in_memory = [sizes[i] // 8 if i in layers else sizes[i] for i in read]
        return Weights(
            frozen=sum(sizes[i] for i in own),
            trained=sum(p.numel() for p in trained),
            used=sum(in_memory),
            largest=max(sizes[i] for i in read),
            adapters=adapters and trains,
            halves=sum(sizes[i] for i in own if base[i].dtype == torch.bfloat16),
            quantized=sum(sizes[i] for i in own if i in layers),
            scales=sum(b.nbytes for i in own if i in layers for b in layers[i].buffers()),
        )

    sizes = {}
    for name, model in models.trained.items():
        sizes[name] = size(model, _adapter(config, name), trains=True)
        if name == "policy" and _has_reference(config):
            copied = sizes[name]
            is_bf16 = config.model.precision == "bf16"
            halves = sum(p.numel() for p in matmul_parameters(model.model)) if is_bf16 else 0
            sizes["reference"] = Weights(
                copied.trained, 0, copied.used, copied.largest, halves=halves
            )
    for name, model in models.frozen.items():
        unsharded = name.startswith(SEGMENT_MODEL)
        sizes[name] = replace(size(model, None, trains=False), unsharded=unsharded)
    return sizes
