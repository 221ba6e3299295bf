"""`marlhf replay RUN`: credit under other settings, on the rollouts that a run has kept."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from marlhf.common.errors import Parser, UserError, at_least_one, say
from marlhf.common.paths import local_path

if TYPE_CHECKING:
    from marlhf.common.tokenization import Tokenizer
    from marlhf.config import PPOConfig
    from marlhf.runs.rollouts import KeptRollout
    from marlhf.views.replay import Arm

# what credit is made of; the responses are there already
_SECTIONS = ("segmenter", "macro", "ppo", "kl")


def main(words: Sequence[str]) -> None:
    """Show the arms in the terminal, or write an HTML page. Raises UserError."""
    options = _parse(words)
    from rich.console import Console

    from marlhf.config import ModelSettings, PPOConfig
    from marlhf.config.loading import load_config
    from marlhf.models.loading import load_tokenizer
    from marlhf.runs.rollouts import kept_steps, read_rollout
    from marlhf.views.html_page import write_page
    from marlhf.views.replay import Replay, replay_page, show

    run = local_path(options.run, "RUN")
    steps = kept_steps(run)
    if not steps:
        raise UserError(
            f"replay: {options.run!r} has kept no rollouts; train with log.rollouts_every=10, say"
        )
    step = steps[-1] if options.step is None else options.step
    if step not in steps:
        raise UserError(f"--step: given {step}, must be one of {', '.join(map(str, steps))}")
    settings = {"the run": [], **{text: _overrides(text) for text in options.arm or []}}
    configs = {
        label: load_config(PPOConfig, run / "config.yaml", overrides)
        for label, overrides in settings.items()
    }
    kept = read_rollout(run, step)
    of_run = configs["the run"]
    model = run / "final" if (run / "final").is_dir() else Path(of_run.model.path)
    source = ModelSettings(path=str(model), chat_template=of_run.model.chat_template)
    tokenizer = load_tokenizer(source, "model.path")
    arms = [
        arm_of(label, kept, config, tokenizer, own_kl=not _names_kl(settings[label]))
        for label, config in configs.items()
    ]
    replay = Replay.of(kept, arms, tokenizer, step)
    if options.html is None:
        show(replay, Console(), options.responses)
        return
    content = replay_page(replay, options.responses)
    say(f"Wrote {write_page(options.html, content, '--html')}", sys.stdout)


def arm_of(
    label: str, kept: KeptRollout, config: PPOConfig, tokenizer: Tokenizer, *, own_kl: bool
) -> Arm:
    """Compute the credit of a rollout under a configuration. Raises UserError.

    own_kl   with the KL coefficient that the run had at that update, which may be an adapted one
    """
    from marlhf.algorithm.estimators import (
        build_estimator,
        check_estimator,
        estimator_requires,
    )
    from marlhf.algorithm.experience import macro_batch
    from marlhf.algorithm.loss_weights import build_loss_weights, weighted
    from marlhf.algorithm.macro import isolate_last_token
    from marlhf.segmenters import build_segmenter, segment
    from marlhf.views.replay import Arm

    segmenter = build_segmenter(config.segmenter)
    estimator = build_estimator(config.ppo.estimator)
    check_estimator(estimator, config)
    requires = estimator_requires(estimator)
    missing = {
        "values": "values" in requires and "values" not in kept.tensors,
        "continuations": "continuations" in requires and "continuation_values" not in kept.tensors,
    }
    for what, is_missing in missing.items():
        if is_missing:
            raise UserError(f"--arm: {label!r} needs {what}, which the run did not have")
    responses = kept.responses(tokenizer)
    starts = segment(segmenter, responses)
    if config.macro.last_token_alone:
        starts = isolate_last_token(starts, responses.response_mask)
    coef = None if own_kl else 0.0 if config.kl_in_loss else config.kl.coef
    copies = config.rollout.responses_per_prompt
    tokens = kept.token_data(coef)
    batch = macro_batch(starts, tokens, config.macro, config.ppo, copies, estimator=estimator)
    weights = build_loss_weights(config.ppo.weights, segmenter)
    return Arm(label, weighted(batch, weights, responses))


def _names_kl(overrides: Sequence[str]) -> bool:
    return any(override.startswith("kl.") for override in overrides)


def _overrides(text: str) -> list[str]:
    """The settings of an arm. Raises UserError for a key that replaying cannot change."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"--arm: given {text!r}: {error}") from None
    for word in words:
        section = word.partition("=")[0].partition(".")[0]
        if section not in _SECTIONS:
            raise UserError(
                f"--arm: given {word!r}, but the responses are sampled and scored already; "
                f"possible: keys of {', '.join(_SECTIONS)}"
            )
    if not words:
        raise UserError("--arm: given nothing; must hold settings such as segmenter=sentence")
    return words


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="marlhf replay",
        description="Recompute segments, advantages and loss weights of rollouts that a run has "
        "kept (log.rollouts_every), under other settings, without a model.",
        epilog="example: marlhf replay runs/mine --arm segmenter=sentence --arm "
        "'segmenter=token ppo.lam=1' --html replay.html",
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="output_dir of a ppo run")
    add("--step", type=at_least_one, metavar="N", help="update to replay; default: the last kept")
    add(
        "--arm",
        action="append",
        metavar="SETTINGS",
        help="keys of segmenter, macro, ppo and kl that differ from the run's, as on the command "
        "line; give it several times",
    )
    add(
        "--responses",
        type=at_least_one,
        default=8,
        metavar="N",
        help="responses to show, those first on which arms differ most (default: 8)",
    )
    add("--html", metavar="PATH", help="write a page instead")
    return parser.parse_args(list(words))
