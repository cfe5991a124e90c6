"""Splits the time of a step, or of a forward, into parts with torch's profiler.

Every operator that the profiler sees at the top level belongs to one part by its name; what runs
between them is "rest". `Training.step` names two ranges itself: "optimizer" and "topology".
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from torch.autograd.profiler import profile

# Without this the profiler reports its start and its end on stderr.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
# In the order of the tables. GELU and the norms of the blocks belong to abs_topk where one kernel
# does both, else to the rest, as residuals, embedding and loss do.
PARTS = ("linears", "abs_topk", "attention", "rest", "optimizer", "topology")
# The first part of which a word is in the lower-case name; in a backward, of the node's name.
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


def measure_parts(call: Callable[[], object], device: str) -> dict[str, float]:
    """Milliseconds of each part of one call, the profiler's own cost included."""
    on_gpu = device != "cpu"
    with profile(use_kineto=on_gpu, use_device="cuda" if on_gpu else None) as profiled:
        start = time.perf_counter()
        call()
        whole_ms = 1e3 * (time.perf_counter() - start)
    parts = dict.fromkeys(PARTS, 0.0)
    for event in profiled.function_events or ():
        if event.cpu_parent is None:
            time_us = event.device_time_total if on_gpu else event.cpu_time_total
            parts[part_of(event.name)] += time_us / 1e3
    parts["rest"] = max(0.0, whole_ms - sum(parts.values()) + parts["rest"])
    return parts
