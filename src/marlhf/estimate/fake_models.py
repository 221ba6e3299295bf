"""The models of a run on fake tensors, which have shapes and no data.

`fake_models` follows `building.build_models`, with configurations in the place of weights.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from marlhf.common.errors import UserError, one_line
from marlhf.compat.torch import FakeTensorMode
from marlhf.config import (
    EvaluateConfig,
    LoraSettings,
    ModelSettings,
    PPOConfig,
    RewardConfig,
    SFTConfig,
)
from marlhf.distributed import matmul_parameters, replace_layers
from marlhf.estimate.shapes import JobConfig, Texts
from marlhf.evaluation.policies import labelled, policy_settings
from marlhf.models import building, loading
from marlhf.models.adapters import add_adapter, is_adapter_of, saved_adapter, trainable_parameters
from marlhf.models.policy import Critic, Policy, backbone_of, unwrapped
from marlhf.rewards import reward_models, segment_reward_models

# beginnings of the names of reward models, and of those inside `per_segment`
REWARD_MODEL, SEGMENT_MODEL = "reward model", "per_segment model"


@dataclass(frozen=True)
class FakeModels:
    """The models of a job without weights.

    trained   name -> Policy, Critic, or a sequence classifier, perhaps in PEFT
    frozen    name -> the same
    texts     reward model -> what it scores at a time
    """

    trained: dict[str, Any]
    frozen: dict[str, Any]
    texts: dict[str, Texts]
    mode: FakeTensorMode

    @property
    def policy(self) -> Policy:
        """The policy of a job that has one."""
        return (self.trained | self.frozen)["policy"]

    @property
    def positions(self) -> int | None:
        """Maximum sequence length of the policy, or of the model that is trained."""
        first = next(iter((self.trained | self.frozen).values()))
        return _positions(first.model if isinstance(first, Policy) else first)


def fake_models(config: JobConfig) -> FakeModels:
    """The models of a job, from their config.json alone. Raises UserError."""
    if isinstance(config, PPOConfig):
        trained, frozen, rounded = _of_ppo(config)
    elif isinstance(config, EvaluateConfig):
        trained, frozen, rounded = _of_evaluation(config)
    else:
        trained, frozen, rounded = _of_training(config)
    if config.model.precision == "bf16":
        _round(rounded)
    specs = reward_models(reward_specs(config))
    names = (name for name in frozen if name != "policy")
    texts = {name: _texts(spec, frozen[name]) for name, spec in zip(names, specs, strict=True)}
    of_segments = _of_segments(config)
    frozen |= {name: scorer for name, (_, scorer) in of_segments.items()}
    texts |= {name: _texts(*of, segments=True) for name, of in of_segments.items()}
    mode = _fill([*trained.values(), *frozen.values()])
    return FakeModels(trained, frozen, texts, mode)


def _of_segments(config: JobConfig) -> dict[str, tuple[dict[str, Any], Any]]:
    """Arguments and model of each reward model inside `per_segment`.

    Every rank loads such a model by itself, complete and in fp32.
    """
    key = "rewards" if isinstance(config, EvaluateConfig) else "reward.models"
    specs = segment_reward_models(reward_specs(config))
    reward_configs = _reward_configs(specs, key)
    scorers = {}
    with torch.device("meta"):
        for i, (spec, reward_config) in enumerate(zip(specs, reward_configs, strict=True)):
            scorer = _meta_scorer(spec, reward_config, key)
            scorers[f"{SEGMENT_MODEL}{_number(i, specs)}"] = spec, scorer
    return scorers


def _texts(spec: dict[str, Any], scorer: Any, segments: bool = False) -> Texts:
    longest = spec.get("max_length") or _limit_of(scorer)
    return Texts(spec.get("batch_size", 16), longest, segments)


def _limit_of(scorer: Any) -> int | None:
    """Maximum input length of a reward model; one on the policy's base has the policy's."""
    return None if isinstance(scorer, Critic) else _positions(scorer)


def _positions(model: Any) -> int | None:
    return loading.position_limit(unwrapped(model).config)


# trained and frozen models, and those whose frozen weights are in bf16 under `precision: bf16`
_Built: TypeAlias = tuple[dict[str, Any], dict[str, Any], list[Any]]


def _of_ppo(config: PPOConfig) -> _Built:
    settings, specs = config.model, reward_models(config.reward.models)
    lm_config = loading.load_model_config(settings, weights=False)
    reward_configs = _reward_configs(specs, "reward.models")
    first = specs[0]["path"] if specs else None
    with torch.device("meta"):
        policy = Policy(_base(AutoModelForCausalLM, settings, lm_config, "model.path"))
        critic = _meta_critic(config, policy, first)
        scorers = {}
        for i, (spec, reward_config) in enumerate(zip(specs, reward_configs, strict=True)):
            if settings.lora is not None and is_adapter_of(spec["path"], settings.path):
                model = _on_shared_base(policy.model, spec["path"], f"reward_{i}")
                for parameter in trainable_parameters(model, f"reward_{i}"):
                    parameter.requires_grad_(False)
                scorers[_reward_name(i, specs)] = model.eval()
            else:
                model = _meta_scorer(spec, reward_config, "reward.models")
                scorers[_reward_name(i, specs)] = model
    trained = {"policy": policy} | ({} if critic is None else {"critic": critic})
    of_trained = trained.values() if _has_bf16_base(settings, lm_config) else ()
    return trained, scorers, [*of_trained, *_decoders(scorers.values())]


def _of_training(config: SFTConfig | RewardConfig) -> _Built:
    settings = config.model
    base_config = loading.load_model_config(settings, weights=False)
    trains_reward = isinstance(config, RewardConfig)
    with torch.device("meta"):
        if trains_reward:
            base_config.num_labels, base_config.architectures = 1, None
            auto, task = AutoModelForSequenceClassification, "SEQ_CLS"
        else:
            auto, task = AutoModelForCausalLM, "CAUSAL_LM"
        model = _base(auto, settings, base_config, "model.path")
        if settings.gradient_checkpointing:
            loading.enable_checkpointing(model)
        if settings.lora is not None:
            model = add_adapter(model, settings.lora, "policy", task)
    trained = model if trains_reward else Policy(model, adapter=settings.lora and "policy")
    return {"model": trained}, {}, [trained] if _has_bf16_base(settings, base_config) else []


def _of_evaluation(config: EvaluateConfig) -> _Built:
    """The largest policy, as one is in memory at a time, and the reward models."""
    specs = reward_models(config.rewards)
    reward_configs = _reward_configs(specs, "rewards")
    policies = []
    with torch.device("meta"):
        for key, path in _policies(config).items():
            settings = policy_settings(config.model, path)
            lm_config = loading.load_model_config(settings, key, weights=False)
            policies.append(Policy(_meta(AutoModelForCausalLM, settings, lm_config, key)))
        policy = max(policies, key=lambda policy: sum(p.numel() for p in policy.parameters()))
        frozen: dict[str, Any] = {"policy": policy.requires_grad_(False)}
        for i, (spec, reward_config) in enumerate(zip(specs, reward_configs, strict=True)):
            frozen[_reward_name(i, specs)] = _meta_scorer(spec, reward_config, "rewards")
    return {}, frozen, _decoders(frozen.values())


def _policies(config: EvaluateConfig) -> dict[str, str]:
    """Paths of policies and reference, by key."""
    paths = {f"policies.{name}": path for name, path in labelled(config.policies).items()}
    return paths | ({} if config.reference is None else {"reference": config.reference})


def policy_paths(config: EvaluateConfig) -> list[str]:
    """Folders, or hub names, of the policies and the reference."""
    return [policy_settings(config.model, path).path for path in _policies(config).values()]


def reward_specs(config: JobConfig) -> Any:
    """The rewards that a job is given."""
    if isinstance(config, EvaluateConfig):
        return config.rewards
    return config.reward.models if isinstance(config, PPOConfig) else []


def _reward_configs(specs: Sequence[dict[str, Any]], key: str) -> list[Any]:
    return [
        loading.load_classifier_config(_reward_settings(spec), key, weights=False) for spec in specs
    ]


def _reward_name(index: int, specs: Sequence[Any]) -> str:
    return f"{REWARD_MODEL}{_number(index, specs)}"


def _number(index: int, specs: Sequence[Any]) -> str:
    return "" if len(specs) == 1 else f" {index + 1}"


def _meta_scorer(spec: dict[str, Any], reward_config: Any, key: str) -> Any:
    settings = _reward_settings(spec)
    model = _meta(AutoModelForSequenceClassification, settings, reward_config, key)
    return model.requires_grad_(False).eval()


def _has_bf16_base(settings: ModelSettings, model_config: Any) -> bool:
    """Whether a base of adapters is in bf16 in its files, by its config.json."""
    return settings.lora is not None and model_config.dtype == torch.bfloat16


def _decoders(models: Iterable[Any]) -> list[Any]:
    """Without encoders, which score in fp32."""
    return [model for model in models if isinstance(model, Policy) or hasattr(model, "score")]


def _round(models: Sequence[nn.Module]) -> None:
    """Bring frozen weights to the dtype in which `Placement` keeps them under bf16."""
    for parameter in (parameter for model in models for parameter in matmul_parameters(model)):
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()


def _fill(models: Sequence[nn.Module]) -> FakeTensorMode:
    """Replace "meta" tensors by fake CPU tensors; shared tensors stay shared."""
    mode, fakes = FakeTensorMode(), {}
    for module in (module for model in models for module in model.modules()):
        parameters = module.named_parameters(recurse=False, remove_duplicate=False)
        buffers = module.named_buffers(recurse=False, remove_duplicate=False)
        for name, old in (*parameters, *buffers):
            if not old.is_meta:  # replaced in another model already
                continue
            if old not in fakes:
                with mode:
                    new = torch.empty(old.shape, dtype=old.dtype)
                trains = isinstance(old, nn.Parameter)
                fakes[old] = nn.Parameter(new, old.requires_grad) if trains else new
            setattr(module, name, fakes[old])
    return mode


def _meta_critic(config: PPOConfig, policy: Policy, reward_path: str | None) -> Critic | None:
    """Build the critic, and add the policy's adapter: the critic may share its base."""
    settings = config.model
    lm_config = unwrapped(policy.model).config
    start = building.critic_start(config, lm_config, None, reward_path, weights=False)
    adapter, source = start.adapter, start.source
    if settings.gradient_checkpointing:
        loading.enable_checkpointing(policy.model)
    if settings.lora is not None:
        policy.model = add_adapter(policy.model, settings.lora, "policy")
        policy.adapter = "policy"
    if not start.is_model:
        policy.head = building.zero_head(unwrapped(policy.model)) if config.has_head else None
        return None
    if adapter is not None:
        return _on_shared_base(policy.model, adapter, "critic")
    if source is not None:
        classifier_config = loading.load_classifier_config(source, "critic.path", weights=False)
        model = _base(AutoModelForSequenceClassification, source, classifier_config, "critic.path")
        if settings.gradient_checkpointing:
            loading.enable_checkpointing(model)
        return building.critic_from_classifier(model, settings.lora)
    if settings.lora is not None:
        return building.critic_on_shared_base(policy.model, settings.lora)
    return building.critic_from_policy(copy.deepcopy(unwrapped(policy.model)))


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


def _base(auto: Any, settings: ModelSettings, config: Any, key: str) -> Any:
    """A model to train, or the base of adapters, in 4 bits where configured."""
    model = _meta(auto, settings, config, key)
    if settings.quantization is not None:
        replace_layers(backbone_of(model))
    return model


def _meta(auto: Any, settings: ModelSettings, config: Any, key: str) -> Any:
    try:
        return auto.from_config(
            copy.deepcopy(config),
            dtype=torch.float32,
            trust_remote_code=settings.trust_remote_code,
        )
    except Exception as error:  # the family has no such model
        raise UserError(f"{key}: {settings.path!r}: {one_line(error)}") from error
