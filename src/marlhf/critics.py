"""Policy and critic of a run: what the critic starts from, and what it shares with the policy."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from marlhf.adapters import add_adapter, attach, is_adapter_of
from marlhf.config import LoraSettings, ModelSettings, PPOConfig
from marlhf.errors import UserError
from marlhf.gate import check_adapter
from marlhf.loading import (
    Shard,
    admit,
    as_loaded,
    build_policy,
    check_tokenizer,
    enable_checkpointing,
    load_classifier,
    load_classifier_config,
    load_model_config,
)
from marlhf.models import Critic, Policy, hidden_width, trunk_of


def build_models(
    config: PPOConfig,
    tokenizer: Any,
    reward_path: str | None = None,
    model: Any = None,
    critic: Any = None,
    lm_config: Any = None,
    shard: Shard = lambda module, trunk: module,
) -> tuple[Policy, Critic | None]:
    """The policy, and the critic where the estimator has one that is more than the policy's head.

    reward_path   the reward model that `critic.init` may start from
    model         a causal LM to use instead of loading `config.model.path`
    critic        a sequence classifier to use as the critic
    lm_config     the policy's, from `load_model_config`, where the caller has it already
    shard         places the frozen base of adapters over the ranks, as `Distributed.shard`

    Vocabularies and LoRA targets are compared before any weight is read. Raises UserError.
    """
    settings = config.model
    lm_config = model.config if model is not None else lm_config or load_model_config(settings)
    check_tokenizer(tokenizer, lm_config)
    vocabulary = lm_config.get_text_config().vocab_size
    adapter = source = None
    if critic is not None and config.has_head:
        raise UserError("critic.trunk: given 'policy' beside a critic; give only one of them")
    if critic is None and (adapter := critic_adapter(config, reward_path)) is None:
        source = critic_source(config, vocabulary, reward_path)

    longest = config.longest
    policy = build_policy(settings, tokenizer, lm_config, model, shard, longest)
    lm: Any = policy.model
    if not config.has_critic_model:
        policy.head = _zero_head(lm) if config.has_head else None
        return policy, None
    if adapter is not None:
        return policy, classifier_on_shared_base(lm, adapter, "critic")
    if source is not None:
        critic = load_classifier(source, "critic.path")
    elif critic is not None:
        _check_vocabulary("critic", critic.config, vocabulary)
        critic = as_loaded(critic, settings.lora, "critic")
    if critic is not None:
        admit(critic, longest, "critic.path" if source is not None else "critic", samples=False)
        if settings.gradient_checkpointing:
            enable_checkpointing(critic)
        value_model = critic_from_classifier(critic, settings.lora, shard)
    elif settings.lora is not None:
        value_model = critic_on_shared_base(lm, settings.lora)
    else:
        return policy, critic_from_policy(lm)
    if value_model.owner is not None:
        check_adapter(value_model.owner)
    return policy, value_model


def critic_adapter(config: PPOConfig, reward_path: str | None) -> str | None:
    """The folder of the reward model's adapter that the critic starts from, where both are to be
    adapters of the policy's base."""
    path, settings = config.critic.path, config.critic
    if path is None and settings.init != "policy":
        path = reward_path
    if path is None or config.model.lora is None or not config.has_critic_model:
        return None
    return path if is_adapter_of(path, config.model.path) else None


def critic_source(
    config: PPOConfig, vocabulary: int, reward_path: str | None, weights: bool = True
) -> ModelSettings | None:
    """What the critic is loaded from, its vocabulary checked; None for the policy's own trunk.
    Arguments as of `build_models` and `load_model_config`. Raises UserError."""
    settings, path = config.critic, config.critic.path
    if path is None and settings.init != "policy":
        if settings.init == "reward" and reward_path is None:
            raise UserError("critic.init: given 'reward', but reward.models has no reward model")
        path = reward_path if settings.init == "reward" or config.model.lora is None else None
    if path is None or not config.has_critic_model:
        return None
    source = replace(config.model, path=path, revision=None)
    key = "critic.path" if settings.path else "reward.models"
    own_config = load_classifier_config(source, key, weights)
    if settings.path is None and settings.init == "auto":
        return source if own_config.get_text_config().vocab_size == vocabulary else None
    _check_vocabulary(f"{key}: {path!r}", own_config, vocabulary)
    return source


def critic_from_classifier(
    model: Any, lora: LoraSettings | None = None, shard: Shard = lambda module, trunk: module
) -> Critic:
    """A critic that starts as a reward model: V of a prefix is its (centred) score."""
    offset = float(getattr(model.config, "score_offset", 0.0))
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear):
        raise UserError(
            f"critic.path: {type(model).__name__} has no linear `score` head; must be a "
            "decoder-only sequence classifier"
        )
    if lora is None:
        return Critic(trunk_of(model), head, offset)
    head = copy.deepcopy(head).requires_grad_(True)
    adapted = add_adapter(shard(model, trunk_of(model)), lora, "critic", task="SEQ_CLS")
    base = adapted.get_base_model()
    return Critic(trunk_of(base), head, offset, model=adapted, adapter="critic")


def critic_from_policy(model: PreTrainedModel) -> Critic:
    """A critic with a copy of the policy's trunk and a head of zeros."""
    return Critic(copy.deepcopy(trunk_of(model)), _zero_head(model))


def classifier_on_shared_base(model: Any, folder: str, name: str) -> Critic:
    """A saved adapter of a reward model, on the policy's frozen base. Raises UserError."""
    weight = attach(model, folder, name)
    if weight is None:
        raise UserError(f"the adapter {folder!r} has no `score` head: it is not a reward model's")
    head = nn.Linear(weight.shape[1], 1, bias=False)
    head.weight.data.copy_(weight)
    head.to(model.device)
    config = load_model_config(ModelSettings(path=folder), "adapter")
    offset = float(getattr(config, "score_offset", 0.0))
    return Critic(trunk_of(model.get_base_model()), head, offset, model=model, adapter=name)


def critic_on_shared_base(model: Any, lora: LoraSettings) -> Critic:
    """A critic that is one more adapter on the policy's frozen base, and a head of zeros."""
    model = add_adapter(model, lora, "critic")
    base = model.get_base_model()
    return Critic(trunk_of(base), _zero_head(base), model=model, adapter="critic")


def _check_vocabulary(critic: str, config: Any, vocabulary: int) -> None:
    own = config.get_text_config().vocab_size
    if own != vocabulary:
        fault = f"has a vocabulary of {own} tokens, the policy {vocabulary}; they must be the same"
        raise UserError(f"{critic}: the critic {fault}")


def _zero_head(model: Any) -> nn.Linear:
    head = nn.Linear(hidden_width(model), 1, bias=False)
    nn.init.zeros_(head.weight)
    return head
