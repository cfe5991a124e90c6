"""Times the sparse products against dense, other sparse libraries and the roofline bound.

    python -m benchmarks.matmul                      the most telling cases, in a minute
    python -m benchmarks.matmul --full               every case, in minutes
    python -m benchmarks.matmul --smoke              tiny shapes, in seconds
    python -m benchmarks.matmul --case 2048-8192     the cases whose name contains this
    python -m benchmarks.matmul --device cuda        the cases of a GPU
    python -m benchmarks.activation                  the same for abs_topk

A row is one product of one case, or `step`, their sum. A row that is wrong prints FAIL instead of a
speed and makes the exit status 1. Ctrl-C ends the run and keeps the rows.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks import baselines, cases, operations, report, run
from benchmarks.cases import AnyCase
from benchmarks.devices import Device
from sparse_kernels import backends


@dataclass(frozen=True)
class Options(run.Options):
    full: bool = False
    """Every case, in minutes."""
    case: str = ""
    """Only cases whose name contains these words, such as "1024->4096 M=64"."""
    check: bool = False
    """Only check the results: no times."""
    backend: str | None = None
    """Which backend is ours (default: the fastest that runs on the device)."""


def choose(name: str, options: Options, device: Device) -> list[AnyCase]:
    """The cases of the benchmark `name` that are run. Ends the program if there are none."""
    size = "smoke" if options.smoke else "full" if options.full else "default"
    every = cases.CASES[name](device.name, size)
    words = re.sub(r"(\d)-(\d)", r"\1->\2", options.case).split()  # "1024-4096" too
    wanted = [case for case in every if all(word in str(case) for word in words)]
    program = f"python -m benchmarks.{name}"
    if not wanted:
        known = "; ".join(map(str, every[:12])) + ("; ..." if len(every) > 12 else "")
        report.refuse(program, f"no case matches the options; there are: {known}")
    backend = options.backend or device.backend
    found, reason = [], None
    for case in wanted:
        problems = case.problems(device.name) if backend else []
        reasons = (backends.why_not(str(backend), problem) for problem in problems)
        if reason := next(filter(None, reasons), None):
            print(f"{case} is left out: {reason}")
        else:
            found.append(case)
    if not found:
        report.refuse(program, f"the backend {backend} cannot run here: {reason}")
    return found


def measure(case: AnyCase, options: Options, device: Device) -> list[dict[str, Any]]:
    """The rows of a case on one backend: as in a layer, that of the forward runs all products."""
    problem = case.problems(device.name)[0]
    backend = options.backend or device.backend or backends.choose(problem)
    limits = operations.SMOKE if options.smoke else operations.Limits()
    return list(operations.measure(case, device, [backend], None if options.check else limits))


main = run.Benchmark(
    name="matmul",
    description=__doc__,
    cases=partial(choose, "matmul"),
    measure=measure,
    options=Options,
    missing=lambda options: baselines.missing_peers(),
)

if __name__ == "__main__":
    sys.exit(main())
