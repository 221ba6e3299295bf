"""Count the bytes that passes of a model allocate, without its weights.

Our own passes run on fake tensors, which have shapes and no data, and each storage they create is
counted while it lives. So the count holds for any model family, with adapters, gradient
checkpointing and autocast as configured, and takes seconds for a model of any size.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from marlhf.algorithm.kl import reads_reference
from marlhf.common.errors import UserError, one_line
from marlhf.compat.torch import FakeTensorMode, TorchDispatchMode, tree_leaves
from marlhf.config import LoraSettings, ModelSettings, PPOConfig
from marlhf.distributed import in_bf16, linear_layers, reading
from marlhf.estimate.memory_model import Generation, Moment, Run, Training, Weights
from marlhf.models import building, loading
from marlhf.models.adapters import add_adapter, is_adapter_of, saved_adapter, trainable_parameters
from marlhf.models.decoding import KeysAndValues
from marlhf.models.policy import (
    Critic,
    Policy,
    backbone_forward,
    backbone_of,
    target_logprobs,
    use_adapter,
)
from marlhf.rewards import build_token_rewards, reward_models
from marlhf.rewards.learned import sequence_scores
from marlhf.segmenters import build_segmenter, segmenter_requires


class LiveBytes(TorchDispatchMode):
    """Counter of the bytes of storages created within, for as long as they live.

    known   tensors allocated before; views of them are not counted
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

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


def backward_moments(
    parameters: Iterable[nn.Parameter], known: Iterable[Tensor], loss: Callable[[], Tensor]
) -> tuple[Moment, ...]:
    """Allocations of a forward and backward pass beyond `known`, one `Moment` per gradient.

    Each gradient is freed once it is complete.
    """
    moments: list[Moment] = []

    def complete(parameter: Tensor) -> None:
        assert parameter.grad is not None
        moments.append(Moment(count.peak, count.live, parameter.grad.nbytes))
        parameter.grad = None
        count.peak = count.live

    hooks = [p.register_post_accumulate_grad_hook(complete) for p in parameters if p.requires_grad]
    with LiveBytes(known) as count:
        loss().backward()
    for hook in hooks:
        hook.remove()
    return tuple(moments)


_MOST_LAYERS = 500  # no model has more, and each takes a second


@dataclass(frozen=True)
class FakeModels:
    """The models of a run without weights; `rewards` has each model's batch size."""

    policy: Policy
    critic: Critic | None
    rewards: dict[str, tuple[Any, int]]
    mode: FakeTensorMode


def fake_models(config: PPOConfig) -> FakeModels:
    """The models of a run, from their config.json alone. Raises UserError."""
    settings, specs = config.model, reward_models(config.reward.models)
    lm_config = loading.load_model_config(settings, weights=False)
    reward_configs = [
        loading.load_classifier_config(_reward_settings(spec), "reward.models", weights=False)
        for spec in specs
    ]
    for key, found in (("model.path", lm_config), *(("reward.models", c) for c in reward_configs)):
        layers = getattr(found.get_text_config(), "num_hidden_layers", 0)
        if layers > _MOST_LAYERS:
            raise UserError(
                f"{key}: its config.json says {layers} layers; estimate counts them one by one, "
                f"and takes at most {_MOST_LAYERS}"
            )
    first = specs[0]["path"] if specs else None
    with torch.device("meta"):
        policy = Policy(_meta(AutoModelForCausalLM, settings, lm_config, "model.path"))
        critic = _meta_critic(config, policy, first)
        rewards = {}
        for i, (spec, own) in enumerate(zip(specs, reward_configs, strict=True)):
            name = "reward model" if len(specs) == 1 else f"reward model {i + 1}"
            if settings.lora is not None and is_adapter_of(spec["path"], settings.path):
                model = _on_shared_base(policy.model, spec["path"], f"reward_{i}")
                for parameter in trainable_parameters(model, f"reward_{i}"):
                    parameter.requires_grad_(False)
            else:
                own_settings = _reward_settings(spec)
                model = _meta(
                    AutoModelForSequenceClassification, own_settings, own, "reward.models"
                ).requires_grad_(False)
            rewards[name] = model.eval(), spec.get("batch_size", 16)
    models = [policy, critic, *(model for model, _ in rewards.values())]
    mode = _fill([model for model in models if model is not None])
    return FakeModels(policy, critic, rewards, mode)


