"""Builds policy, reference and critic of a run.

Decides where the critic starts, and which weights are shared.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from marlhf.algorithm.estimators import Estimator, build_estimator, estimator_requires
from marlhf.common.errors import UserError, one_line
from marlhf.common.memory_errors import doing
from marlhf.common.tokenization import Tokenizer
from marlhf.config import LoraSettings, ModelSettings, PPOConfig
from marlhf.distributed import ALONE, Placement
from marlhf.models.adapters import add_adapter, attach, is_adapter_of
from marlhf.models.gate import check_adapter
from marlhf.models.loading import (
    admit,
    as_loaded,
    build_policy,
    check_tokenizer,
    enable_checkpointing,
    fix_positions,
    load_classifier_config,
    load_model_config,
    load_tokenizer,
    position_limit,
    read_causal_lm,
    read_classifier,
)
from marlhf.models.policy import Critic, Policy, backbone_of, hidden_width, score_offset


class Models(NamedTuple):
    """The models that PPO works with, but for reward models."""

    policy: Policy
    critic: Critic | None
    reference: Policy | None


@doing("loading")
def build_models(
    config: PPOConfig,
    tokenizer: Tokenizer,
    start: CriticStart | None = None,
    model: Any = None,
    critic: Any = None,
    lm_config: Any = None,
    placement: Placement = ALONE,
    needs_reference: bool = True,
) -> Models:
    """Build the policy, with the reference and a separate critic where there are any.

    A critic that is a head on the policy is built as part of it.

    start       from `critic_start`, needed if the critic may start from a reward model
    model       a causal LM to use instead of loading `config.model.path`
    critic      a sequence classifier to use as the critic
    lm_config   the policy's, from `load_model_config`, if already loaded
    placement   where they live

    Vocabularies and LoRA targets are compared before any weight is read. Raises UserError.
    """
    settings, longest = config.model, config.longest
    lm_config = model.config if model is not None else lm_config or load_model_config(settings)
    check_tokenizer(tokenizer, lm_config)
    if critic is not None and config.has_head:
        raise UserError("critic.backbone: given 'policy' with a critic; give only one of them")
    start = start or critic_start(config, lm_config, tokenizer, critic=critic)
    if critic is not None and start.is_model:
        _check_vocabulary(critic.config, lm_config)

    read = _initial_policy(settings, lm_config, model, placement)
    policy = build_policy(settings, tokenizer, lm_config, model, placement, longest)
    if config.has_head:
        policy.head = zero_head(policy.model)
    reference = _build_reference(policy, read, longest, placement) if needs_reference else None
    if not start.is_model:
        return Models(policy, None, reference)
    if critic is not None:
        value_model = _critic_from(lambda: as_loaded(critic, "critic"), "critic", config, placement)
    elif start.adapter is not None:
        value_model = classifier_on_shared_base(policy.model, start.adapter, "critic")
    elif (source := start.source) is not None:
        value_model = _critic_from(
            lambda: read_classifier(source, start.key), start.key, config, placement
        )
    elif settings.lora is not None:
        value_model = critic_on_shared_base(policy.model, settings.lora)
        check_adapter(value_model.owner)
    else:
        lm = placement.read(read)
        value_model = critic_from_policy(lm)
        placement.place(value_model.backbone, value_model.backbone)
        fix_positions(lm, longest)
        if settings.gradient_checkpointing:
            enable_checkpointing(lm)
    return Models(policy, value_model, reference)


def _initial_policy(
    settings: ModelSettings, lm_config: Any, model: Any, placement: Placement
) -> Callable[[], PreTrainedModel]:
    """A function that makes another copy of the policy's initial weights, for `Placement.read`.

    model   the object that the policy starts from, which is copied; None: the files are read again
    """
    if model is None:
        return lambda: read_causal_lm(settings, lm_config)
    is_copied = placement.shards and settings.lora is None
    original = copy.deepcopy(model) if is_copied else model  # no rank keeps a sharded one's weights
    return lambda: as_loaded(copy.deepcopy(original), "model")


def _build_reference(
    policy: Policy, read: Callable[[], PreTrainedModel], longest: int, placement: Placement
) -> Policy:
    """The frozen initial policy; with LoRA, the shared base without adapter."""
    if hasattr(policy.model, "peft_config"):
        return Policy(policy.model, adapter=None, eos_ids=policy.eos_ids)
    lm: Any = placement.read(read).requires_grad_(False)
    placement.place(lm, backbone_of(lm), "frozen")
    fix_positions(lm, longest)
    return Policy(lm, eos_ids=policy.eos_ids).eval()


def _critic_from(
    read: Callable[[], Any], key: str, config: PPOConfig, placement: Placement
) -> Critic:
    """A critic initialised from a sequence classifier that `read` gives. Raises UserError."""
    lora = config.model.lora
    classifier = placement.read(read)
    head = None
    if lora is not None:  # the backbone stays frozen, and is sharded under ZeRO-3
        head = placement.place(copy.deepcopy(_score_of(classifier)))
    use, as_given = ("trained", False) if lora is None else ("base", key == "critic")
    quantized = config.model.quantization is not None
    placement.place(classifier, backbone_of(classifier), use, as_given, quantized)
    admit(classifier, config.longest, key, samples=False)
    if config.model.gradient_checkpointing:
        enable_checkpointing(classifier)
    critic = critic_from_classifier(classifier, lora, head)
    if critic.owner is not None:
        check_adapter(critic.owner)
    return critic


@dataclass(frozen=True)
class CriticStart:
    """Initialisation of the critic; with neither adapter nor source, the policy's backbone.

    adapter   the folder of a reward model's adapter, to add to the policy's base
    source    a sequence classifier to load
    key       the configuration key that named it
    line      message with the choice and its reason, where `critic.init` is auto
    is_model  whether the critic is a model of its own; False: a head on the policy, or none
    """

    adapter: str | None = None
    source: ModelSettings | None = None
    key: str = "critic.path"
    line: str | None = None
    is_model: bool = True


def critic_start(
    config: PPOConfig,
    lm_config: Any,
    tokenizer: Tokenizer | None = None,
    reward_path: str | None = None,
    weights: bool = True,
    critic: Any = None,
    estimator: Estimator | None = None,
) -> CriticStart:
    """Choose the critic's initialisation, from configurations and tokenizers alone.

    lm_config, tokenizer   the policy's; without a tokenizer only vocabulary sizes are compared
    reward_path            the first reward model, if there is one
    weights                as for `load_model_config`
    critic                 a model to start from; overrides the configuration
    estimator              likewise, instead of `ppo.estimator`

    Raises UserError where `critic.path` or `critic.init: reward` cannot be satisfied.
    """
    settings, lora = config.critic, config.model.lora
    estimator = build_estimator(config.ppo.estimator) if estimator is None else estimator
    if config.has_head or "values" not in estimator_requires(estimator):
        return CriticStart(is_model=False)
    if critic is not None or settings.init == "policy":
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
    key = "critic.path" if settings.path else "reward.models"
    if is_open and lora is not None:
        fault = "is no adapter of the policy's base, but a second model in memory"
    else:
        source_config = load_classifier_config(source, key, weights)
        fault = _unfit(source_config, source, config, lm_config, tokenizer)
    if fault is None:
        return CriticStart(source=source, key=key, line=chosen)
    if is_open:
        return CriticStart(line=f"{begin} policy, as the reward model {path!r} {fault}")
    request = (
        f"critic.path: {path!r}" if settings.path else f"critic.init: given 'reward', but {path!r}"
    )
    raise UserError(f"{request} {fault}; critic.init=policy starts the critic from the policy")


def _unfit(
    source_config: Any,
    source: ModelSettings,
    config: PPOConfig,
    lm_config: Any,
    tokenizer: Tokenizer | None,
) -> str | None:
    """Reason why this policy's critic cannot start from a sequence classifier, or None."""
    rollout, vocabulary = config.rollout, lm_config.get_text_config().vocab_size
    if fault := _other_tokens(source_config, source, vocabulary, tokenizer):
        return fault
    longest = rollout.max_prompt_length + rollout.max_new_tokens
    longest = min(longest, position_limit(lm_config) or longest)
    positions = position_limit(source_config)
    if positions is not None and positions < longest:
        return (
            f"has {positions} positions, fewer than the {longest} of rollout.max_prompt_length and "
            "max_new_tokens together"
        )
    if (
        getattr(source_config, "quantization_config", None) is not None
        and config.model.lora is None
    ):
        return "is quantised, and cannot be trained"
    try:
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(
                copy.deepcopy(source_config), trust_remote_code=source.trust_remote_code
            )
    except Exception as error:  # of a model's own code, too
        return f"is no sequence classifier: {one_line(error)}"
    if not isinstance(getattr(model, "score", None), nn.Linear):
        return f"is a {type(model).__name__}, which has no linear `score` head as decoders have it"
    return None


