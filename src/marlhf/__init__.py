"""marlhf: RLHF with macro actions.

Heavy imports happen on first use of a name, so that `import marlhf` is instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from marlhf.algorithm.estimators import Credit as Credit
    from marlhf.algorithm.estimators import CreditInputs as CreditInputs
    from marlhf.common.errors import UserError as UserError
    from marlhf.common.types import ResponseBatch as ResponseBatch
    from marlhf.config import PPOConfig as PPOConfig
    from marlhf.config.loading import config_from_dict as config_from_dict
    from marlhf.config.loading import load_config as load_config
    from marlhf.segmenters import EntropyJump as EntropyJump
    from marlhf.segmenters import Line as Line
    from marlhf.segmenters import NGram as NGram
    from marlhf.segmenters import Parsing as Parsing
    from marlhf.segmenters import Perplexity as Perplexity
    from marlhf.segmenters import Phrases as Phrases
    from marlhf.segmenters import RandomNGram as RandomNGram
    from marlhf.segmenters import Segmenter as Segmenter
    from marlhf.segmenters import Sentence as Sentence
    from marlhf.segmenters import Sequence as Sequence
    from marlhf.segmenters import Syntax as Syntax
    from marlhf.segmenters import TextSegmenter as TextSegmenter
    from marlhf.segmenters import Token as Token
    from marlhf.segmenters import Union as Union
    from marlhf.segmenters import Word as Word
    from marlhf.segmenters import from_lengths as from_lengths
    from marlhf.segmenters import from_text as from_text
    from marlhf.training.ppo import PPOTrainer as PPOTrainer

__version__ = "0.1.0"

_CONFIGS = (
    "CheckpointSettings",
    "CriticSettings",
    "DataSettings",
    "KLSettings",
    "LogSettings",
    "LoraSettings",
    "MacroSettings",
    "ModelSettings",
    "OptimizerSettings",
    "PPOConfig",
    "PPOSettings",
    "PTXSettings",
    "QuantizationSettings",
    "RewardSettings",
    "RolloutSettings",
)
_SEGMENTERS = (
    "EntropyJump",
    "Line",
    "NGram",
    "Parsing",
    "Perplexity",
    "Phrases",
    "RandomNGram",
    "Segmenter",
    "Sentence",
    "Sequence",
    "Syntax",
    "TextSegmenter",
    "Token",
    "Union",
    "Word",
    "from_lengths",
    "from_text",
)
_HOMES = {
    **dict.fromkeys(_CONFIGS, "marlhf.config"),
    **dict.fromkeys(_SEGMENTERS, "marlhf.segmenters"),
    "Credit": "marlhf.algorithm.estimators",
    "CreditInputs": "marlhf.algorithm.estimators",
    "PPOTrainer": "marlhf.training.ppo",
    "ResponseBatch": "marlhf.common.types",
    "UserError": "marlhf.common.errors",
    "config_from_dict": "marlhf.config.loading",
    "load_config": "marlhf.config.loading",
}

__all__ = ["__version__", *_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'marlhf' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