def _fill(models: Sequence[nn.Module]) -> FakeTensorMode:
    """Replace "meta" tensors by fake CPU tensors; shared tensors stay shared."""
    mode, made = FakeTensorMode(), {}
    for module in (module for model in models for module in model.modules()):
        parameters = module.named_parameters(recurse=False, remove_duplicate=False)
        buffers = module.named_buffers(recurse=False, remove_duplicate=False)
        for name, old in (*parameters, *buffers):
            if not old.is_meta:  # replaced in another model already
                continue
            if old not in made:
                with mode:
                    new = torch.empty(old.shape, dtype=old.dtype)
                trains = isinstance(old, nn.Parameter)
                made[old] = nn.Parameter(new, old.requires_grad) if trains else new
            setattr(module, name, made[old])
    return mode


def _meta_critic(config: PPOConfig, policy: Policy, reward_path: str | None) -> Critic | None:
    """Build the critic, and add the policy's adapter: the critic may share its base."""
    settings = config.model
    lm_config = _causal_lm(policy).config
    start = building.critic_start(config, lm_config, None, reward_path, weights=False)
    adapter, source = start.adapter, start.source
    if settings.gradient_checkpointing:
        loading.enable_checkpointing(policy.model)
    if settings.lora is not None:
        policy.model = add_adapter(policy.model, settings.lora, "policy")
        policy.adapter = "policy"
    if not config.has_critic_model:
        return None
    if adapter is not None:
        return _on_shared_base(policy.model, adapter, "critic")
    if source is not None:
        own = loading.load_classifier_config(source, "critic.path", weights=False)
        model = _meta(AutoModelForSequenceClassification, source, own, "critic.path")
        if settings.gradient_checkpointing:
            loading.enable_checkpointing(model)
        return building.critic_from_classifier(model, settings.lora)
    if settings.lora is not None:
        return building.critic_on_shared_base(policy.model, settings.lora)
    return building.critic_from_policy(_causal_lm(policy))


def _on_shared_base(model: Any, folder: str, name: str) -> Critic:
    """`building.classifier_on_shared_base` from the adapter's configuration alone."""
    saved = saved_adapter(folder)
    assert saved is not None
    targets = saved.target_modules
    targets = targets if isinstance(targets, str) else sorted(targets)
    model = add_adapter(model, LoraSettings(r=saved.r, target_modules=targets), name)
    base: Any = model.get_base_model()
    head = nn.Linear(base.config.get_text_config().hidden_size, 1, bias=False)
    return Critic(backbone_of(base), head, model=model, adapter=name)


def _reward_settings(spec: dict[str, Any]) -> ModelSettings:
    trusted = spec.get("trust_remote_code", False)
    return ModelSettings(path=spec["path"], trust_remote_code=trusted)


def _meta(auto: Any, settings: ModelSettings, config: Any, key: str) -> Any:
    try:
        return auto.from_config(
            copy.deepcopy(config),
            dtype=torch.float32,
            trust_remote_code=settings.trust_remote_code,
        )
    except Exception as error:  # the family has no such model
        raise UserError(f"{key}: {settings.path!r}: {one_line(error)}") from error


