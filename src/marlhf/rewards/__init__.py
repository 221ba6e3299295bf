"""Rewards: what a response is worth. See `base` for the contract."""

from marlhf.rewards.base import (
    REWARDS,
    CombinedReward,
    NamedReward,
    RewardError,
    RewardFn,
    RewardResult,
    build_rewards,
    needed_columns,
    place_spans,
)
from marlhf.rewards.code import Code
from marlhf.rewards.model import RewardModel
from marlhf.rewards.reference import EmbeddingSimilarity, Rouge
from marlhf.rewards.sandbox import Limits, Sandbox
from marlhf.rewards.text import Keyword, Length, Regex, Sentiment

__all__ = [
    "REWARDS",
    "Code",
    "CombinedReward",
    "EmbeddingSimilarity",
    "Keyword",
    "Length",
    "Limits",
    "NamedReward",
    "Regex",
    "RewardError",
    "RewardFn",
    "RewardModel",
    "RewardResult",
    "Rouge",
    "Sandbox",
    "Sentiment",
    "build_rewards",
    "needed_columns",
    "place_spans",
]
