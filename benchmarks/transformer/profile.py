"""Where time and memory of a job go: the parts of a step, and the peak of a process of its own.

Every operator that torch's profiler sees at the top level belongs to one part by its name; what
runs between them is "rest". `Training.step` names two ranges itself: "optimizer" and "topology".
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from torch.autograd.profiler import profile

from benchmarks.timing import Candidate
from benchmarks.transformer.jobs import Inference, Job, Training
from benchmarks.transformer.variants import SMOKE_MODEL, Case, make_model
from sparse_transformer import keep_freed_memory

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
        "sparsematmul", "sparse_kernels::forward", "sparse_kernels::grad_input",
        "sparse_kernels::schedule", "aten::linear", "mmbackward",
    ),
}  # fmt: skip


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
    if case.phase == "train":
        job: Job = Training(case, device)
    else:
        job = Inference(case, device, make_model(case, device, case.torch_dtype))
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
