"""The command line: `marlhf JOB CONFIG.yaml [key.sub=value ...]`."""

from __future__ import annotations

import errno
import importlib
import os
import sys
import textwrap
import threading
import traceback
from collections.abc import Sequence
from typing import Any

from marlhf.common.errors import PeerError, ReportedError, Stopped, UserError, one_line, raised
from marlhf.common.memory_errors import is_memory_error, phase_of, without_noise
from marlhf.common.process_guard import not_ended, open_streams
from marlhf.common.reports import report, report_of_peer, set_reported
from marlhf.compat import IncompatibleError

# job -> its config class, the function that runs it, and one line of help
JOBS = {
    "sft": (
        "marlhf.config.SFTConfig",
        "marlhf.training.sft.run",
        "fine-tune a model on demonstrations",
    ),
    "reward": (
        "marlhf.config.RewardConfig",
        "marlhf.training.reward_model.run",
        "train a reward model on preference pairs",
    ),
    "ppo": (
        "marlhf.config.PPOConfig",
        "marlhf.training.ppo.run",
        "train a policy by macro-action PPO",
    ),
    "evaluate": (
        "marlhf.config.EvaluateConfig",
        "marlhf.evaluation.job.run",
        "scores, win rates and pass@k of trained policies",
    ),
    "sweep": (
        "marlhf.config.SweepConfig",
        "marlhf.commands.sweep.run",
        "one job over a grid of settings and seeds",
    ),
}
# command -> the function called with its arguments, and one line of help
COMMANDS = {
    "segment": (
        "marlhf.commands.segment.main",
        "look at the macro actions of a text, a file or a dataset",
    ),
    "report": (
        "marlhf.views.report.command.main",
        "one HTML page about runs: curves, frontier, macro actions, samples, parity",
    ),
    "replay": (
        "marlhf.commands.replay.main",
        "the credit of a run's own rollouts under other settings, side by side",
    ),
    "audit": (
        "marlhf.commands.audit.main",
        "how far critic, advantages and gradients are from the truth, by sampling it",
    ),
    "estimate": (
        "marlhf.estimate.command.main",
        "memory that a job needs on each GPU and on the host, by launch profile",
    ),
    "merge": ("marlhf.commands.merge.main", "write the model that an adapter makes of its base"),
    "quickstart": (
        "marlhf.commands.quickstart.main",
        "watch a small model learn to write cheerfully; needs no config",
    ),
}
# errors of a disk or its permissions, never a bug of ours
_OF_THE_SYSTEM = frozenset(
    getattr(errno, name)
    for name in ("EACCES", "EPERM", "EROFS", "ENOSPC", "EDQUOT", "EIO", "ELOOP", "ENAMETOOLONG")
)


