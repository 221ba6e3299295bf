"""The models of a run on fake tensors, which have shapes and no data.

`fake_models` follows `building.build_models`, with configurations in the place of weights.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from marlhf.common.errors import UserError, one_line
from marlhf.compat.torch import FakeTensorMode
from marlhf.config import LoraSettings, ModelSettings, PPOConfig
from marlhf.distributed import matmul_parameters
from marlhf.models import building, loading
from marlhf.models.adapters import add_adapter, is_adapter_of, saved_adapter, trainable_parameters
from marlhf.models.policy import Critic, Policy, backbone_of, unwrapped
from marlhf.rewards import reward_models


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
    first = specs[0]["path"] if specs else None
    with torch.device("meta"):
        policy = Policy(_meta(AutoModelForCausalLM, settings, lm_config, "model.path"))
        critic = _meta_critic(config, policy, first)
        rewards = {}
        for i, (spec, reward_config) in enumerate(zip(specs, reward_configs, strict=True)):
            name = "reward model" if len(specs) == 1 else f"reward model {i + 1}"
            if settings.lora is not None and is_adapter_of(spec["path"], settings.path):
                model = _on_shared_base(policy.model, spec["path"], f"reward_{i}")
                for parameter in trainable_parameters(model, f"reward_{i}"):
                    parameter.requires_grad_(False)
            else:
                model = _meta(
                    AutoModelForSequenceClassification,
                    _reward_settings(spec),
                    reward_config,
                    "reward.models",
                ).requires_grad_(False)
            rewards[name] = model.eval(), spec.get("batch_size", 16)
    scorers = [model for model, _ in rewards.values()]
    models = [model for model in (policy, critic, *scorers) if model is not None]
    if settings.precision == "bf16":
        # files of a base are taken to have the dtype that the configuration names
        in_files = settings.lora is not None and lm_config.dtype == torch.bfloat16
        _round(models if in_files else [model for model in scorers if hasattr(model, "score")])
    mode = _fill(models)
    return FakeModels(policy, critic, rewards, mode)


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
        model = _meta(AutoModelForSequenceClassification, source, classifier_config, "critic.path")
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


def _meta(auto: Any, settings: ModelSettings, config: Any, key: str) -> Any:
    try:
        return auto.from_config(
            copy.deepcopy(config),
            dtype=torch.float32,
            trust_remote_code=settings.trust_remote_code,
        )
    except Exception as error:  # the family has no such model
        raise UserError(f"{key}: {settings.path!r}: {one_line(error)}") from error
