"""State shared by the stages of an evaluation, and how they resume."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from marlhf.config import EvaluateConfig
from marlhf.data.prompts import Prompt
from marlhf.distributed import Distributed
from marlhf.evaluation.policies import PolicySource
from marlhf.evaluation.records import JsonLine, Key, Records
from marlhf.rollout.engine import EngineFactory

SAMPLE_KEY = ("policy", "temperature", "row", "sample")
MEASURE_KEY = (*SAMPLE_KEY, "measure")


@dataclass(frozen=True)
class Bench:
    """An evaluation in progress.

    samples    one record per response, by SAMPLE_KEY
    measures   one number (or null) per response and measure, by MEASURE_KEY
    track      shows progress through a list of batches
    """

    config: EvaluateConfig
    prompts: Sequence[Prompt]
    sources: Sequence[PolicySource]
    samples: Records
    measures: Records
    distributed: Distributed
    engine: EngineFactory
    track: Callable[[Sequence[Any], str], Iterator[Any]]

    def response_keys(self, sources: Sequence[PolicySource] | None = None) -> list[Key]:
        """Keys of all responses of the evaluation, in order."""
        return [
            (source.label, temperature, row, sample)
            for source in (self.sources if sources is None else sources)
            for temperature in self.config.swept_temperatures
            for row in range(len(self.prompts))
            for sample in range(self.config.rollout.responses_per_prompt)
        ]

    def from_main(self, value: Any) -> Any:
        """The main rank's value, on every rank."""
        return self.distributed.gather_objects([value] if self.distributed.is_main else [])[0]

    def record_all(
        self, records: Records, keys: Sequence[Key], label: str, work: Callable[[list[Key]], list]
    ) -> None:
        """Make a record for each key, in batches that all ranks share.

        Each batch is on disk before the next; it has one policy and one temperature. `work` returns
        the lines of this rank's share, without the fields of the key; `label` names the batches.
        """
        size = self.config.rollout.batch_size
        batches = [
            group[start : start + size]
            for group in (list(run) for _, run in groupby(keys, key=lambda key: key[:2]))
            for start in range(0, len(group), size)
        ]
        for batch in self.track(batches, label):
            share = list(batch[self.distributed.rank :: self.distributed.world_size])
            lines: list[JsonLine] = work(share) if share else []
            names = zip(share, lines, strict=True)
            records.append(dict(zip(SAMPLE_KEY, key, strict=True)) | line for key, line in names)

    def measure(
        self,
        name: str,
        fingerprints: Mapping[Key, str],
        prepare: Callable[[], Callable[[list[Key]], list[float | None]]],
    ) -> None:
        """Record a number for each response with none, or with one by another fingerprint.

        prepare   called only if there is work; loads what it needs, returns the measuring function
        """

        def is_known(key: Key) -> bool:
            line = self.measures.lines.get((*key, name))
            return line is not None and line["fingerprint"] == fingerprints[key]

        pending = [key for key in self.response_keys() if not is_known(key)]
        if not pending:
            return
        values_of = prepare()

        def work(keys: list[Key]) -> list[JsonLine]:
            return [
                {"measure": name, "value": value, "fingerprint": fingerprints[key]}
                for key, value in zip(keys, values_of(keys), strict=True)
            ]

        self.record_all(self.measures, pending, name, work)
