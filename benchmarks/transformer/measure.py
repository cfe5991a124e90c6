"""Measures a group of cases: time and peak memory."""

from __future__ import annotations

import multiprocessing
import resource
import signal
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import baselines, report, timing
from benchmarks.devices import Device
from benchmarks.run import Options
from benchmarks.timing import Timing
from benchmarks.transformer.jobs import SMOKE_MODEL, Case, Group, Job, make_job
from sparse_kernels import cpu
from sparse_transformer import keep_freed_memory
from sparse_transformer.train.topology import TopologyConfig

# Seconds of timing for a group. Its cases share them; those that are slow take turns until
# the limit, each at least once.
BUDGET_S, LIMIT_S, SMOKE_BUDGET_S = 30.0, 45.0, 0.01


def has_bf16_dense(options: Options) -> bool:
    """Whether dense bfloat16 models are measured: some processors take minutes for a step."""
    return options.smoke or options.device != "cpu" or baselines.has_bf16_dense()


def missing(options: Options) -> list[str]:
    """Sentences about what is not measured. Ends the program if our kernels are not there."""
    if options.device == "cpu" and not cpu.isas():
        report.refuse("benchmarks", "the C++ extension is missing: build it with `pip install .`")
    sentence = "dense bfloat16 is left out: this processor has no instructions for it"
    return [] if has_bf16_dense(options) else [sentence]


@torch.enable_grad()
def measure_group(group: Group, options: Options, device: Device) -> list[dict[str, Any]]:
    """The rows of a group."""

    def each(doing: str, cases: Sequence[Case]) -> Any:
        return report.progress(cases, desc=f"{doing} of {group}", leave=False)

    peaks = {case: measure_peak_mb(case, device.name) for case in each("memory", group.memory)}
    jobs = {case: make_job(case, device.name, checks=True) for case in each("check", group.cases)}
    calls = {
        f"{name} {case}": call
        for case, job in jobs.items()
        if job.failure is None
        for name, call in job.calls.items()
    }
    budget_s = SMOKE_BUDGET_S if options.smoke else BUDGET_S
    timings = timing.interleave(calls, budget_s=budget_s, limit_s=LIMIT_S)
    return [
        describe(jobs[case], timings) | {"part": group.name, "peak_mb": peaks.get(case)}
        for case in group.cases
    ]


def describe(job: Job, timings: Mapping[str, Timing]) -> dict[str, Any]:
    """The row of a case.

    A step has its share of the rewiring: what that adds to two ordinary steps, over the period.
    """
    case = job.case
    row = {
        **case.columns(),
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
    change_ms = rewiring.time_ms - 2 * step.time_ms if rewiring else 0.0
    step_ms = step.time_ms + change_ms / TopologyConfig.period
    return row | {
        "step_ms": step_ms,
        "tokens_per_s": 1e3 * job.tokens.numel() / step_ms,
        "ordinary_ms": step.time_ms,
        "rewiring_ms": step.time_ms + change_ms if rewiring else None,
        "period": TopologyConfig.period if rewiring else None,
        "spread_ms": step.spread_ms,
        "samples": step.samples,
        "loss": job.loss,
        **job.state_mb(),
    }


def measure_peak_mb(case: Case, device: str) -> float:
    """MB (10^6 bytes) of a few calls in a fresh process; raises RuntimeError if that dies.

    On the CPU it is how far the peak resident size rises from before the model is built: weights,
    gradients, optimizer, activations, temporary tensors and what the allocator loses. A tiny model
    comes first, so that modules and pages of libraries do not count. On a GPU it is what
    `torch.cuda.max_memory_allocated` says.
    """
    # The processes are forked from one that has imported torch, and no thread of which computes.
    # torch imports its compiler, in as many seconds, when the first optimizer is made.
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([__name__, "torch._dynamo"])
    ignores = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits
    with ProcessPoolExecutor(1, server, signal.signal, ignores) as pool:
        return pool.submit(_peak_mb, case, device, torch.get_num_threads()).result()


def _peak_mb(case: Case, device: str, threads: int) -> float:
    torch.set_num_threads(threads)
    keep_freed_memory()
    _take_calls(replace(case, model=replace(SMOKE_MODEL, d_model=16), batch=1), device)
    before = _resident_peak()
    _take_calls(case, device)
    peak = _resident_peak() - before if device == "cpu" else torch.cuda.max_memory_allocated()
    return round(peak / 1e6, 1)


def _take_calls(case: Case, device: str) -> None:
    job = make_job(case, device)
    for call in (job.calls["step"], *reversed(job.calls.values())):
        call()


def _resident_peak() -> int:
    """Bytes; of this process, since it began."""
    try:
        # On Linux getrusage also counts the process that started this one.
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
