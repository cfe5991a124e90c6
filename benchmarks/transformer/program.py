"""How benchmarks.training and benchmarks.inference run: options, groups of cases, rows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import tyro

from benchmarks import devices, report, timing
from benchmarks import run as runner
from benchmarks.timing import Timing
from benchmarks.transformer import results
from benchmarks.transformer.jobs import Job, Training
from benchmarks.transformer.memory import measure_peak_mb
from benchmarks.transformer.parts import measure_parts
from benchmarks.transformer.variants import Case, why_no_bf16_dense
from sparse_kernels import cpu
from sparse_transformer.topology import TopologyConfig

# Seconds of timing for a group: each case has its share, and at least three samples up to a limit.
BUDGET_S, LIMIT_S, SMOKE_BUDGET_S = 60.0, 90.0, 0.01
# Calls of each case that are split into parts.
SPLIT_CALLS = 3


@dataclass(frozen=True)
class Options:
    """Options of the command line."""

    smoke: bool = False
    """Tiny models, in seconds."""
    json: Path | None = None
    """Write the rows to this file."""
    plot: Path | None = None
    """Draw the sweeps over L0 and width into this PNG."""
    threads: int | None = None
    """torch.set_num_threads."""
    device: str = "cpu"
    """cpu or cuda."""


@dataclass(frozen=True)
class Group:
    """Cases that take turns, all of them in memory at once; of some the peak memory is measured."""

    name: str
    cases: tuple[Case, ...]
    memory: bool = False

    def __str__(self) -> str:
        return f"{self.name}: {len(self.cases)} variants in turns"


AnyOptions = TypeVar("AnyOptions", bound=Options)
Make = Callable[[Case], Job]


def parse(
    kind: type[AnyOptions], name: str, description: str | None, arguments: Sequence[str] | None
) -> tuple[AnyOptions, list[str]]:
    """The options, and the words after `python`. Refuses what cannot be done; sets the threads."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    program = f"python -m benchmarks.{name}"
    options = tyro.cli(kind, prog=program, description=description, args=words)
    if options.threads is not None and options.threads < 1:
        report.refuse(program, f"--threads must be at least 1, got {options.threads}")
    if options.json is not None and (reason := report.why_not_writable(options.json)):
        report.refuse(program, f"--json: {reason}")
    if options.plot is not None and (reason := report.why_no_plot(options.plot)):
        report.refuse(program, f"--plot: {reason}")
    if reason := devices.why_not(options.device):
        report.refuse(program, f"--device {options.device}: {reason}")
    if options.device == "cpu" and not cpu.isas():
        report.refuse(program, "the C++ extension is missing: build it with `pip install .`")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return options, ["-m", f"benchmarks.{name}", *words]


def run(groups: Sequence[Group], make: Make, options: Options, command: Sequence[str]) -> int:
    """Measures the groups in order, prints and writes; returns the exit status."""
    outcome = runner.run(
        without_slow_bf16(groups, options.device),
        lambda group: measure_group(group, make, options),
        lambda rows: f"{results.table(rows)}\n",
        devices.connect(options.device),
        command=command,
        smoke=options.smoke,
        json=options.json,
    )
    print("", *results.sentences(outcome.rows), sep="\n", flush=True)
    if options.plot is not None:
        results.draw(outcome.rows, options.plot, report.machine_line(outcome.machine))
    return outcome.status


def without_slow_bf16(groups: Sequence[Group], device: str) -> list[Group]:
    """The groups; without dense bfloat16 where the processor is too slow at it, with a sentence."""

    def is_dense_bf16(case: Case) -> bool:
        return case.dtype == "bfloat16" and case.variant.linear != "sparse"

    dense = [case for group in groups for case in group.cases if is_dense_bf16(case)]
    reason = why_no_bf16_dense(dense[0]) if dense and device == "cpu" else None
    if reason is None:
        return list(groups)
    print(reason, flush=True)
    return [
        Group(g.name, tuple(case for case in g.cases if not is_dense_bf16(case)), g.memory)
        for g in groups
    ]


