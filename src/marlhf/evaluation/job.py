"""The job `marlhf evaluate`.

  1. check everything that needs no weights                       evaluation/policies
  2. sample responses, one policy in memory at a time             evaluation/sampling
  3. score them: rewards, ROUGE, KL to the reference              evaluation/scoring
  4. means, intervals, win rates, pass@k, best-of-n               evaluation/summary
  5. ask a judge, score people's ratings                          evaluation/win_rates

Every response, measure and judgement is on disk as soon as it exists; a second run of the same
configuration does only what is missing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import track

from marlhf.common.chat_templates import fix_date
from marlhf.common.errors import UserError, printable, say
from marlhf.common.paths import check_kinds, local_path, write_atomically, writing
from marlhf.config import EvaluateConfig
from marlhf.config.loading import check_kind, config_to_dict
from marlhf.config.yaml_text import dump_yaml
from marlhf.data.prompts import Prompt, load_rows
from marlhf.data.template_checks import (
    dated,
    reward_tokenizers,
    strip_bos_for_rewards,
    template_notes,
)
from marlhf.distributed import Distributed
from marlhf.evaluation import raters
from marlhf.evaluation.bench import MEASURE_KEY, SAMPLE_KEY, Bench
from marlhf.evaluation.endpoint import api_key
from marlhf.evaluation.policies import (
    PolicySource,
    check_same_tokens,
    labelled,
    model_folder,
    source,
)
from marlhf.evaluation.raters import read_ratings
from marlhf.evaluation.records import RESUME_HINT, Measured, Records, Sample
from marlhf.evaluation.render import markdown, show
from marlhf.evaluation.sampling import fingerprints, measure_kl, pending_samples, sample_policy
from marlhf.evaluation.scoring import Measure, apply_measure, build_measures
from marlhf.evaluation.summary import summarise
from marlhf.evaluation.win_rates import JUDGEMENTS, judge_pairs, rate_pairs
from marlhf.rewards import CombinedReward
from marlhf.rollout.engine import build_engine
from marlhf.rollout.scores import check_rewards
from marlhf.runs import checkpoint
from marlhf.runs.agreement import check_agreement
from marlhf.runs.directory import check_no_run, notice, only_writer
from marlhf.runs.provenance import Provenance, check_apart, data_labels

SAMPLES, MEASURES = "samples.jsonl", "measures.jsonl"
_OUTPUT_FILES = (SAMPLES, MEASURES, "results.json", "results.md", "config.yaml")


def run(config: EvaluateConfig) -> None:
    """Run the job `marlhf evaluate`."""
    evaluate(config)


def evaluate(config: EvaluateConfig) -> dict[str, Any] | None:
    """Evaluate and return the contents of results.json (None except on the main rank).

    Raises UserError, before any weights are loaded where that is possible.
    """
    check_kind(config, EvaluateConfig)
    with ExitStack() as locks:  # locks the folder until the end
        return _evaluate(config, locks)


def _evaluate(config: EvaluateConfig, locks: ExitStack) -> dict[str, Any] | None:
    distributed = Distributed(config.model.precision, config.distributed_timeout_minutes)
    config = dated(config, distributed)
    # 1. check
    measures = build_measures(config)
    _check_names(config, measures)
    bench, reference, notes = _bench(config, measures, distributed, locks)
    prints = {policy.label: fingerprints(bench, policy) for policy in bench.sources}
    for policy in bench.sources:
        pending_samples(bench, policy, prints[policy.label])  # refuses stale responses
    distributed.fail_together(lambda: _write_config(config, distributed.is_main, notes))
    # 2. sample
    for policy in bench.sources:
        sample_policy(bench, policy, prints[policy.label])
    # 3. score
    for measure in measures:
        apply_measure(bench, measure)
    if reference is not None:
        measure_kl(bench, reference)
    # 4. summarise, 5. ask
    return _results(bench, measures) if distributed.is_main else None


def _bench(
    config: EvaluateConfig,
    measures: Sequence[Measure],
    distributed: Distributed,
    locks: ExitStack,
) -> tuple[Bench, PolicySource | None, list[str]]:
    """Build the bench and the reference, without weights, and notes about chat templates.

    Reads the records of an earlier run. Raises UserError for whatever does not fit together.
    """
    engine = build_engine(config.rollout.engine)
    if distributed.world_size > 1 and getattr(engine, "samples_together", False):
        raise UserError(
            "rollout.engine: given one that processes hold together, but in an evaluation each "
            "samples for itself; leave tensor_parallel out"
        )
    prompts = _prompts(config)
    rewards = CombinedReward(tuple(measure.reward for measure in measures))
    check_rewards(rewards, [prompts])
    for tokenizer in reward_tokenizers(rewards):
        fix_date(tokenizer, config.data.template_date)
    sources = [
        source(label, path, _key(config, label), config, prompts)
        for label, path in labelled(config.policies).items()
    ]
    reference = None
    if config.reference is not None:
        reference = source("reference", config.reference, "reference", config, prompts)
        check_same_tokens(reference, sources)
    tokenizers = [policy.tokenizer for policy in sources]
    for tokenizer in tokenizers:
        strip_bos_for_rewards(rewards, tokenizer)
    notes = [note for t in tokenizers for note in template_notes(rewards, prompts, t)]
    _check_agreement(config, prompts, distributed)
    folder = _claim(config, distributed, locks)
    samples = Records(folder / SAMPLES, SAMPLE_KEY, distributed, Sample)
    measured = Records(folder / MEASURES, MEASURE_KEY, distributed, Measured)
    track = _Track(distributed.is_main)
    bench = Bench(config, prompts, sources, samples, measured, distributed, engine, track)
    return bench, reference, notes


def _results(bench: Bench, measures: Sequence[Measure]) -> dict[str, Any]:
    """Write and show the results, even where the judge fails."""
    config, folder = bench.config, _folder(bench.config)
    results = summarise(bench, measures)
    _write_results(results, folder)
    try:
        if config.raters is not None:
            rate_pairs(bench, results, folder)
        if config.judge is not None:
            judge_pairs(bench, results, folder)
    finally:
        show(results, _console())
        _write_results(results, folder)
    return results


def _folder(config: EvaluateConfig) -> Path:
    return local_path(config.output_dir, "output_dir")


def _key(config: EvaluateConfig, label: str) -> str:
    if isinstance(config.policies, dict):
        return f"policies.{label}"
    is_one = isinstance(config.policies, str) or len(config.policies) == 1
    return "policies" if is_one else f"policies, {label!r}"


def _check_names(config: EvaluateConfig, measures: Sequence[Measure]) -> None:
    """Check that labels, rewards, keys and files in the configuration exist. Raises UserError."""
    labels = list(labelled(config.policies))
    if config.baseline is not None and config.baseline not in labels:
        raise UserError(
            f"baseline: given {config.baseline!r}, must be one of the policies: {', '.join(labels)}"
        )
    if len(labels) < 2:
        for key in ("baseline", "judge", "raters"):
            if getattr(config, key) is not None:
                raise UserError(f"{key}: needs two policies to compare, given one")
    if config.judge is not None:
        api_key(config.judge)
    for path in config.raters.ratings if config.raters is not None else ():
        read_ratings(path)
    requested = config.pass_at.reward if config.pass_at is not None else None
    names = [m.name.removeprefix("reward_") for m in measures if m.weight is not None]
    if requested is not None and requested not in names:
        raise UserError(
            f"pass_at.reward: given {requested!r}, must be the name of one of the rewards, of an "
            f"import path its last part: {', '.join(names)}"
        )


def _prompts(config: EvaluateConfig) -> list[Prompt]:
    rows, held_out = load_rows(config.data, "evaluate")
    return list(held_out or rows)


def _check_agreement(
    config: EvaluateConfig, prompts: Sequence[Prompt], distributed: Distributed
) -> None:
    """Check that all ranks have the same configuration, prompts, models and code.

    Raises UserError.
    """
    if distributed.world_size == 1:
        return
    folders = {label: model_folder(path) for label, path in labelled(config.policies).items()}
    reference = None if config.reference is None else model_folder(config.reference)
    with_folders = replace(config, policies=folders, reference=reference)
    label, _ = data_labels(config.data)
    facts = distributed.fail_together(
        lambda: Provenance(with_folders, {label: prompts}, {}).quick_facts()
    )
    check_agreement(config, distributed, facts)


def _claim(config: EvaluateConfig, distributed: Distributed, locks: ExitStack) -> Path:
    """Return the output folder, locked while `locks` is open. Raises UserError.

    With `overwrite`, the files of an earlier evaluation are deleted.
    """
    folder = _folder(config)
    fault: list[str] = []
    if distributed.is_main:
        try:
            check_apart(config, [folder / name for name in _OUTPUT_FILES])
            locks.enter_context(only_writer(folder))
            check_no_run(folder, "output_dir")
            with writing("output_dir", folder):
                for name in _OUTPUT_FILES if config.overwrite else ():
                    checkpoint.delete(folder / name)
            of_raters = () if config.raters is None else raters.files(config.raters, folder)
            outputs = [folder / name for name in (*_OUTPUT_FILES, JUDGEMENTS)]
            check_kinds([*outputs, *of_raters], "output_dir")
        except UserError as error:
            fault = [str(error)]
    fault = distributed.gather_objects(fault)
    if fault:
        raise UserError(fault[0])
    return folder


def _write_config(config: EvaluateConfig, is_main: bool, notes: Sequence[str]) -> None:
    if is_main:
        for line in dict.fromkeys(notes):
            notice(line)
        with writing("output_dir", _folder(config), RESUME_HINT):
            write_atomically(_folder(config) / "config.yaml", dump_yaml(config_to_dict(config)))


def _write_results(results: dict[str, Any], folder: Path) -> None:
    text = json.dumps(results, indent=2, ensure_ascii=False) + "\n"
    with writing("output_dir", folder, RESUME_HINT):
        write_atomically(folder / "results.json", text)
        write_atomically(folder / "results.md", markdown(results))


class _Track:
    """A progress bar for batches on stderr; a line where there is no terminal."""

    def __init__(self, is_main: bool) -> None:
        self._console = Console(stderr=True)
        self._is_main = is_main

    def __call__(self, batches: Sequence[Any], label: str) -> Iterator[Any]:
        if not self._is_main:
            return iter(batches)
        if not self._console.is_terminal:
            say(f"{label}: {len(batches)} batches")
            return iter(batches)
        return iter(track(batches, escape(printable(label)), console=self._console, transient=True))


def _console() -> Console:
    """Standard output; where it is no terminal, wide enough for a table."""
    console = Console()
    return (
        console if console.is_terminal else Console(width=max(shutil.get_terminal_size()[0], 200))
    )
