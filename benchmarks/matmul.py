"""Times the sparse operations against dense, other sparse libraries and the roofline bound.

    python -m benchmarks.matmul                      the most telling cases, in a minute
    python -m benchmarks.matmul --full               every case, in minutes
    python -m benchmarks.matmul --smoke              tiny shapes, in seconds
    python -m benchmarks.matmul --case 2048-8192     the cases whose name contains this
    python -m benchmarks.matmul --device cuda        the cases of a GPU
    python -m benchmarks.activation                  abs_topk against torch.topk + scatter

A row is one operation of one case, or `step`, their sum. A row that is wrong prints FAIL instead
of a speed and makes the exit status 1. Ctrl-C ends the run and keeps the rows.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any, Literal

import torch
import tyro

from benchmarks import baselines, cases, operations, report, run, timing
from benchmarks.cases import HEADLINES, AnyCase, TopkCase
from benchmarks.devices import Device
from benchmarks.operations import Operation
from sparse_kernels import backends

# Seconds of timing for each operation, and a limit (see `timing.interleave`).
SECONDS, SMOKE_SECONDS = (0.3, 0.8), (0.01, math.inf)


@dataclass(frozen=True)
class Options(run.Options):
    operation: Literal["matmul", "abs_topk"] = "matmul"
    """What to measure."""
    full: bool = False
    """Every case, in minutes."""
    case: Annotated[str, tyro.conf.arg(aliases=["--filter"])] = ""
    """Only cases whose name contains these words, such as "1024->4096 M=64"."""
    check: bool = False
    """Only check the results: no times."""
    backend: str | None = None
    """Which backend is ours (default: the fastest that runs on the device)."""


def choose(options: Options, device: Device) -> list[AnyCase]:
    """The cases to run. Ends the program with a sentence if there are none."""
    size = "smoke" if options.smoke else "full" if options.full else "default"
    is_topk = options.operation == "abs_topk"
    every = (cases.topk_cases if is_topk else cases.matmul_cases)(device.name, size)
    words = re.sub(r"(\d)-(\d)", r"\1->\2", options.case).split()  # "1024-4096" too
    wanted = [case for case in every if all(word in str(case) for word in words)]
    if not wanted:
        known = "; ".join(map(str, every[:12])) + ("; ..." if len(every) > 12 else "")
        report.refuse(BENCHMARK.program, f"no case matches the options; there are: {known}")
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
        report.refuse(BENCHMARK.program, f"the backend {backend} cannot run here: {reason}")
    return found


@torch.no_grad()
def measure(case: AnyCase, options: Options, device: Device) -> list[dict[str, Any]]:
    backend = options.backend or device.backend
    if isinstance(case, TopkCase):
        found = operations.forward_and_backward(case, device.name, backend)
    else:
        found = operations.products(case, device.name, backend)
    rows = []
    for operation in found:
        row = {"device": device.name, **case.columns, "product": operation.product}
        row |= {"backend": operation.backend, "threads": torch.get_num_threads()}
        row |= asdict(operation.check()) | {"headline": case in HEADLINES}
        if device.peaks is not None:
            terms = device.peaks.bound_ms(operation.work, case.dtype)
            limit = max(terms, key=lambda term: terms[term])
            row |= {"bound_ms": terms[limit], "bound_limit": limit}
        if row["correct"] and not options.check:
            row |= time_in_turns(operation, device, SMOKE_SECONDS if options.smoke else SECONDS)
        rows.append(row)
    return [*rows, sum_rows(rows)]


def time_in_turns(
    operation: Operation, device: Device, seconds: tuple[float, float]
) -> dict[str, Any]:
    """The columns of a row that say how long ours and its rivals take."""
    rivals, notes = operation.rivals()
    row: dict[str, Any] = dict(notes)
    calls = {"ours": operation.ours, **{name: call for name, (call, _) in rivals.items()}}
    groups: dict[str, list[str]] = {}
    for name, (_, names) in rivals.items():
        for group in names:
            groups.setdefault(group, []).append(name)
    timings = timing.interleave(
        calls, groups.values(), budget_s=seconds[0], limit_s=seconds[1], sampler=device.sample_s
    )
    for group, names in groups.items():
        best = min(names, key=lambda name: timings[name].time_ms)
        row |= {f"{group}_ms": timings[best].time_ms, f"{group}_kind": best}
    columns = {name: asdict(found) for name, found in timings.items()}
    ours = columns.pop("ours")
    return {**row, **ours, "timed": device.clock, "baselines": columns}


def sum_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The `step` row: times and bounds added up, spreads as independent, errors the largest.

    It has a column only where every operation has it.
    """
    combine: dict[str, Callable[[list[Any]], object]] = {
        "spread_ms": lambda values: math.hypot(*values),
        "error": max,
        "torch_error": max,
        "samples": min,
        "correct": min,
    }
    step: dict[str, Any] = {}
    for name, first in rows[0].items():
        if not all(name in row for row in rows) or name == "baselines":
            continue
        values = [row[name] for row in rows]
        if name in combine:
            step[name] = combine[name](values)
        elif name.endswith("_ms"):
            step[name] = sum(values)
        elif isinstance(first, str):
            step[name] = " + ".join(dict.fromkeys(values))
        else:
            step[name] = first
    return step | {"product": "step"}


BENCHMARK = run.Benchmark(
    name="matmul",
    description=__doc__,
    cases=choose,
    measure=measure,
    options=Options,
    missing=lambda options: baselines.missing_peers() if options.operation == "matmul" else [],
)
main = partial(run.main, BENCHMARK)

if __name__ == "__main__":
    sys.exit(main())