def _other_tokens(
    source_config: Any, source: ModelSettings, vocabulary: int, tokenizer: Tokenizer | None
) -> str | None:
    """Mismatch of a classifier's tokens with the policy's, or None; extra tokens are allowed."""
    size = source_config.get_text_config().vocab_size
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
    model: Any, lora: LoraSettings | None = None, head: nn.Linear | None = None
) -> Critic:
    """A critic initialised from a reward model: V of a prefix is its (centred) score.

    head   with LoRA: a copy of the reward model's head, to train; default: made here
    """
    offset = score_offset(model.config, "critic.path")
    score = _score_of(model)
    if lora is None:
        return Critic(backbone_of(model), score, offset)
    head = (head or copy.deepcopy(score)).requires_grad_(True)
    adapted = add_adapter(model, lora, "critic", task="SEQ_CLS")
    base = adapted.get_base_model()
    return Critic(backbone_of(base), head, offset, model=adapted, adapter="critic")


def _score_of(model: Any) -> nn.Linear:
    """The head of a sequence classifier that is a decoder. Raises UserError for any other."""
    score = getattr(model, "score", None)
    if not isinstance(score, nn.Linear):
        raise UserError(
            f"critic.path: {type(model).__name__} has no linear `score` head; must be a "
            "decoder-only sequence classifier"
        )
    return score


