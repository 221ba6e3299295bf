"""The configuration of every job, as typed dataclasses; `config_loading` reads them from YAML."""

from marlhf.config.evaluate import (
    EvaluateConfig,
    JudgeSettings,
    LoadingSettings,
    PassSettings,
    RaterSettings,
)
from marlhf.config.ppo import (
    CriticSettings,
    KLSettings,
    MacroSettings,
    PPOConfig,
    PPOSettings,
    PTXSettings,
)
from marlhf.config.sections import (
    DataSettings,
    LogSettings,
    LoraSettings,
    ModelSettings,
    OptimizerSettings,
    RewardSettings,
    RolloutSettings,
)

__all__ = [
    "CriticSettings",
    "DataSettings",
    "EvaluateConfig",
    "JudgeSettings",
    "KLSettings",
    "LoadingSettings",
    "LogSettings",
    "LoraSettings",
    "MacroSettings",
    "ModelSettings",
    "OptimizerSettings",
    "PPOConfig",
    "PPOSettings",
    "PTXSettings",
    "PassSettings",
    "RaterSettings",
    "RewardSettings",
    "RolloutSettings",
]
