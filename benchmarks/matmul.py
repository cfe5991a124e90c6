"""Times the three sparse products against dense, other sparse libraries and the roofline bound.

    python -m benchmarks.matmul                      the cases with a goal, in about 80 seconds
    python -m benchmarks.matmul --full               every layer of every published width; hours
    python -m benchmarks.matmul --smoke              tiny shapes, in seconds
    python -m benchmarks.matmul --case 2048-8192     the cases whose name contains this
    python -m benchmarks.matmul --device cuda        the cases of a GPU

A row is one product of one case, or `step`, the sum of the three. A row that is wrong prints FAIL
instead of a speed and makes the exit status 1. Ctrl-C ends the run and keeps the rows.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from benchmarks import devices, report, tables
from benchmarks import run as runner
from benchmarks.cases import CPU_DTYPES, PRODUCTS, REGISTRY, Case, wide_cases
from benchmarks.timing import Budget
from sparse_kernels import backends
from sparse_kernels.layout import Problem

PROGRAM = "python -m benchmarks.matmul"
# Seconds of measuring for each product of a case, once everything is warm.
BUDGET = Budget(seconds=0.4, limit_s=1.2)
FULL_BUDGET = Budget(seconds=0.6)
SMOKE_BUDGET = Budget(seconds=0.01)


@dataclass(frozen=True)
class Options:
    """Options of the command line."""

    smoke: bool = False
    """Tiny shapes, in seconds."""
    full: bool = False
    """Every published shape; hours."""
    wide: bool = False
    """Every block, dtype and a range of densities; minutes."""
    case: Annotated[str, tyro.conf.arg(aliases=["--filter"])] = ""
    """Only cases whose name contains these words, such as "1024->4096 bfloat16" or "2048,8192"."""
    tokens: int | None = None
    """Only cases of so many tokens (M)."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Only cases of this dtype."""
    goals: bool | None = None
    """Only the cases with a goal, or with --no-goals only the others."""
    json: Path | None = None
    """Write the rows to this file."""
    plot: Path | None = None
    """Draw speed-up against density into this PNG."""
    threads: int | None = None
    """torch.set_num_threads."""
    repeats: int | None = None
    """Samples of each call, in place of a time budget."""
    device: str = "cpu"
    """cpu or cuda."""
    backend: str | None = None
    """Which backend is ours (default: the fastest that runs on the device)."""


def choose_cases(options: Options) -> list[Case]:
    """The cases to run. Ends the program with a sentence if an option cannot be met."""
    if reason := devices.why_not(options.device):
        report.refuse(PROGRAM, f"--device {options.device}: {reason}")
    if options.smoke + options.full + options.wide > 1:
        report.refuse(PROGRAM, "--smoke, --full and --wide exclude each other; use one")
    for name in ("tokens", "threads", "repeats"):
        value = getattr(options, name)
        if value is not None and value < 1:
            report.refuse(PROGRAM, f"--{name} needs a positive whole number, got {value}")
    if options.json is not None and (reason := report.why_not_writable(options.json)):
        report.refuse(PROGRAM, f"--json: {reason}")
    if options.plot is not None and (reason := report.why_no_plot(options.plot)):
        report.refuse(PROGRAM, f"--plot: {reason}")
    if options.device == "cpu" and options.dtype not in (None, *CPU_DTYPES):
        report.refuse(PROGRAM, f"--dtype {options.dtype}: the CPU kernels have no {options.dtype}")
    size = "smoke" if options.smoke else "full" if options.full else "default"
    every = REGISTRY[options.device, size]()
    if options.wide and options.device == "cpu":
        every = wide_cases()
    cases = [
        case
        for case in every
        if all(word in _names(case) for word in options.case.split())
        and options.tokens in (None, case.tokens)
        and options.dtype in (None, case.dtype)
        and options.goals in (None, case.has_goal)
    ]
    if not cases:
        known = "; ".join(map(str, every[:12])) + ("; ..." if len(every) > 12 else "")
        report.refuse(PROGRAM, f"no case matches the options; there are: {known}")
    if options.backend is not None:
        if options.backend not in backends.NAMES:
            names = ", ".join(backends.NAMES)
            report.refuse(PROGRAM, f"--backend must be one of {names}, got {options.backend!r}")
        reasons = {case: _why_not(options.backend, case, options.device) for case in cases}
        cases = [case for case in cases if reasons[case] is None]
        if not cases:
            reason = next(iter(reasons.values()))
            report.refuse(PROGRAM, f"the backend {options.backend} cannot run here: {reason}")
        for case, reason in reasons.items():
            if reason is not None:
                print(f"{case} is left out: {reason}")
    return cases


def _names(case: Case) -> str:
    """Every spelling that --case finds."""
    comma = f"{case.in_features},{case.out_features},{case.fan_in}"
    return f"{case} {case.in_features}-{case.out_features} {comma}"


def _why_not(backend: str, case: Case, device: str) -> str | None:
    """None if the backend can run every product of the case on that device, else a sentence."""
    sizes = (case.out_features, case.in_features, case.fan_in, case.block)
    problems = (Problem(device, case.torch_dtype, product, *sizes) for product in PRODUCTS)
    return next(filter(None, (backends.why_not(backend, p) for p in problems)), None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; `arguments` are the words after the module's name."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = tyro.cli(Options, prog=PROGRAM, description=__doc__, args=words)
    cases = choose_cases(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = devices.connect(options.device)
    backend = device.backend if options.backend is None else options.backend
    budget = SMOKE_BUDGET if options.smoke else BUDGET
    if options.full or options.wide or options.device == "cuda":
        budget = FULL_BUDGET
    if options.repeats is not None:
        budget = Budget(repeats=options.repeats)
    outcome = runner.run(
        cases,
        lambda case: runner.measure_case(case, backend, device, budget),
        tables.case_line,
        device,
        command=["-m", "benchmarks.matmul", *words],
        smoke=options.smoke,
        json=options.json,
    )
    if outcome.rows:
        print("", *tables.goal_lines(outcome.rows), "", *tables.sentences(outcome.rows), sep="\n")
        if options.plot is not None:
            tables.draw(outcome.rows, options.plot, report.machine_line(outcome.machine))
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
