"""The run of `runs_that_die`, started once a rank: `python two_ranks_that_die.py FOLDER FAULT`.

FAULT   none; `update`: rank 1 is killed in its fifth update; `checkpoint`: rank 0 is killed while
        it writes the second checkpoint; `reward`: the reward fails on rank 1 in the third update;
        `learning`: there the token reward fails while it learns, and rank 0 waits for its sums
"""

import itertools
import sys
from pathlib import Path
from typing import Any

import torch

from marlhf.training.learner import Learner
from support.runs import WorkerInstead
from support.runs_that_die import die, trainer


def fails_in_the_third(update: Any) -> Any:
    calls = itertools.count(1)

    def failing(*args: Any) -> Any:
        if next(calls) == 3:
            raise RuntimeError("the learner is out of order")
        return update(*args)

    return failing


def main(folder: Path, fault: str) -> None:
    torch.set_num_threads(1)
    made = trainer(folder)
    rank, real_worker, real_save = made.distributed.rank, made.worker, Learner.save

    def worker(*args: Any, **kwargs: Any) -> Any:
        if fault == "update" and rank == 1 and made.step_count == 4 and not kwargs:
            die()
        return real_worker(*args, **kwargs)

    def save(self: Learner, path: Path) -> None:
        real_save(self, path)
        if fault == "checkpoint" and rank == 0 and path.parent.name == "step-4.partial":
            die()

    if fault == "reward" and rank == 1:
        reward: Any = made.reward.rewards[0].function
        reward.fails_at = 4  # after the evaluation and two updates
    if fault == "learning" and rank == 1:
        curiosity: Any = made.token_reward.rewards[0].reward
        curiosity.update = fails_in_the_third(curiosity.update)
    made.worker = WorkerInstead(made.worker, worker)  # type: ignore[assignment]
    Learner.save = save
    made.train()
    print("zero stage", made.distributed.zero_stage)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
