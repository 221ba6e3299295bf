"""The configuration of every job, as typed dataclasses; `loading` reads them from YAML."""

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
from marlhf.config.reward import PairDataSettings, RewardConfig
from marlhf.config.sections import (
    AdamWSettings,
    CheckpointSettings,
    DataSettings,
    ImportanceSettings,
    LogSettings,
    LoraSettings,
    MetricsSettings,
    ModelSettings,
    OptimizerSettings,
    QuantizationSettings,
    RewardSettings,
    RolloutSettings,
)
from marlhf.config.sft import SFTConfig, SFTDataSettings
from marlhf.config.supervised import SupervisedOptimizerSettings
from marlhf.config.sweep import SweepConfig

__all__ = [
    "AdamWSettings",
    "CheckpointSettings",
    "CriticSettings",
    "DataSettings",
    "EvaluateConfig",
    "ImportanceSettings",
    "JudgeSettings",
    "KLSettings",
    "LoadingSettings",
    "LogSettings",
    "LoraSettings",
    "MacroSettings",
    "MetricsSettings",
    "ModelSettings",
    "OptimizerSettings",
    "PPOConfig",
    "PPOSettings",
    "PTXSettings",
    "PairDataSettings",
    "PassSettings",
    "QuantizationSettings",
    "RaterSettings",
    "RewardConfig",
    "RewardSettings",
    "RolloutSettings",
    "SFTConfig",
    "SFTDataSettings",
    "SupervisedOptimizerSettings",
    "SweepConfig",
]
