"""How benchmarks.training and benchmarks.inference run: options, groups of cases, rows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import tyro

from benchmarks import devices, report, timing
from benchmarks import run as runner
from benchmarks.timing import Timing
from benchmarks.transformer import results
from benchmarks.transformer.jobs import Job
from benchmarks.transformer.profile import measure_parts, measure_peak_mb
from benchmarks.transformer.variants import Case, why_no_bf16_dense
from sparse_kernels import cpu
from sparse_transformer.train.topology import TopologyConfig

# Seconds of timing for a group. Its cases share them; each has at least three samples before the
# limit, however long they take.
BUDGET_S, LIMIT_S, SMOKE_BUDGET_S = 30.0, 45.0, 0.01
# Calls of each case that are split into parts; a slow step is disturbed less, and is split once.
SPLIT_CALLS, SLOW_STEP_MS = 3, 1000.0


@dataclass(frozen=True)
class Options:
    """Options of the command line."""

    smoke: bool = False
    """Tiny models, in seconds."""
    json: Path | None = None
    """Write the rows to this file."""
    plot: Path | None = None
    """Draw a plot into this PNG."""
    threads: int | None = None
    """torch.set_num_threads."""
    device: Literal["cpu", "cuda"] = "cpu"


@dataclass(frozen=True)
class Group:
    """Cases that take turns, all in memory at once; `memory`: their peak memory is measured too."""

    name: str
    cases: tuple[Case, ...]
    memory: bool = False

    def __str__(self) -> str:
        return f"{self.name}: {len(self.cases)} variants in turns"


AnyOptions = TypeVar("AnyOptions")
Make = Callable[[Case], Job]


def parse(
    kind: type[AnyOptions], name: str, description: str | None, arguments: Sequence[str] | None
) -> tuple[AnyOptions, list[str]]:
    """The options, and the words after `python`. Refuses what cannot be done; sets the threads."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    program = f"python -m benchmarks.{name}"
    config = (tyro.conf.UseAppendAction,)
    options = tyro.cli(kind, prog=program, description=description, args=words, config=config)
    checks: dict[str, Callable[[Any], str | None]] = {
        "json": report.why_not_writable,
        "plot": report.why_no_plot,
        "device": devices.why_not,
        "threads": lambda count: None if count >= 1 else f"it must be at least 1, got {count}",
    }
    given = {name: value for name, value in vars(options).items() if value is not None}
    for option, value in given.items():
        if option in checks and (reason := checks[option](value)):
            report.refuse(program, f"--{option}: {reason}")
    if "threads" in given:
        torch.set_num_threads(given["threads"])
    return options, ["-m", f"benchmarks.{name}", *words]


def run(groups: Sequence[Group], make: Make, options: Options, command: Sequence[str]) -> int:
    """Measures the groups in order, prints and writes; returns the exit status."""
    if options.device == "cpu" and not cpu.isas():
        report.refuse(command[1], "the C++ extension is missing: build it with `pip install .`")
    dense = [case for group in groups for case in group.cases if case.is_bf16_dense]
    is_judged = dense and options.device == "cpu" and not options.smoke
    reason = why_no_bf16_dense(dense[0]) if is_judged else None
    if reason is not None:
        print(reason, flush=True)
        kept = [tuple(case for case in g.cases if not case.is_bf16_dense) for g in groups]
        groups = [replace(g, cases=cases) for g, cases in zip(groups, kept, strict=True)]
    outcome = runner.run(
        groups,
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


@torch.enable_grad()
def measure_group(group: Group, make: Make, options: Options) -> list[dict[str, Any]]:
    """The rows of a group."""
    with report.progress(total=3 * len(group.cases)) as bar:

        def each(doing: str) -> Iterator[Case]:
            for case in group.cases:
                bar.set_description(f"{doing} {case}")
                yield case
                bar.update()

        chosen = group.cases[: 1 if options.smoke else None] if group.memory else ()
        peaks = {c: measure_peak_mb(c, options.device) for c in each("memory of") if c in chosen}
        jobs = {case: make(case) for case in each("check")}
        bar.set_description(str(group))
        calls = {
            f"{name} {case}": call
            for case, job in jobs.items()
            if job.failure is None
            for name, call in job.calls.items()
        }
        # The first call pays for pages, optimizer state and lazily built schedules. It does not
        # count as a sample, however slow the case is.
        first_s = {name: timing.sample_s(call) for name, call in calls.items()}
        timings = timing.interleave(
            calls,
            budget_s=SMOKE_BUDGET_S if options.smoke else BUDGET_S,
            limit_s=LIMIT_S,
            estimates={name: min(s, timing.VERY_SLOW_S) for name, s in first_s.items()},
        )
        return [
            describe(jobs[case], timings, 1 if options.smoke else SPLIT_CALLS)
            | {"part": group.name, "peak_mb": peaks.get(case)}
            for case in each("parts of")
        ]


def describe(job: Job, timings: Mapping[str, Timing], split_calls: int) -> dict[str, Any]:
    """The row of a case.

    A step has its share of the rewiring: what that adds to two ordinary steps, over the period.
    """
    case = job.case
    row = {
        **case.columns(),
        **dict.fromkeys(results.TIMED),
        **job.verdict._asdict(),
        "device": job.device,
        "threads": torch.get_num_threads(),
        "l0": job.l0(),
        "correct": job.failure is None,
        "failure": job.failure,
    }
    if job.failure is not None:
        return row
    step, rewiring = timings[f"step {case}"], timings.get(f"rewiring {case}")
    change_ms = rewiring.median_ms - 2 * step.median_ms if rewiring else 0.0
    share_ms = change_ms / TopologyConfig.period
    step_ms = step.median_ms + share_ms
    # The quickest call is the one that other processes disturbed least. Its parts are scaled to add
    # up to the time without the profiler.
    count = split_calls if step.median_ms < SLOW_STEP_MS else 1
    split = [measure_parts(job.calls["step"], job.device) for _ in range(count)]
    quickest = min(split, key=lambda parts: sum(parts.values()))
    factor = step.median_ms / sum(quickest.values())
    parts_ms = {part: factor * ms for part, ms in quickest.items()}
    parts_ms["topology"] += share_ms
    return row | {
        "step_ms": step_ms,
        "tokens_per_s": 1e3 * job.tokens.numel() / step_ms,
        "ordinary_ms": step.median_ms,
        "rewiring_ms": step.median_ms + change_ms if rewiring else None,
        "period": TopologyConfig.period if rewiring else None,
        "spread_ms": step.spread_ms,
        "samples": step.samples,
        "parts_ms": parts_ms,
        "loss": job.loss,
        **job.state_mb(),
    }