def critic_from_policy(model: PreTrainedModel) -> Critic:
    """A critic with a policy's backbone, which must not be shared, and a zero head."""
    return Critic(backbone_of(model), zero_head(model))


def classifier_on_shared_base(model: Any, folder: str, name: str) -> Critic:
    """A reward model from its saved adapter, on the policy's frozen base. Raises UserError."""
    weight = attach(model, folder, name)
    if weight is None:
        raise UserError(f"the adapter {folder!r} has no `score` head: it is not a reward model's")
    head = nn.Linear(weight.shape[1], 1, bias=False)
    head.weight.data.copy_(weight)
    head.to(model.device)
    config = load_model_config(ModelSettings(path=folder), "adapter")
    offset = score_offset(config, "adapter")
    return Critic(backbone_of(model.get_base_model()), head, offset, model=model, adapter=name)


def critic_on_shared_base(model: Any, lora: LoraSettings) -> Critic:
    """A critic as a further adapter on the policy's frozen base, with a zero head."""
    model = add_adapter(model, lora, "critic")
    base = model.get_base_model()
    return Critic(backbone_of(base), zero_head(base), model=model, adapter="critic")


def _check_vocabulary(critic_config: Any, lm_config: Any) -> None:
    size, vocabulary = (c.get_text_config().vocab_size for c in (critic_config, lm_config))
    if size != vocabulary:
        fault = f"has a vocabulary of {size} tokens, the policy {vocabulary}; they must be the same"
        raise UserError(f"critic: the critic {fault}")


def zero_head(model: Any) -> nn.Linear:
    """A value head on a causal LM's last hidden states, with zero weights."""
    head = nn.Linear(hidden_width(model), 1, bias=False)
    nn.init.zeros_(head.weight)
    return head