@torch.enable_grad()
def measure_group(group: Group, make: Make, options: Options) -> list[dict[str, Any]]:
    """The rows of a group."""
    peaks: list[float | None] = []
    jobs: list[Job] = []
    timed: dict[str, timing.Candidate] = {}
    estimates: dict[str, float] = {}
    with report.progress(total=3 * len(group.cases)) as bar:
        for number, case in enumerate(group.cases):
            bar.set_description(f"memory: {case}")
            is_measured = group.memory and (number == 0 or not options.smoke)
            peaks.append(measure_peak_mb(case, options.device) if is_measured else None)
            bar.update()
        for number, case in enumerate(group.cases):
            bar.set_description(f"check: {case}")
            job = make(case)
            jobs.append(job)
            calls: dict[str, timing.Candidate] = {}
            if job.failure is None:
                if isinstance(job, Training) and job.topology is not None:
                    calls[f"{number} rewiring"] = job.rewire
                calls[f"{number}"] = job.step
            timed |= calls
            # The first call pays for pages, optimizer state and lazily built schedules. No case is
            # so slow that it keeps this estimate as its only sample.
            warm = {name: timing.sample_s(call) for name, call in calls.items()}
            estimates |= {name: min(seconds, timing.VERY_SLOW_S) for name, seconds in warm.items()}
            bar.update()
        bar.set_description(str(group))
        timings = timing.interleave(
            timed,
            budget_s=SMOKE_BUDGET_S if options.smoke else BUDGET_S,
            limit_s=LIMIT_S,
            estimates=estimates,
        )
        rows = []
        for number, (job, peak_mb) in enumerate(zip(jobs, peaks, strict=True)):
            bar.set_description(f"parts: {job.case}")
            row = describe(job, group.name) | {"peak_mb": peak_mb}
            if job.failure is None:
                row |= columns(job, timings[f"{number}"], timings.get(f"{number} rewiring"))
            rows.append(row)
            bar.update()
    return rows


def describe(job: Job, part: str) -> dict[str, Any]:
    """A row with nothing measured yet."""
    return {
        **job.case.columns(),
        "part": part,
        "device": job.device,
        "threads": torch.get_num_threads(),
        "l0": job.l0(),
        "correct": job.failure is None,
        "failure": job.failure,
        "error": job.verdict.error if job.verdict else None,
        "dense_error": job.verdict.dense_error if job.verdict else None,
        **dict.fromkeys(results.TIMED),
    }


def columns(job: Job, taken: Timing, rewiring: Timing | None) -> dict[str, Any]:
    """The columns of a row that is correct.

    A step has its share of the rewiring: what that adds to two ordinary steps, over the period.
    """
    change_ms = 0.0 if rewiring is None else rewiring.median_ms - 2 * taken.median_ms
    period = TopologyConfig.period
    step_ms = taken.median_ms + change_ms / period
    parts_ms = None
    if not job.case.variant.compiled:
        # The quickest call is the one that other processes disturbed least. Its parts are scaled to
        # add up to the time without the profiler.
        split = [measure_parts(job.step, job.device) for _ in range(SPLIT_CALLS)]
        quickest = min(split, key=lambda parts: sum(parts.values()))
        factor = taken.median_ms / sum(quickest.values())
        parts_ms = {part: factor * ms for part, ms in quickest.items()}
        parts_ms["topology"] += change_ms / period
    return {
        "step_ms": step_ms,
        "tokens_per_s": 1e3 * job.tokens.numel() / step_ms,
        "ordinary_ms": taken.median_ms,
        "rewiring_ms": None if rewiring is None else taken.median_ms + change_ms,
        "period": None if rewiring is None else period,
        "spread_ms": taken.spread_ms,
        "samples": taken.samples,
        "parts_ms": parts_ms,
        "loss": job.loss,
        **job.state_mb(),
    }
