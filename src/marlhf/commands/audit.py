"""`marlhf audit RUN`: a run's credit against what continuations say."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from marlhf.common.errors import Parser, at_least_one, say
from marlhf.common.paths import local_path, write_atomically, writing
from marlhf.common.third_party_output import hide_loading_bars
from marlhf.credit.options import add_arm_options, settings_of_arms


def main(words: Sequence[str]) -> None:
    """Audit a run; show a table, and write audit.json and audit.html. Raises UserError."""
    options = _parse(words)
    from rich.console import Console

    from marlhf.credit.audit import AuditSettings, audit
    from marlhf.views.audit import audit_page, show
    from marlhf.views.html_page import write_page

    hide_loading_bars()
    run = local_path(options.run, "RUN")
    output = run / "audit" if options.output is None else local_path(options.output, "--output")
    settings = AuditSettings(
        run=run,
        output=output,
        arms=settings_of_arms(options),
        data=options.data,
        prompts=options.prompts,
        responses=options.responses,
        continuations=options.continuations,
        places=options.places,
        checkpoint=options.checkpoint,
        critic=options.critic,
    )
    audited = audit(settings)
    with writing("--output", output):
        write_atomically(output / "audit.json", json.dumps(audited.numbers, indent=2) + "\n")
    page = write_page(
        output / "audit.html", audit_page(audited.numbers, audited.replay), "--output"
    )
    show(audited.numbers, Console())
    say(f"Wrote {page}", sys.stdout)


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="marlhf audit",
        description="Sample held-out responses of a run, continue them from every boundary of "
        "every arm, and set critic, advantages and gradients against these Monte-Carlo values.",
        epilog="example: marlhf audit runs/mine --arm ppo.lam=1 --arm ppo.estimator=reinforce "
        "--continuations 8",
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="output_dir of a ppo run that has a checkpoint")
    add("--data", metavar="PATH", help="prompts instead of the run's held-out ones")
    add_arm_options(parser)
    add(
        "--prompts",
        type=at_least_one,
        default=32,
        metavar="N",
        help="how many prompts (default: 32); intervals are over them",
    )
    add(
        "--responses",
        type=at_least_one,
        metavar="N",
        help="responses to each prompt (default: as in the run); estimators that compare "
        "responses need 2",
    )
    add(
        "--continuations",
        type=_even,
        default=8,
        metavar="K",
        help="samples of each prefix, even (default: 8)",
    )
    add(
        "--places",
        type=at_least_one,
        metavar="N",
        help="continue from N prefixes of a response at most, spread over rollout.max_new_tokens, "
        "for long responses (default: from every boundary of every arm)",
    )
    add("--checkpoint", metavar="step-N", help="default: the latest")
    add(
        "--critic",
        metavar="PATH",
        help="judge this model, as critic.path takes, in place of the checkpoint's critic",
    )
    add("--output", metavar="DIR", help="default: RUN/audit; an audit there is continued")
    return parser.parse_args(list(words))


def _even(word: str) -> int:
    number = at_least_one(word)
    if number % 2:
        raise argparse.ArgumentTypeError(
            f"given {word}, must be an even number: half of them tell the noise of the others"
        )
    return number
