"""What the stages of an evaluation share, and how they go on from where they stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from marlhf.config import EvaluateConfig
from marlhf.data.prompts import Prompt
from marlhf.distributed import Distributed
from marlhf.evaluation.policies import Source
from marlhf.evaluation.records import Key, Line, Records

SAMPLE_KEY = ("policy", "temperature", "row", "sample")
MEASURE_KEY = (*SAMPLE_KEY, "measure")


@dataclass(frozen=True)
class Bench:
    """An evaluation under way.

    samples    one record a response, by SAMPLE_KEY
    measures   one number (or null) a response and measure, by MEASURE_KEY
    track      shows how far a list of batches is worked off
    """

    config: EvaluateConfig
    prompts: Sequence[Prompt]
    sources: Sequence[Source]
    samples: Records
    measures: Records
    distributed: Distributed
    track: Callable[[Sequence[Any], str], Iterator[Any]]

    def response_keys(self, sources: Sequence[Source] | None = None) -> list[Key]:
        """Every response wanted, in order."""
        return [
            (source.label, temperature, row, sample)
            for source in (self.sources if sources is None else sources)
            for temperature in self.config.swept_temperatures
            for row in range(len(self.prompts))
            for sample in range(self.config.rollout.responses_per_prompt)
        ]

    def as_main_sees(self, value: Any) -> Any:
        """The main rank's value, on every rank."""
        return self.distributed.gather_objects([value] if self.distributed.is_main else [])[0]

    def work_off(
        self, records: Records, keys: Sequence[Key], what: str, work: Callable[[list[Key]], list]
    ) -> None:
        """Make a record of each key: batch by batch over all ranks, on disk before the next batch.

        A batch is of one policy and one temperature. `work` gives the lines of this rank's share,
        without the key's own fields.
        """
        size = self.config.rollout.batch_size
        batches = [
            group[start : start + size]
            for group in (list(same) for _, same in groupby(keys, key=lambda key: key[:2]))
            for start in range(0, len(group), size)
        ]
        for batch in self.track(batches, what):
            mine = list(batch[self.distributed.rank :: self.distributed.world_size])
            lines: list[Line] = work(mine) if mine else []
            names = zip(mine, lines, strict=True)
            records.append(dict(zip(SAMPLE_KEY, key, strict=True)) | line for key, line in names)

    def measure(
        self,
        name: str,
        fingerprints: Mapping[Key, str],
        prepare: Callable[[], Callable[[list[Key]], list[float | None]]],
    ) -> None:
        """Record a number of each response that has none, or one by another fingerprint.

        prepare   loads what is needed, if anything is to be done, and returns what measures
        """

        def is_known(key: Key) -> bool:
            line = self.measures.lines.get((*key, name))
            return line is not None and line["fingerprint"] == fingerprints[key]

        pending = [key for key in self.response_keys() if not is_known(key)]
        if not pending:
            return
        values_of = prepare()

        def work(keys: list[Key]) -> list[Line]:
            return [
                {"measure": name, "value": value, "fingerprint": fingerprints[key]}
                for key, value in zip(keys, values_of(keys), strict=True)
            ]

        self.work_off(self.measures, pending, name, work)
