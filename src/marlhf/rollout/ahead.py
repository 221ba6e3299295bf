"""Sampling one update ahead: the next update's responses, while this one's train.

    update k:   take the responses of k    begin those of k+1    train    wait    new weights

Those of k+1 come from the weights before update k, so that the policy that trains on them is one
update on. The loss corrects for it: by importance weights policy / engine, the ratio being taken to
the policy at the start of the update (decoupled PPO, Hilton et al. 2022, "Batch size-invariance for
policy optimization"), or by the engine's probabilities in the ratio itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from marlhf.common.errors import UserError
from marlhf.common.types import Generation
from marlhf.config import RolloutSettings
from marlhf.distributed import Distributed
from marlhf.rollout.engine import AheadEngine
from marlhf.rollout.transformers_engine import left_pad


@dataclass(frozen=True)
class Request:
    """What an engine is asked for in an update.

    row_ids   indices in the global batch of update `step`
    """

    step: int
    ids: Sequence[Sequence[int]]
    seeds: Sequence[int]
    row_ids: Sequence[int]


class Ahead:
    """Samples one update ahead; its state is the responses at hand.

    upcoming   this rank's request of an update; None after the last one
    keeps      whether checkpoints are written, which need the responses of all ranks
    """

    def __init__(
        self,
        engine: AheadEngine,
        settings: RolloutSettings,
        distributed: Distributed,
        pad_id: int,
        upcoming: Callable[[int], Request | None],
        keeps: bool,
    ) -> None:
        self._engine, self._settings, self._distributed = engine, settings, distributed
        self._pad_id, self._upcoming, self._keeps = pad_id, upcoming, keeps
        self._begun: tuple[Request, Callable[[], Generation]] | None = None
        self._rows: dict[str, Any] | None = None  # of the update to come, of all ranks

    def __call__(self, request: Request) -> tuple[Generation, int]:
        """Responses to a request and their lag in updates; begins those of the next one."""
        generation, lag = self._taken(request), 1
        if generation is None:
            generation = self._engine.generate(request.ids, request.seeds, self._settings)
            lag = 0
        self._rows = None
        if (following := self._upcoming(request.step + 1)) is not None:
            wait = self._engine.begin(following.ids, following.seeds, self._settings)
            self._begun = following, wait
        return generation, lag

    def finish(self) -> None:
        """Wait for what was begun, on all ranks, before the weights change."""
        ready: Generation | None = None
        if self._begun is not None:
            request, wait = self._begun
            ready = self._distributed.fail_together(wait)
            self._begun = request, lambda: ready
        if ready is not None and self._keeps:
            parts = self._distributed.gather_objects([_rows(ready)])
            step = self._begun[0].step if self._begun else 0
            names = [name for name, rows in parts[0].items() if rows is not None]
            self._rows = {name: torch.cat([part[name] for part in parts]) for name in names}
            self._rows["step"] = step

    def state_dict(self) -> dict[str, Any]:
        """The responses of the update to come, of all ranks; empty before the first."""
        return {} if self._rows is None else self._rows

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume with the responses of `state`."""
        self._begun, self._rows = None, dict(state) or None

    def _taken(self, request: Request) -> Generation | None:
        """The responses that were sampled ahead for a request, if any. Raises UserError."""
        if self._begun is not None:
            (begun, wait), self._begun = self._begun, None
            if (begun.step, begun.ids, begun.seeds) != (request.step, request.ids, request.seeds):
                raise UserError(
                    "rollout.ahead: given 1, which samples the prompts of the data in their order; "
                    "step() was given others: use train(), or ahead=0"
                )
            return wait()
        if self._rows is not None and self._rows["step"] == request.step:
            return self._restored(self._rows, request)
        return None

    def _restored(self, rows: Mapping[str, Any], request: Request) -> Generation:
        """This rank's responses from those of all ranks."""
        first, stop = request.row_ids[0], request.row_ids[-1] + 1
        lengths = rows["lengths"].tolist()
        mine = slice(sum(lengths[:first]), sum(lengths[:stop]))
        lengths_B = rows["lengths"][first:stop]
        mask = torch.arange(int(lengths_B.max())) < lengths_B[:, None]

        def padded(values: Tensor, fill: float) -> Tensor:
            table = torch.full(mask.shape, fill, dtype=values.dtype)
            table[mask] = values[mine]
            return table

        tensors = [
            *left_pad(request.ids, self._pad_id),
            padded(rows["tokens"], self._pad_id),
            mask,
            rows["finished"][first:stop],
        ]
        if "logprobs" in rows:
            tensors.append(padded(rows["logprobs"], 0.0))
        return Generation(*(x.to(self._distributed.device) for x in tensors))


def _rows(generation: Generation) -> dict[str, Tensor | None]:
    """Responses without padding, one after the other."""
    mask, logprobs = generation.response_mask, generation.logprobs
    rows = {
        "lengths": generation.lengths,
        "tokens": generation.response_ids[mask],
        "finished": generation.finished,
        "logprobs": None if logprobs is None else logprobs[mask],
    }
    return {name: None if x is None else x.cpu() for name, x in rows.items()}
