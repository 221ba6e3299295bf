"""A run that is killed at any point and resumed writes what one that never stopped writes."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.runs import WorkerInstead, tiny_config
from support.runs_that_die import contents, die, in_child, train, trainer
from support.tiny_models import BYTES_VOCAB, tiny_causal_lm

from marlhf.common.errors import UserError
from marlhf.config.loading import config_from_dict, config_to_dict
from marlhf.config.ppo import PPOConfig
from marlhf.distributed import trained
from marlhf.runs import checkpoint
from marlhf.runs.directory import RunDirectory
from marlhf.runs.sinks import JsonLines, TensorBoard
from marlhf.runs.state import RunState, check_config
from marlhf.training.learner import Learner
from marlhf.training.ppo import PPOTrainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run that never stops writes."""
    folder = tmp_path_factory.mktemp("whole")
    assert in_child(lambda: train(folder)) == 0
    return contents(folder)


def before(owner: Any, name: str, call: int) -> Callable[[], None]:
    """Die before a function is called for the `call`-th time, from 1."""

    def arrange() -> None:
        real, calls = getattr(owner, name), iter(range(1, 10**6))

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == call:
                die()
            return real(*args, **kwargs)

        setattr(owner, name, wrapped)

    return arrange


def half_a_line(number: int) -> Callable[[], None]:
    """Die with half of a line in a file, the `number`-th to be written."""

    def arrange() -> None:
        real, calls = JsonLines.write, iter(range(1, 10**6))

        def write(self: JsonLines, row: Any) -> None:
            if next(calls) == number:
                os.write(self._file.fileno(), b'{"step": 3, "score_me')
                die()
            real(self, row)

        JsonLines.write = write

    return arrange


# Checkpoints follow updates 2, 4, 6 and 7; rows are written for 0, 1, ... 7; 16 samples come first
# and in between: three and then two held-out ones, and two for each update.
POINTS: dict[str, Callable[[], None]] = {
    "before anything was written": before(JsonLines, "write", 1),
    "in the first evaluation's row": half_a_line(3),
    "before the first checkpoint": before(PPOTrainer, "step", 2),
    "within an update": before(Learner, "step", 7),
    "in the middle of a row": half_a_line(14),
    "in the middle of TensorBoard's events": before(TensorBoard, "write", 5),
    "between the row and its checkpoint": before(RunState, "save", 2),
    "between policy and critic in a checkpoint": before(Learner, "save", 4),
    "in the middle of a file of a checkpoint": before(trained, "save_file", 3),
    "before a checkpoint gets its manifest": before(checkpoint, "commit", 2),
    "between the manifest and the new name": before(checkpoint.os, "rename", 2),
    "between the new name and pruning": before(checkpoint, "prune", 3),
    "in the middle of pruning": before(checkpoint.shutil, "rmtree", 1),
    "after the last update": before(PPOTrainer, "save", 1),
    "before final gets its name": before(RunDirectory, "publish", 1),
}