def usage() -> str:
    """The text of `marlhf --help`."""
    jobs = [f"  {name:<11} {summary}" for name, (_, _, summary) in JOBS.items()]
    commands = [f"  {name:<11} {summary}" for name, (_, summary) in COMMANDS.items()]
    lines = [
        "usage: marlhf JOB CONFIG.yaml [key.sub=value ...]",
        "       marlhf COMMAND [options]",
        "",
        "jobs:",
        *jobs,
        "",
        "commands:",
        *commands,
        "",
        "`marlhf JOB --help` lists every key of the job's config with its type, default and "
        "meaning,",
        "`marlhf COMMAND --help` the options. Over several processes:",
        "  accelerate launch [--config_file F] -m marlhf JOB CONFIG.yaml ...",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a job or command. Exits with 2 and one line for bad input, 130 after Ctrl-C."""
    open_streams()
    words = list(sys.argv[1:] if arguments is None else arguments)
    if "" not in sys.path:  # import paths may name modules of the working folder
        sys.path.append("")
    sys.excepthook, threading.excepthook = _show_fault, _show_thread_fault
    try:
        if words and words[0] not in ("-h", "--help"):
            _run(words[0], words[1:])
        else:
            print(usage())
        sys.stdout.flush()  # here, where a pipe that was closed is no fault
        if not words:
            sys.exit(2)
    except KeyboardInterrupt as interrupt:
        if str(interrupt):  # its origin: a plug-in's code, which may have raised it itself
            report(one_line(interrupt))
        set_reported()
        sys.exit(130)
    except Stopped:
        set_reported()
        raise
    except BrokenPipeError:  # `marlhf ppo --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if not _report(error):
            raise
        sys.exit(2)


def _show_fault(kind: Any, error: BaseException, trace: Any) -> None:
    """Print the traceback of a bug, made printable: it may quote any input."""
    report("".join(traceback.format_exception(kind, error, trace)), head="")


def _show_thread_fault(fault: threading.ExceptHookArgs) -> None:
    """Print the traceback of a thread's exception, but TensorBoard's: its writer raises it again.

    That of a full disk, for example, is then one line.
    """
    if fault.exc_value is not None and not type(fault.thread).__module__.startswith("tensorboard."):
        _show_fault(fault.exc_type, fault.exc_value, fault.exc_traceback)


def _report(error: Exception) -> bool:
    """Print an error as one line; False for a bug, which deserves a traceback."""
    if "marlhf.distributed" in sys.modules:  # else no other rank can be the cause
        from marlhf.distributed import lost_peer

        if (line := lost_peer(error)) is not None:
            report_of_peer(line, has_ended=True)
            return True
    line = _one_line(error)
    if isinstance(error, PeerError):
        report_of_peer(one_line(error), has_ended=False)
    elif line is not None:
        report(line)
    return line is not None


def _one_line(error: Exception) -> str | None:
    """The message for the user; None for a bug, which deserves a traceback."""
    if isinstance(error, UserError | ReportedError | IncompatibleError):
        return one_line(error, sys.maxsize)
    if isinstance(error, OSError) and error.errno in _OF_THE_SYSTEM:
        return one_line(f"{error.filename or 'the system'}: {error.strerror}", sys.maxsize)
    if is_memory_error(error):
        return f"out of memory: {without_noise(error)}"
    return None


def _run(job: str, words: list[str]) -> None:
    from marlhf.common.third_party_output import hide_loading_bars, quiet_libraries

    if job == "--version":
        from marlhf import __version__

        print(f"marlhf {__version__}")
        return
    quiet_libraries()
    if job in COMMANDS:
        _imported(COMMANDS[job][0])(words)
        return
    if job not in JOBS:
        raise UserError(f"no job is called {job!r}; possible: {', '.join([*JOBS, *COMMANDS])}")
    from marlhf.config.loading import load_config

    config_path, run_path, _ = JOBS[job]
    config_class = _imported(config_path)
    if any(word in ("-h", "--help") for word in words):
        print(job_help(job, config_class))
        return
    # a folder of a sweep may have = in its name
    if not words or ("=" in words[0] and not os.path.isfile(words[0])):
        raise UserError(f"usage: marlhf {job} CONFIG.yaml [key.sub=value ...]")
    config = load_config(config_class, words[0], words[1:])
    if job != "sweep":  # which writes no config.yaml
        _check_file(words[0], config)
    run = _imported(run_path)
    hide_loading_bars()
    try:
        with not_ended():
            run(config)
    except SystemExit as error:  # user code may exit early as if the run were done
        if isinstance(error, Stopped) or error.code not in (None, 0):
            raise
        raise UserError(f"{job}: something {raised(error)} before the end") from error
    except Exception as error:
        if (phase := phase_of(error)) is None:
            raise
        from marlhf.runs.memory_advice import memory_advice

        advice = memory_advice(config, phase)
        line = f"out of memory while {phase}: {without_noise(error)}{advice}"
        raise ReportedError(line) from error


def _check_file(path: str, config: Any) -> None:
    """Check that the given file is not one that the resolved one would replace. Raises UserError.

    A run's own may be given again, to resume it.
    """
    from marlhf.common.errors import UserError
    from marlhf.config.loading import config_to_dict, read_yaml

    folder = os.path.expanduser(str(config.output_dir))
    of_run = os.path.join(folder, "config.yaml")
    if not os.path.exists(of_run) or not os.path.samefile(path, of_run):
        return
    if getattr(config, "overwrite", False):
        raise UserError(
            f"overwrite: given true, which would replace {of_run!r}, the configuration file that "
            "was given; copy it out of output_dir first"
        )
    results = ("metrics.jsonl", "samples.jsonl", "results.json")
    has_results = any(os.path.exists(os.path.join(folder, name)) for name in results)
    if not has_results and read_yaml(path).keys() < config_to_dict(config).keys():
        raise UserError(
            f"output_dir: {folder!r} holds the configuration file that was given, which the "
            "resolved one would replace; give it another name than config.yaml"
        )


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def job_help(job: str, cls: Any) -> str:
    """Every key of a job's configuration, with type, default and meaning."""
    from marlhf.config.loading import config_fields

    lines = [f"usage: marlhf {job} CONFIG.yaml [key.sub=value ...]", "", "keys:"]
    for field in config_fields(cls):
        default = field.default if field.default in ("", "required") else f"default {field.default}"
        head = f"  {field.key}  ({', '.join(part for part in (field.type, default) if part)})"
        body = textwrap.wrap(
            field.description, 92, initial_indent=" " * 6, subsequent_indent=" " * 6
        )
        lines += [head, *body]
    return "\n".join(lines)
