"""The plug-ins of a PPO run: given in Python, or named in its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from marlhf.algorithm.estimators import Estimator, build_estimator, check_estimator
from marlhf.algorithm.loss_weights import LossWeights, build_loss_weights
from marlhf.config import PPOConfig
from marlhf.rewards import CombinedReward, build_rewards, build_token_rewards
from marlhf.rewards.tokens import CombinedTokenReward
from marlhf.rollout.engine import EngineFactory, build_engine, check_ahead
from marlhf.segmenters import SegmenterFn, build_segmenter


@dataclass(frozen=True)
class PlugIns:
    """What a user may replace; reward models and engine are not loaded yet."""

    segmenter: SegmenterFn
    estimator: Estimator
    engine: EngineFactory
    reward: CombinedReward
    token_reward: CombinedTokenReward
    loss_weights: tuple[LossWeights, ...]


def build_plug_ins(config: PPOConfig, arguments: Mapping[str, Any]) -> PlugIns:
    """Build all of them, before any model is loaded. Raises UserError.

    arguments   objects or names that override the configuration, by their field; None: the
                configuration's
    """
    configured = {
        "segmenter": config.segmenter,
        "estimator": config.ppo.estimator,
        "engine": config.rollout.engine,
        "reward": config.reward.models,
        "token_reward": config.reward.tokens,
    }
    specs = configured | {key: arg for key, arg in arguments.items() if arg is not None}
    segmenter, estimator = build_segmenter(specs["segmenter"]), build_estimator(specs["estimator"])
    check_estimator(estimator, config)
    engine, reward = build_engine(specs["engine"]), build_rewards(specs["reward"])
    check_ahead(engine, config.rollout.ahead)
    names = [reward.name for reward in reward.rewards]
    token_reward = build_token_rewards(specs["token_reward"], names)
    weights = build_loss_weights(config.ppo.weights, segmenter)
    return PlugIns(segmenter, estimator, engine, reward, token_reward, weights)
