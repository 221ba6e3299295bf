"""Arms: other settings of segments and credit, over one set of responses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from marlhf.algorithm.estimators import (
    Estimator,
    build_estimator,
    check_estimator,
    estimator_requires,
)
from marlhf.algorithm.experience import macro_batch
from marlhf.algorithm.loss_weights import build_loss_weights, weighted
from marlhf.algorithm.macro import isolate_last_token
from marlhf.common.errors import UserError
from marlhf.common.tokenization import Tokenizer
from marlhf.config import PPOConfig
from marlhf.config.loading import apply_overrides, config_from_dict, read_yaml
from marlhf.config.ppo import keys_without_critic
from marlhf.runs.rollouts import KeptRollout
from marlhf.segmenters import SegmenterFn, build_segmenter, segment
from marlhf.views.replay import Arm

T = TypeVar("T")


def check_is_run(folder: Path) -> None:
    """Check that a folder is the output_dir of a run. Raises UserError."""
    if not (folder / "config.yaml").is_file():
        fault = "holds no config.yaml" if folder.is_dir() else "is no folder"
        raise UserError(f"RUN: given {str(folder)!r}, which {fault}; must be a run's output_dir")


def arm_config(
    run: Path, overrides: Sequence[str], fixed: Mapping[str, Any] | None = None
) -> PPOConfig:
    """A run's configuration with the overrides of an arm. Raises UserError, naming run or arm.

    fixed   values of other keys, by section

    Where an arm changes the estimator to one without a critic, the run's settings that only a
    critic uses are left out.
    """
    try:
        return _arm_config(run, overrides, fixed)
    except UserError as error:
        if overrides:
            raise UserError(f"arm {' '.join(overrides)!r}: {error}") from error
        if fixed:
            raise
        raise UserError(f"RUN: {str(run / 'config.yaml')!r}: {error}") from error


def _arm_config(run: Path, overrides: Sequence[str], fixed: Mapping[str, Any] | None) -> PPOConfig:
    values = read_yaml(run / "config.yaml")
    for section, settings in (fixed or {}).items():
        values[section] = {**(values.get(section) or {}), **settings}
    values = apply_overrides(PPOConfig, values, overrides)
    named = {word.partition("=")[0] for word in overrides}
    if any(name == "ppo" or name.startswith("ppo.estimator") for name in named):
        estimator = (values.get("ppo") or {}).get("estimator", "gae")
        if "values" not in estimator_requires(build_estimator(estimator)):
            for key in set(keys_without_critic(estimator)) - named:
                section, _, field = key.partition(".")
                settings = values.get(section)
                if isinstance(settings, dict):
                    values[section] = {k: v for k, v in settings.items() if k != field}
    return config_from_dict(PPOConfig, values)


def per_arm(labels: Iterable[str], compute: Callable[[str], T]) -> dict[str, T]:
    """Results of a function of each arm's label. Raises UserError, naming the arm."""
    return {label: _named(label, compute) for label in labels}


def _named(label: str, compute: Callable[[str], T]) -> T:
    try:
        return compute(label)
    except UserError as error:
        raise UserError(f"arm {label!r}: {error}") from error


def estimator_of(config: PPOConfig) -> Estimator:
    """The estimator of an arm. Raises UserError where it does not fit the other keys."""
    estimator = build_estimator(config.ppo.estimator)
    check_estimator(estimator, config)
    return estimator


def cut(
    kept: KeptRollout,
    config: PPOConfig,
    tokenizer: Tokenizer,
    segmenter: SegmenterFn | None = None,
) -> Tensor:
    """Starts of macro actions [B,T] under a configuration. Raises UserError.

    segmenter   instead of that of `config`, such as one that has learned
    """
    responses = kept.responses(tokenizer)
    segmenter = build_segmenter(config.segmenter) if segmenter is None else segmenter
    starts = segment(segmenter, responses)
    alone = config.macro.last_token_alone
    return isolate_last_token(starts, responses.response_mask) if alone else starts


def arm_of(
    label: str,
    kept: KeptRollout,
    config: PPOConfig,
    tokenizer: Tokenizer,
    *,
    own_kl: bool,
    segmenter: SegmenterFn | None = None,
    starts: Tensor | None = None,
    continuation_values: Tensor | None = None,
) -> Arm:
    """Compute the credit of a rollout under a configuration. Raises UserError.

    own_kl   with the KL coefficient that the run had at that update, which may be an adapted one
    segmenter   as for `cut`
    starts   from `cut`, if computed already
    continuation_values   [B,T] instead of those of the run
    """
    estimator = estimator_of(config)
    requires = estimator_requires(estimator)
    if continuation_values is not None:
        tensors = kept.tensors | {"continuation_values": continuation_values}
        kept = replace(kept, tensors=tensors)
    missing = {
        "values": "values" in requires and "values" not in kept.tensors,
        "continuations": "continuations" in requires and "continuation_values" not in kept.tensors,
    }
    for what, is_missing in missing.items():
        if is_missing:
            raise UserError(f"needs {what}, which the run did not have")
    segmenter = build_segmenter(config.segmenter) if segmenter is None else segmenter
    if starts is None:
        starts = cut(kept, config, tokenizer, segmenter)
    coef = None if own_kl else 0.0 if config.kl_in_loss else config.kl.coef
    copies = config.rollout.responses_per_prompt
    tokens = kept.token_data(coef)
    batch = macro_batch(starts, tokens, config.macro, config.ppo, copies, estimator=estimator)
    weights = build_loss_weights(config.ppo.weights, segmenter)
    return Arm(label, weighted(batch, weights, kept.responses(tokenizer)))