@pytest.mark.parametrize("point", POINTS)
def test_killed_and_resumed_is_as_if_never_killed(
    point: str, whole: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def killed() -> None:
        made = trainer(tmp_path)
        POINTS[point]()
        made.train()

    assert in_child(killed) == -signal.SIGKILL
    assert in_child(lambda: train(tmp_path)) == 0, capfd.readouterr().err
    assert contents(tmp_path) == whole
    assert (tmp_path / "final" / "model.safetensors").is_file()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {
        *("config.yaml", "metrics.jsonl", "samples.jsonl", "tensorboard", "checkpoints", "final")
    }
    assert not list((tmp_path / "checkpoints").glob("*.partial"))


def test_killed_while_cutting_back(whole: dict[str, Any], tmp_path: Path) -> None:
    def killed(arrange: Callable[[], None]) -> Callable[[], None]:
        def work() -> None:
            made = trainer(tmp_path)
            arrange()
            made.train()

        return work

    assert in_child(killed(before(PPOTrainer, "step", 6))) == -signal.SIGKILL
    for call in (2, 3):
        assert in_child(killed(before(os, "truncate", call))) == -signal.SIGKILL
    assert in_child(lambda: train(tmp_path)) == 0
    assert contents(tmp_path) == whole


def test_without_the_state_of_the_generators_it_would_differ(
    whole: dict[str, Any], tmp_path: Path
) -> None:
    """The negative control: the comparison sees a state that was left out."""

    def forgetful() -> None:
        from marlhf.runs import state

        state.set_plugin_generators = lambda state: None
        train(tmp_path)

    assert in_child(lambda: _killed(tmp_path)) == -signal.SIGKILL
    assert in_child(forgetful) == 0
    assert contents(tmp_path)["metrics"][:5] == whole["metrics"][:5]
    assert contents(tmp_path)["metrics"] != whole["metrics"]


def _killed(folder: Path) -> None:
    made = trainer(folder)
    before(PPOTrainer, "step", 6)()
    made.train()


def test_a_damaged_latest_checkpoint_gives_way_to_the_one_before(
    whole: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert in_child(lambda: train(tmp_path)) == 0
    os.truncate(tmp_path / "checkpoints" / "step-7" / "policy" / "weights.safetensors", 100)
    assert in_child(lambda: train(tmp_path)) == 0
    assert contents(tmp_path) == whole
    lines = capfd.readouterr().err.splitlines()
    (damaged,) = [line for line in lines if "is damaged" in line]
    assert "step-7 is damaged and passed over: policy/weights.safetensors has 100 bytes" in damaged
    assert any("resuming from" in line and "step-6" in line for line in lines)


def test_when_all_are_damaged_the_run_is_refused_and_untouched(tmp_path: Path) -> None:
    train(tmp_path)
    was = contents(tmp_path)
    for folder in (tmp_path / "checkpoints").iterdir():
        (folder / "rank-0.pt").unlink()
    with pytest.raises(UserError, match=r"all checkpoints in .* are damaged"):
        trainer(tmp_path)
    assert contents(tmp_path) == was


def test_the_last_and_the_best_checkpoints_are_kept(tmp_path: Path) -> None:
    train(tmp_path, checkpoint={"every": 1, "keep": 1})
    rows = contents(tmp_path)["metrics"]
    scores = {row["step"]: row["eval_score_mean"] for row in rows[1:] if "eval_score_mean" in row}
    best = max(scores, key=lambda step: (scores[step], step))
    kept = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {f"step-{best}", "step-7"}
    found = checkpoint.read(tmp_path / "checkpoints" / f"step-{best}")
    assert found.facts["score"] == scores[best]


def test_a_path_goes_back_to_that_checkpoint(whole: dict[str, Any], tmp_path: Path) -> None:
    train(tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step-6"
    assert in_child(lambda: train(tmp_path / "run", resume=str(path))) == 0
    assert contents(tmp_path / "run") == whole
    # and in a folder of its own, where the files begin after it
    assert in_child(lambda: train(tmp_path / "other", resume=str(path))) == 0
    assert contents(tmp_path / "other")["metrics"] == whole["metrics"][-1:]


def test_a_longer_run_goes_on_from_the_end_of_a_shorter_one(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    alike: dict[str, Any] = {"optimizer": {"schedule": "constant"}, "log": {"eval_every": 3}}
    assert in_child(lambda: train(tmp_path / "long", **alike)) == 0
    assert in_child(lambda: train(tmp_path / "short", steps=3, **alike)) == 0
    shutil.move(tmp_path / "short", tmp_path / "moved")
    capfd.readouterr()
    assert in_child(lambda: train(tmp_path / "moved", **alike)) == 0
    assert "(steps 3 -> 7)" in capfd.readouterr().err
    assert contents(tmp_path / "moved") == contents(tmp_path / "long")


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"seed": 1}, r"differs from that of checkpoint \S+ in seed \(0, now 1\); on a resume"),
        ({"rollout": {"temperature": 0.5}}, r"in rollout\.temperature \(1\.0, now 0\.5\)"),
        ({"ppo": {"epochs": 3}, "seed": 1}, r"in seed \(0, now 1\), ppo\.epochs \(1, now 3\)"),
        ({"segmenter": {"name": "ngram", "n": 4}}, r"in segmenter\.n \(3, now 4\)"),
        ({"steps": 3}, r"steps: given 3, but the checkpoint \S+ to resume is already of update 7"),
        ({"resume": None}, r"already holds a run; .* set resume=auto .* or overwrite=true"),
        ({"resume": "nowhere/step-3"}, r"given 'nowhere/step-3', must be auto or .*step-7, step-6"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_what_cannot_go_on_is_refused_before_anything_is_touched(
    changes: dict[str, Any], fault: str, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    was = contents(finished)
    from marlhf.models import building

    monkeypatch.setattr(building, "build_models", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(UserError, match=fault):
        trainer(finished, **changes)
    assert contents(finished) == was


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    assert in_child(lambda: train(folder)) == 0
    return folder


def test_what_changes_no_result_may_differ(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    made = trainer(
        tmp_path / "run",
        log={"samples": 0, "tensorboard": False},
        optimizer={"micro_batch_size": 3},
        checkpoint={"keep": 5},
    )
    assert made.step_count == 7


def test_keys_that_came_after_a_checkpoint_had_their_defaults_then(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    plain = config_to_dict(config)
    del plain["rollout"]["top_k"], plain["data"]
    old = checkpoint.Checkpoint(tmp_path / "step-1", {"step": 1, "config": plain})
    with pytest.raises(UserError, match=r"in data\.eval_rows \(64, now 0\); on a resume"):
        check_config(config, old)
    plain["rollout"]["top_j"] = 3
    with pytest.raises(UserError, match=r"not one of this version of marlhf: rollout\.top_j"):
        check_config(config, old)


def test_a_checkpoint_may_have_the_old_names_of_keys_and_values(tmp_path: Path) -> None:
    plain = config_to_dict(tiny_config(tmp_path, critic={"backbone": "policy"}))
    config = config_from_dict(PPOConfig, {**plain, "preset": "paper_code"})
    plain["preset"] = "reference"
    plain["critic"]["trunk"] = plain["critic"].pop("backbone")
    old = checkpoint.Checkpoint(tmp_path / "step-1", {"step": 1, "config": plain})
    check_config(config, old)
    plain["critic"]["trunk"] = "own"
    with pytest.raises(UserError, match=r"differs .* in critic\.backbone \('own', now 'policy'\)"):
        check_config(config, old)


def test_resume_and_overwrite_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="resume: given 'auto' with overwrite=true"):
        trainer(tmp_path, overwrite=True)


def test_a_run_without_checkpoints_is_not_silently_begun_again(tmp_path: Path) -> None:
    train(tmp_path, checkpoint={"every": 0})
    assert not (tmp_path / "checkpoints").exists()
    with pytest.raises(UserError, match="holds a finished run without checkpoints"):
        trainer(tmp_path)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_after_the_update_at_work(
    number: int, status: int, whole: dict[str, Any], tmp_path: Path
) -> None:
    def signalled() -> None:
        made = trainer(tmp_path)
        real = made.worker

        def worker(*args: Any, **kwargs: Any) -> Any:
            if (
                made.step_count == 2 and not kwargs
            ):  # in the third update, after which no checkpoint is due
                os.kill(os.getpid(), number)
            return real(*args, **kwargs)

        made.worker = WorkerInstead(made.worker, worker)  # type: ignore[assignment]
        made.train()

    assert in_child(signalled) == status
    assert [row["step"] for row in contents(tmp_path)["metrics"]] == [0, 1, 2, 3]
    assert (tmp_path / "checkpoints" / "step-3").is_dir()
    assert in_child(lambda: train(tmp_path)) == 0
    assert contents(tmp_path) == whole


def test_two_runs_do_not_write_in_one_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks may live on after their launcher was killed, and write beside the resumed run."""
    from marlhf.runs import directory

    monkeypatch.setattr(directory, "PATIENCE", 0.3)
    alive = trainer(tmp_path)
    alive.run_dir.open(alive.config, 7)
    assert in_child(lambda: refused(tmp_path)) == 0
    alive.run_dir.close()
    assert trainer(tmp_path).step_count == 0


@pytest.mark.parametrize("before", [{}, {"resume": None}, {"resume": None, "overwrite": True}])
def test_a_run_that_ended_while_this_one_was_loading_is_not_written_over(
    before: dict[str, Any], tmp_path: Path
) -> None:
    late = trainer(tmp_path, **before)
    assert in_child(lambda: train(tmp_path, steps=2)) == 0
    written = contents(tmp_path)
    with pytest.raises(UserError, match=r"another process has written in .* start it again"):
        late.train()
    assert contents(tmp_path) == written
    assert (tmp_path / "final").is_dir()
    assert trainer(tmp_path).step_count == 2, "the folder is free, and the run can go on"


def refused(folder: Path) -> None:
    with pytest.raises(UserError, match="another process is writing in"):
        trainer(folder)


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    from marlhf.common import signals

    def signalled() -> None:
        signals._ONE_KEYSTROKE = -1.0
        made = trainer(tmp_path)

        def worker(*_: Any, **__: Any) -> Any:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("went on")

        made.worker = WorkerInstead(made.worker, worker)  # type: ignore[assignment]
        made.train()

    assert in_child(signalled) == 130
    assert not (tmp_path / "checkpoints").exists()


def test_the_reference_of_a_resumed_run_is_the_first_policy(tmp_path: Path) -> None:
    """And not the policy of the checkpoint, from which the KL would then be measured."""
    train(tmp_path)
    made = trainer(tmp_path)
    fresh = tiny_causal_lm("llama", BYTES_VOCAB).state_dict()
    assert made.reference is not None
    for name, value in made.reference.model.state_dict().items():
        assert (value == fresh[name]).all()
