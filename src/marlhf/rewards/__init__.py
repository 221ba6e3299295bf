"""Rewards of responses and of their tokens. See `base` for the contract."""

from marlhf.rewards.base import CombinedReward, NamedReward, RewardResult
from marlhf.rewards.building import (
    REWARDS,
    build_rewards,
    reward_models,
    segment_reward_models,
)
from marlhf.rewards.calls import RewardError, RewardFn, needed_columns
from marlhf.rewards.code import Code
from marlhf.rewards.curiosity import Curiosity
from marlhf.rewards.learned import RewardModel
from marlhf.rewards.overlap import EmbeddingSimilarity, Rouge
from marlhf.rewards.sandbox import Limits, Sandbox
from marlhf.rewards.segments import PerSegment
from marlhf.rewards.spans import place_spans
from marlhf.rewards.text import Keyword, Length, Regex, Sentiment
from marlhf.rewards.tokens import (
    TOKEN_REWARDS,
    CombinedTokenReward,
    TokenReward,
    build_token_rewards,
)

__all__ = [
    "REWARDS",
    "TOKEN_REWARDS",
    "Code",
    "CombinedReward",
    "CombinedTokenReward",
    "Curiosity",
    "EmbeddingSimilarity",
    "Keyword",
    "Length",
    "Limits",
    "NamedReward",
    "PerSegment",
    "Regex",
    "RewardError",
    "RewardFn",
    "RewardModel",
    "RewardResult",
    "Rouge",
    "Sandbox",
    "Sentiment",
    "TokenReward",
    "build_rewards",
    "build_token_rewards",
    "needed_columns",
    "place_spans",
    "reward_models",
    "segment_reward_models",
]
