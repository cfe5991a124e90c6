"""Measures a group of cases: time, its parts, and peak memory.

The parts of a step: every operator that torch's profiler sees at the top level belongs to one part
by its name; what runs between them is "rest". `Training.step` names two ranges itself: "optimizer"
and "topology".
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler import profile

from benchmarks import baselines, report, timing
from benchmarks.devices import Device
from benchmarks.run import Options
from benchmarks.timing import Candidate, Timing
from benchmarks.transformer.jobs import SMOKE_MODEL, Case, Group, Job, make_job
from sparse_kernels import cpu
from sparse_transformer import keep_freed_memory
from sparse_transformer.train.topology import TopologyConfig

# Seconds of timing for a group. Its cases share them; those that are slow take turns until
# the limit, each at least once.
BUDGET_S, LIMIT_S, SMOKE_BUDGET_S = 30.0, 45.0, 0.01
# Without this the profiler reports its start and its end on stderr.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
# The first part of which a word is in the lower-case name; in a backward, of the node's name. GELU
# and the norms of the blocks belong to abs_topk where one kernel does both, else to the rest.
_WORDS = {
    "optimizer": ("optimizer",),
    "topology": ("topology",),
    "attention": ("attention",),
    "abs_topk": ("topk", "scatter", "gather", "aten::abs"),
    "linears": (
        "spmm", "sparse_kernels::forward", "sparse_kernels::grad_input",
        "sparse_kernels::schedule", "aten::linear", "mmbackward",
    ),
}  # fmt: skip


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
        for case in each("parts", group.cases)
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
    share_ms = change_ms / TopologyConfig.period
    step_ms = step.time_ms + share_ms
    # The parts are scaled to add up to the time without the profiler.
    parts = measure_parts(job.calls["step"], job.device)
    parts_ms = {part: step.time_ms * ms / sum(parts.values()) for part, ms in parts.items()}
    parts_ms["topology"] += share_ms
    return row | {
        "step_ms": step_ms,
        "tokens_per_s": 1e3 * job.tokens.numel() / step_ms,
        "ordinary_ms": step.time_ms,
        "rewiring_ms": step.time_ms + change_ms if rewiring else None,
        "period": TopologyConfig.period if rewiring else None,
        "spread_ms": step.spread_ms,
        "samples": step.samples,
        "parts_ms": parts_ms,
        "loss": job.loss,
        **job.state_mb(),
    }


def part_of(operator: str) -> str:
    """The part that an operator of the profiler belongs to."""
    name = operator.lower()
    found = (part for part, words in _WORDS.items() if any(word in name for word in words))
    return next(found, "rest")


def measure_parts(call: Candidate, device: str) -> dict[str, float]:
    """Milliseconds of each part of one call, the profiler's own cost included."""
    on_gpu = device != "cpu"
    with profile(use_kineto=on_gpu, use_device="cuda" if on_gpu else None) as profiled:
        start = time.perf_counter()
        call()
        whole_ms = 1e3 * (time.perf_counter() - start)
    parts = dict.fromkeys([*_WORDS, "rest"], 0.0)
    for event in profiled.function_events or ():
        if event.cpu_parent is None:
            time_us = event.device_time_total if on_gpu else event.cpu_time_total
            parts[part_of(event.name)] += time_us / 1e3
    parts["rest"] = max(0.0, whole_ms - sum(parts.values()) + parts["rest"])
    return parts


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
