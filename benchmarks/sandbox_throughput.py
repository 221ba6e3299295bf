"""Programs a second that the sandbox runs, against the number of workers.

    python benchmarks/sandbox_throughput.py [--workers 1 2 4] [--programs N] [--json FILE]

Four kinds of job: a program that reads and prints one line; the same with ten stdins; a function
called ten times in one process; and a function checked as in HumanEval, in two jails. The programs
do next to nothing, so this is what the sandbox itself costs. The servers' start is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

from marlhf.rewards.sandbox import Calls, Check, Job, Sandbox, Script

ECHO = "print(int(input()) + 1)"
FUNCTION = "def f(x):\n    return x + 1\n"
JOBS: dict[str, Job] = {
    "script": Script(ECHO, ("1",)),
    "script, 10 stdins": Script(ECHO, tuple("0123456789")),
    "10 calls": Calls(FUNCTION, "f", tuple((x,) for x in range(10))),
    "check": Check(FUNCTION, "f", "def check(f):\n    assert f(1) == 2\n"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    cpus = os.cpu_count() or 1
    parser.add_argument("--workers", type=int, nargs="+", default=sorted({1, cpus, 2 * cpus}))
    parser.add_argument("--programs", type=int, default=200, help="of each kind")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()

    print(f"{'workers':>7} " + " ".join(f"{name:>18}" for name in JOBS))
    rows = []
    for workers in options.workers:
        with Sandbox(workers=workers) as sandbox:
            rates = {name: rate(sandbox, job, options.programs) for name, job in JOBS.items()}
        rows.append({"workers": workers, **rates})
        print(f"{workers:7} " + " ".join(f"{r:18.1f}" for r in rates.values()), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def rate(sandbox: Sandbox, job: Job, programs: int) -> float:
    """Jobs of one kind a second, all of which must go well."""
    sandbox.run([job] * sandbox.workers)
    started = time.perf_counter()
    outcomes = sandbox.run([job] * programs)
    seconds = time.perf_counter() - started
    assert {outcome.status for outcome in outcomes} == {"ok"}
    return programs / seconds


if __name__ == "__main__":
    main()
