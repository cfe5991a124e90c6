"""Peak memory of a few training steps, or forwards, of one model in a process of its own."""

from __future__ import annotations

import multiprocessing
import resource
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from benchmarks.transformer.jobs import Inference, Job, Training
from benchmarks.transformer.variants import Case, make_model
from sparse_transformer import keep_freed_memory


def measure_peak_mb(case: Case, device: str) -> float:
    """MB (10^6 bytes) of a case in a fresh process; raises RuntimeError if that process dies.

    On the CPU it is how far the peak resident size of the process rises while the model is built
    and takes its steps: weights, gradients, optimizer, activations, temporary tensors and what the
    allocator loses. On a GPU it is what `torch.cuda.max_memory_allocated` says.
    """
    spawn = multiprocessing.get_context("spawn")
    ignores = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits
    with ProcessPoolExecutor(1, spawn, signal.signal, ignores) as pool:
        return pool.submit(_peak_mb, case, device, torch.get_num_threads()).result()


def _peak_mb(case: Case, device: str, threads: int) -> float:
    torch.set_num_threads(threads)
    keep_freed_memory()
    before = _resident_peak()
    if case.phase == "train":
        job: Job = Training(case, device)
    else:
        job = Inference(case, device, make_model(case, device, case.torch_dtype))
    for call in (job.step, *reversed(job.calls.values())):
        call()
    peak = _resident_peak() - before if device == "cpu" else torch.cuda.max_memory_allocated()
    return round(peak / 1e6, 1)


def _resident_peak() -> int:
    """Bytes; of this process, since it began."""
    try:
        # On Linux getrusage also counts the process that started this one.
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
