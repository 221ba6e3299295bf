"""`marlhf replay RUN`: credit under other settings, on the rollouts that a run has kept."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from marlhf.common.errors import Parser, UserError, at_least_one, say
from marlhf.common.paths import local_path
from marlhf.credit.options import THE_RUN, add_arm_options, names_kl, settings_of_arms


def main(words: Sequence[str]) -> None:
    """Show the arms in the terminal, or write an HTML page. Raises UserError."""
    options = _parse(words)
    from rich.console import Console

    from marlhf.config import ModelSettings
    from marlhf.credit.arms import arm_config, arm_of, check_is_run, per_arm
    from marlhf.models.loading import load_tokenizer
    from marlhf.runs.rollouts import kept_steps, read_rollout
    from marlhf.views.html_page import write_page
    from marlhf.views.replay import Replay, replay_page, show

    run = local_path(options.run, "RUN")
    check_is_run(run)
    steps = kept_steps(run)
    if not steps:
        raise UserError(
            f"replay: {options.run!r} has kept no rollouts; train with log.rollouts_every=10, say"
        )
    step = steps[-1] if options.step is None else options.step
    if step not in steps:
        raise UserError(f"--step: given {step}, must be one of {', '.join(map(str, steps))}")
    settings = settings_of_arms(options)
    configs = {label: arm_config(run, overrides) for label, overrides in settings.items()}
    kept = read_rollout(run, step)
    of_run = configs[THE_RUN]
    final = run / "final"
    model, key = (str(final), "RUN") if final.is_dir() else (of_run.model.path, "model.path")
    source = ModelSettings(path=model, chat_template=of_run.model.chat_template)
    tokenizer = load_tokenizer(source, key)
    arms = per_arm(
        configs,
        lambda label: arm_of(
            label, kept, configs[label], tokenizer, own_kl=not names_kl(settings[label])
        ),
    )
    replay = Replay.of(kept, list(arms.values()), tokenizer, step)
    if options.html is None:
        show(replay, Console(), options.responses)
        return
    content = replay_page(replay, options.responses)
    say(f"Wrote {write_page(options.html, content, '--html')}", sys.stdout)


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
    add_arm_options(parser)
    add(
        "--responses",
        type=at_least_one,
        default=8,
        metavar="N",
        help="responses to show, those first on which arms differ most (default: 8)",
    )
    add("--html", metavar="PATH", help="write a page instead")
    return parser.parse_args(list(words))
