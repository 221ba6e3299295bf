"""Early stopping of supervised training, with the best weights restored."""

from __future__ import annotations

import json
import math
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from marlhf.common.state_files import check_weights, read_numbers
from marlhf.compat.deepspeed import complete_shape
from marlhf.distributed import Distributed

_WEIGHTS = "trained.safetensors"


class EarlyStopping:
    """Ends training after `patience` evaluations without a new lowest held-out metric.

    `restore` loads the weights of the lowest one. Without patience, every method is a no-op.
    """

    def __init__(self, module: nn.Module, patience: int | None, distributed: Distributed) -> None:
        self._module, self._patience, self._distributed = module, patience, distributed
        self._best, self._stale = math.inf, 0
        self._weights: dict[str, Tensor] = {}  # on the main rank

    @property
    def is_over(self) -> bool:
        """Whether the metric has had no new minimum for `patience` evaluations."""
        return self._patience is not None and self._stale >= self._patience

    def record(self, value: float) -> None:
        """Record an evaluation, and keep the weights if it is the best."""
        if self._patience is None:
            return
        if value < self._best:
            self._best, self._stale = value, 0
            self._weights = self._distributed.trained_weights(self._module)
        else:
            self._stale += 1

    def restore(self) -> None:
        """Restore the best weights, if there are any."""
        if self._best < math.inf:
            self._distributed.set_trained_weights(self._module, self._weights)

    def save(self, folder: Path) -> None:
        """Write the best weights, their metric and the evaluations since."""
        if self._distributed.is_main:
            folder.mkdir()
            save_file(self._weights, folder / _WEIGHTS)
            state = {"best": self._best, "stale": self._stale}
            (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Resume from the files of `save`. Raises UserError, or PeerError, on all ranks."""
        self._distributed.fail_together(lambda: self._read(folder))

    def _read(self, folder: Path) -> None:
        state = read_numbers(folder / "state.json", {"best": (int, float), "stale": int})
        self._best, self._stale = state["best"], state["stale"]
        if self._distributed.is_main:
            self._weights = load_file(folder / _WEIGHTS)
            trained = {n: p for n, p in self._module.named_parameters() if p.requires_grad}
            shapes = {n: complete_shape(p) for n, p in trained.items()}
            check_weights(self._weights, shapes if self._weights or self._best < math.inf else {})
