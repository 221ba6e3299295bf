"""Policy and critic of a run: initialisation of the critic, and sharing of weights."""

from __future__ import annotations

import copy
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from marlhf.common.errors import UserError, one_line
from marlhf.config import LoraSettings, ModelSettings, PPOConfig
from marlhf.models.adapters import add_adapter, attach, is_adapter_of
from marlhf.models.gate import check_adapter
from marlhf.models.loading import (
    Shard,
    admit,
    as_loaded,
    build_policy,
    check_tokenizer,
    enable_checkpointing,
    load_classifier,
    load_classifier_config,
    load_model_config,
    load_tokenizer,
    position_limit,
)
from marlhf.models.policy import Critic, Policy, backbone_of, hidden_width


def build_models(
    config: PPOConfig,
    tokenizer: Any,
    start: CriticStart | None = None,
    model: Any = None,
    critic: Any = None,
    lm_config: Any = None,
    shard: Shard = lambda module, backbone: module,
) -> tuple[Policy, Critic | None]:
    """Build the policy, and the critic unless it is a head on the policy or unused.

    start       from `critic_start`, needed if the critic may start from a reward model
    model       a causal LM to use instead of loading `config.model.path`
    critic      a sequence classifier to use as the critic
    lm_config   the policy's, from `load_model_config`, if already loaded
    shard       places the frozen base of adapters on the ranks, as `Distributed.shard`

    Vocabularies and LoRA targets are compared before any weight is read. Raises UserError.
    """
    settings = config.model
    lm_config = model.config if model is not None else lm_config or load_model_config(settings)
    check_tokenizer(tokenizer, lm_config)
    vocabulary = lm_config.get_text_config().vocab_size
    if critic is not None and config.has_head:
        raise UserError("critic.backbone: given 'policy' beside a critic; give only one of them")
    start = start or (CriticStart() if critic else critic_start(config, lm_config, tokenizer))

    longest = config.longest
    policy = build_policy(settings, tokenizer, lm_config, model, shard, longest)
    lm: Any = policy.model
    if not config.has_critic_model:
        policy.head = _zero_head(lm) if config.has_head else None
        return policy, None
    if critic is None and start.adapter is not None:
        return policy, classifier_on_shared_base(lm, start.adapter, "critic")
    if critic is None and start.source is not None:
        critic = load_classifier(start.source, "critic.path")
    elif critic is not None:
        _check_vocabulary("critic", critic.config, vocabulary)
        critic = as_loaded(critic, settings.lora, "critic")
    if critic is not None:
        admit(
            critic, longest, "critic.path" if start.source is not None else "critic", samples=False
        )
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


@dataclass(frozen=True)
class CriticStart:
    """Initialisation of the critic; with neither adapter nor source, the policy's backbone.

    adapter   the folder of a reward model's adapter, to add to the policy's base
    source    a sequence classifier to load
    line      message with the choice and its reason, where `critic.init` is auto
    """

    adapter: str | None = None
    source: ModelSettings | None = None
    line: str | None = None


def critic_start(
    config: PPOConfig,
    lm_config: Any,
    tokenizer: Any = None,
    reward_path: str | None = None,
    weights: bool = True,
    critic: Any = None,
) -> CriticStart:
    """Choose the critic's initialisation, from configurations and tokenizers alone.

    lm_config, tokenizer   the policy's; without a tokenizer only vocabulary sizes are compared
    reward_path            the first reward model, if there is one
    weights                as for `load_model_config`
    critic                 a model to start from; overrides the configuration

    Raises UserError where `critic.path` or `critic.init: reward` cannot be satisfied.
    """
    settings, lora = config.critic, config.model.lora
    if critic is not None or not config.has_critic_model or settings.init == "policy":
        return CriticStart()
    is_open = settings.path is None and settings.init == "auto"
    path = settings.path or reward_path
    begin = "critic.init: auto: the critic starts from the"
    if path is None:
        if not is_open:
            raise UserError("critic.init: given 'reward', but reward.models has no reward model")
        return CriticStart()  # nothing to choose
    chosen = f"{begin} reward model {path!r}" if is_open else None
    if lora is not None and is_adapter_of(path, config.model.path):
        return CriticStart(adapter=path, line=chosen)
    source = replace(config.model, path=path, revision=None)
    if is_open and lora is not None:
        fault = "is no adapter of the policy's base, but a second model in memory"
    else:
        key = "critic.path" if settings.path else "reward.models"
        own = load_classifier_config(source, key, weights)
        fault = _unfit(own, source, config, lm_config, tokenizer)
    if fault is None:
        return CriticStart(source=source, line=chosen)
    if is_open:
        return CriticStart(line=f"{begin} policy, as the reward model {path!r} {fault}")
    given = (
        f"critic.path: {path!r}" if settings.path else f"critic.init: given 'reward', but {path!r}"
    )
    raise UserError(f"{given} {fault}; critic.init=policy starts the critic from the policy")