class PassCounter:
    """Counter of allocations in a run's passes; cached across launch profiles."""

    def __init__(self, config: PPOConfig, models: FakeModels) -> None:
        self._config, self._models = config, models
        self._trainees: dict[str, Policy | Critic] = {"policy": models.policy}
        if models.critic is not None:
            self._trainees["critic"] = models.critic
        frozen = [model for model, _ in models.rewards.values()]
        self._known = [
            tensor
            for model in (*self._trainees.values(), *frozen)
            for tensor in (*model.parameters(), *model.buffers())
        ]
        self._weights = _weights(config, models)
        self._counted: dict[tuple[Any, ...], Any] = {}

    def run(self, ranks: int, sharded: bool = False) -> Run:
        """All passes of one of `ranks` ranks, at maximal prompt and response lengths.

        sharded   weights are sharded, as under ZeRO-3; then autocast caches no bf16 copies of them
        """
        rows, cache = (
            _rows(self._config, ranks),
            not sharded or self._config.model.precision == "fp32",
        )
        training = {name: self._training(name, ranks, cache) for name in self._trainees}
        limit = self._config.rollout.micro_batch_size or self._config.optimizer.micro_batch_size
        scoring = {
            name: self._once(self._scoring, name, min(limit, rows), cache)
            for name in self._trainees
        } | {
            name: self._once(self._reward, name, min(batch, rows))
            for name, (_, batch) in self._models.rewards.items()
        }
        generation = self._once(self._generation, rows, cache)
        return Run(self._weights, training, scoring, generation)

    def _once(self, count: Callable[..., Any], *arguments: Any) -> Any:
        key = (count.__name__, *arguments)
        if key not in self._counted:
            with self._models.mode:
                self._counted[key] = count(*arguments)
        return self._counted[key]

    @contextmanager
    def _counting(self, cache: bool, beside: Sequence[Tensor] = ()) -> Iterator[LiveBytes]:
        known = [*self._known, *beside]
        with torch.no_grad(), LiveBytes(known) as count, self._autocast(cache):
            yield count

    def _autocast(self, cache: bool) -> Any:
        enabled = self._config.model.precision == "bf16"
        return torch.autocast("cpu", torch.bfloat16, enabled=enabled, cache_enabled=cache)

    def _training(self, name: str, ranks: int, cache: bool) -> Training:
        config, limit = self._config, self._config.optimizer.micro_batch_size
        rows = max(1, _rows(config, ranks) // config.ppo.minibatches)
        # sequences, tokens per sequence, and tokens per sequence that have a loss
        shapes = [(min(limit, rows), _length(config), config.rollout.max_new_tokens)]
        if name == "policy" and config.ptx is not None:
            texts = max(1, config.ptx.batch_size // ranks)
            shapes.append((min(limit, texts), config.ptx.max_length, config.ptx.max_length - 1))
        passes = [self._once(self._backward, name, shape, cache) for shape in shapes]
        largest = max(passes, key=lambda moments: max(moment.peak for moment in moments))
        return Training(largest, rows > limit or len(shapes) > 1)

    def _backward(self, name: str, shape: tuple[int, int, int], cache: bool) -> tuple[Moment, ...]:
        model = self._trainees[name]
        model.train()

        def loss() -> Tensor:
            with self._autocast(cache):
                return _forward(model, self._config, *shape).sum()

        trained = trainable_parameters(model, name if self._config.model.lora else None)
        return backward_moments(trained, self._known, loss)

    def _scoring(self, name: str, rows: int, cache: bool) -> int:
        config = self._config
        with self._counting(cache) as count:
            T = config.rollout.max_new_tokens
            _forward(self._trainees[name], config, rows, _length(config), T, ("entropy",))
        return count.peak

    def _reward(self, name: str, rows: int) -> int:
        with torch.no_grad(), LiveBytes(self._known) as count:
            sequence_scores(self._models.rewards[name][0], *_tokens(rows, _length(self._config)))
        return count.peak

    def _generation(self, rows: int, cache: bool) -> Generation:
        """Bytes of the prefill, and of the last decoding step of the longest responses.

        Weights are as `Distributed.gathered` has them where autocast must not cache copies.
        """
        policy, config = self._models.policy, self._config
        lm = _causal_lm(policy).eval()
        base = {p for p in lm.parameters() if not (config.model.lora and p.requires_grad)}
        linear = [] if cache else linear_layers(lm)
        weights = (p for layer in linear for p in layer.parameters(recurse=False) if p in base)
        rounded = {p: in_bf16(p) for p in weights}

        def read(ids: Tensor, mask: Tensor, past: KeysAndValues) -> Any:
            return lm(
                input_ids=ids,
                attention_mask=mask.long(),
                past_key_values=past,
                use_cache=True,
                logits_to_keep=1,
            )

        counting = partial(self._counting, cache, list(rounded.values()))
        with use_adapter(policy.model, policy.adapter), reading(linear, rounded):
            gathered = sum(p.nbytes for p in lm.parameters() if p in base.union(rounded.values()))
            with counting() as first:
                read(
                    *_tokens(rows, config.rollout.max_prompt_length),
                    KeysAndValues(config=lm.config),
                )
            with counting() as last:
                past: Any = KeysAndValues(config=lm.config)
                read(*_tokens(rows, _length(config) - 1), past)
                kept = sum(x.nbytes for layer in past.layers for x in (layer.keys, layer.values))
                last.peak = last.live
                ids, mask = _tokens(rows, _length(config))
                _sample(read(ids[:, -1:], mask, past).logits, config)
        return Generation(kept, max(first.peak, last.peak) - kept, gathered)


def _rows(config: PPOConfig, ranks: int) -> int:
    """Responses per update on one rank."""
    responses = config.rollout.batch_size * config.rollout.responses_per_prompt
    return max(1, -(-responses // ranks))


def _length(config: PPOConfig) -> int:
    """Tokens of the longest prompt plus the longest response."""
    return config.rollout.longest


def _tokens(rows: int, length: int) -> tuple[Tensor, Tensor]:
    return (
        torch.zeros(rows, length, dtype=torch.int64),
        torch.ones(rows, length, dtype=torch.bool),
    )


def _forward(
    model: Policy | Critic,
    config: PPOConfig,
    rows: int,
    length: int,
    T: int,
    extras: Collection[str] = (),
) -> Tensor:
    """Log-probabilities or values of the last T tokens, none of them masked."""
    ids, mask = _tokens(rows, length)
    if isinstance(model, Critic):
        return model(ids, mask, mask[:, -T:])[0]
    lm = _causal_lm(model)
    with use_adapter(model.model, model.adapter):
        hidden = backbone_forward(backbone_of(lm), ids, mask)
        # `Policy.forward` picks these by the mask, which fake tensors cannot do
        before, targets = hidden[:, -T - 1 : -1].flatten(0, 1), ids[:, -T:].flatten()
        temperature = config.sampled_from["temperature"]
        return target_logprobs(lm, before, targets, temperature, extras)[0]


def _causal_lm(policy: Policy) -> Any:
    model: Any = policy.model
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _sample(logits: Tensor, config: PPOConfig) -> None:
    """Allocate as `generation.generate` does for the logits [B,1,V] of one step."""
    scores = logits[:, -1].to(torch.float32, copy=True)
    scores = scores / config.rollout.temperature
    if config.rollout.top_p < 1:
        ordered, index = scores.sort(-1)
        beyond = ordered.softmax(-1).cumsum(-1) > config.rollout.top_p
        scores = scores.masked_fill(beyond.scatter(1, index, beyond), float("-inf"))
        del ordered, index, beyond
    noise = torch.stack([torch.rand(scores.shape[1], dtype=torch.float64) for _ in scores])
    torch.argmax(scores + noise.log_().neg_().log_().neg_().to(torch.float32), -1)


def _has_reference(config: PPOConfig) -> bool:
    required = segmenter_requires(build_segmenter(config.segmenter))
    return reads_reference(config.kl, required | build_token_rewards(config.reward.tokens).requires)


def _weights(config: PPOConfig, models: FakeModels) -> dict[str, Weights]:
    """Sizes of all models; parameters shared by two are counted at the first."""
    policy, critic = models.policy, models.critic
    counted: set[int] = set()
    adapters = config.model.lora is not None

    def size(module: nn.Module, adapter: str | None, trains: bool = True) -> Weights:
        own = {id(p): p for p in module.parameters()}
        trained = trainable_parameters(module, adapter) if trains else []
        mine = {id(p) for p in trained}
        base = {i: p for i, p in own.items() if i not in mine and not p.requires_grad}
        frozen = sum(p.numel() for i, p in base.items() if i not in counted)
        counted.update(base)
        read = base if adapters and trains else own
        return Weights(
            frozen=frozen,
            trained=sum(p.numel() for p in trained),
            reads=sum(p.numel() for p in read.values()),
            largest=max(p.numel() for p in read.values()),
            adapters=adapters and trains,
        )

    sizes = {"policy": size(policy, "policy" if adapters else None)}
    if not adapters and _has_reference(config):
        whole = sizes["policy"]
        sizes["reference"] = Weights(whole.trained, 0, whole.reads, whole.largest)
    if critic is not None:
        sizes["critic"] = size(critic, "critic" if adapters else None)
    for name, (model, _) in models.rewards.items():
        sizes[name] = size(model, None, trains=False)
    return sizes