def _unfit(
    own: Any, source: ModelSettings, config: PPOConfig, lm_config: Any, tokenizer: Any
) -> str | None:
    """Reason why this policy's critic cannot start from a sequence classifier, or None."""
    rollout, vocabulary = config.rollout, lm_config.get_text_config().vocab_size
    if fault := _other_tokens(own, source, vocabulary, tokenizer):
        return fault
    wanted = rollout.max_prompt_length + rollout.max_new_tokens
    wanted = min(wanted, position_limit(lm_config) or wanted)
    positions = position_limit(own)
    if positions is not None and positions < wanted:
        return (
            f"has {positions} positions, fewer than the {wanted} of rollout.max_prompt_length and "
            "max_new_tokens together"
        )
    if getattr(own, "quantization_config", None) is not None and config.model.lora is None:
        return "is quantised, and cannot be trained"
    try:
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(
                copy.deepcopy(own), trust_remote_code=source.trust_remote_code
            )
    except Exception as error:  # of a model's own code, too
        return f"is no sequence classifier: {one_line(error)}"
    if not isinstance(getattr(model, "score", None), nn.Linear):
        return f"is a {type(model).__name__}, which has no linear `score` head as decoders have it"
    return None


def _other_tokens(own: Any, source: ModelSettings, vocabulary: int, tokenizer: Any) -> str | None:
    """Mismatch of a classifier's tokens with the policy's, or None; extra tokens are allowed."""
    size = own.get_text_config().vocab_size
    theirs = None
    if tokenizer is not None:
        with suppress(UserError):  # a critic may come without a tokenizer
            theirs = load_tokenizer(source, "critic.path").get_vocab()
    if size < vocabulary or (theirs is None and size != vocabulary):
        return f"has a vocabulary of {size} tokens, the policy {vocabulary}; they must be the same"
    if theirs is None or tokenizer is None:
        return None
    for token, number in tokenizer.get_vocab().items():
        if theirs.get(token) != number:
            return (
                f"has other tokens than the policy: {token!r} is number {theirs.get(token)} there, "
                f"and {number} in the policy"
            )
    return None


def critic_from_classifier(
    model: Any, lora: LoraSettings | None = None, shard: Shard = lambda module, backbone: module
) -> Critic:
    """A critic initialised from a reward model: V of a prefix is its (centred) score."""
    offset = float(getattr(model.config, "score_offset", 0.0))
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear):
        raise UserError(
            f"critic.path: {type(model).__name__} has no linear `score` head; must be a "
            "decoder-only sequence classifier"
        )
    if lora is None:
        return Critic(backbone_of(model), head, offset)
    head = copy.deepcopy(head).requires_grad_(True)
    adapted = add_adapter(shard(model, backbone_of(model)), lora, "critic", task="SEQ_CLS")
    base = adapted.get_base_model()
    return Critic(backbone_of(base), head, offset, model=adapted, adapter="critic")


def critic_from_policy(model: PreTrainedModel) -> Critic:
    """A critic with a copy of the policy's backbone and a zero head."""
    return Critic(copy.deepcopy(backbone_of(model)), _zero_head(model))


def classifier_on_shared_base(model: Any, folder: str, name: str) -> Critic:
    """A reward model from its saved adapter, on the policy's frozen base. Raises UserError."""
    weight = attach(model, folder, name)
    if weight is None:
        raise UserError(f"the adapter {folder!r} has no `score` head: it is not a reward model's")
    head = nn.Linear(weight.shape[1], 1, bias=False)
    head.weight.data.copy_(weight)
    head.to(model.device)
    config = load_model_config(ModelSettings(path=folder), "adapter")
    offset = float(getattr(config, "score_offset", 0.0))
    return Critic(backbone_of(model.get_base_model()), head, offset, model=model, adapter=name)


def critic_on_shared_base(model: Any, lora: LoraSettings) -> Critic:
    """A critic as a further adapter on the policy's frozen base, with a zero head."""
    model = add_adapter(model, lora, "critic")
    base = model.get_base_model()
    return Critic(backbone_of(base), _zero_head(base), model=model, adapter="critic")


def _check_vocabulary(critic: str, config: Any, vocabulary: int) -> None:
    own = config.get_text_config().vocab_size
    if own != vocabulary:
        fault = f"has a vocabulary of {own} tokens, the policy {vocabulary}; they must be the same"
        raise UserError(f"{critic}: the critic {fault}")


def _zero_head(model: Any) -> nn.Linear:
    head = nn.Linear(hidden_width(model), 1, bias=False)
    nn.init.zeros_(head.weight)
    return head
