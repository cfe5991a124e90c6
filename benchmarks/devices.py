"""The devices that a benchmark runs on: their peaks, their description and their clock.

The clock of a GPU: before each call a buffer larger than the second-level cache is written, so no
candidate finds its operands there. The device then sleeps while the processor queues the call, so
that launching does not count: only the time from the event before the call to the event after it.
"""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from functools import partial
from typing import Any

import torch

from benchmarks import baselines, report, roofline, timing
from benchmarks.cases import DTYPES
from benchmarks.roofline import GpuPeaks, Peaks
from benchmarks.timing import Candidate
from sparse_kernels import cpu
from sparse_transformer import keep_freed_memory

# The flush must not fit the cache.
FLUSH_CACHES = 4
FLUSH_MIN_BYTES = 256 * 2**20
# Half a millisecond at 2 GHz: longer than the processor needs to queue a call.
SLEEP_CYCLES = 1_000_000
# Sizes of the dense product and the copy that the peaks are measured with.
SIZE, COPY_BYTES, RUNS = 8192, 2**30, 10
QUERIES = (
    "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "temperature.gpu", "power.draw",
)  # fmt: skip
# Settings outside the program that change what is measured.
_ENVIRONMENT = (
    "OMP_", "MKL_", "KMP_", "GOMP_", "ONEDNN_", "DNNL_", "MALLOC_", "GLIBC_", "SPARSE_", "THP_",
    "LD_PRELOAD",
)  # fmt: skip


def why_not(name: str) -> str | None:
    """None if a benchmark can run on that device here, else a sentence."""
    if name not in BY_NAME:
        return f"it must be one of {', '.join(BY_NAME)}, got {name!r}"
    if name == "cuda" and not torch.cuda.is_available():
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        return (
            "PyTorch finds no GPU (torch.cuda.is_available() is False, "
            f"torch {torch.__version__} was built {built})"
        )
    return None


class Device:
    """The processor, with the threads that torch has."""

    name = "cpu"  # torch's name of the device type
    backend: str | None = "cpu"  # measured unless the user names another; None: sk chooses
    clock = "wall clock, in turns"
    peaks: Peaks | GpuPeaks | None = None  # None: not measured
    keeps_freed_memory = False

    def prepare(self, *, smoke: bool) -> list[str]:
        """Measures the peaks and sets the allocator; returns sentences about what is missing."""
        # For every candidate alike: otherwise each large result starts with page faults, which can
        # take longer than the product.
        self.keeps_freed_memory = keep_freed_memory()
        if cpu.isas():
            found = roofline.measure_peaks(cpu.isa(), torch.get_num_threads(), smoke=smoke)
            if isinstance(found, str):
                return [found]
            self.peaks = found
        return []

    def describe(self, command: Sequence[str]) -> dict[str, Any]:
        """What a reader needs to judge or repeat the numbers; unknown things are None.

        `command` is the words after `python`, as given.
        """
        lines = (report.output_of("env", "LC_ALL=C", "lscpu") or "").splitlines()
        about = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
        brand = ("sysctl", "-n", "machdep.cpu.brand_string")
        pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return {
            "cpu": about.get("Model name") or report.output_of(*brand),
            "flags": about.get("Flags"),
            "architecture": platform.machine(),
            "cores": os.cpu_count(),
            "memory_gib": round(pages / 2**30, 1),
            "os": platform.platform(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "load_average": os.getloadavg()[0],
            "environment": {n: v for n, v in os.environ.items() if n.startswith(_ENVIRONMENT)},
            "commit": report.commit(),
            "command": shlex.join(["python", *command]),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "isa": cpu.isa() if cpu.isas() else None,
            "peaks": None if self.peaks is None else asdict(self.peaks),
            "keeps_freed_memory": self.keeps_freed_memory,
            "peers": {name: report.version_of(name) for name in ("scipy", "sparselab", "mkl")},
        }

    def sample_s(self, call: Candidate, calls: int = 1) -> float:
        """Seconds per call, over `calls` calls in a row."""
        return timing.sample_s(call, calls)


class Gpu(Device):
    """PyTorch's current GPU."""

    name = "cuda"
    backend = None
    clock = "events, cold L2, in turns"

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties().L2_cache_size
        size = max(FLUSH_CACHES * cache, FLUSH_MIN_BYTES)
        self._buffer = torch.empty(size // 4, dtype=torch.int32, device="cuda")

    def prepare(self, *, smoke: bool) -> list[str]:
        def best_s(call: Candidate) -> float:
            call()
            return min(self.sample_s(call) for _ in range(RUNS))

        tflops = {}
        for name in (*DTYPES, "tf32"):
            sides = torch.randn(2, SIZE, SIZE, device="cuda").to(DTYPES.get(name, torch.float32))
            product = partial(torch.mm, *sides)
            call = baselines.with_precision(product, "high" if name == "tf32" else "highest")
            tflops[name] = 2 * SIZE**3 / best_s(call) * 1e-12
        source = torch.randn(COPY_BYTES // 4, device="cuda")
        seconds = best_s(partial(torch.empty_like(source).copy_, source))
        self.peaks = GpuPeaks(tflops, 2 * source.nbytes / seconds * 1e-9)
        return []

    def describe(self, command: Sequence[str]) -> dict[str, Any]:
        properties = torch.cuda.get_device_properties()
        words = ("nvidia-smi", f"--query-gpu={','.join(QUERIES)}", "--format=csv,noheader")
        said = dict(zip(QUERIES, (report.output_of(*words) or "").split(", "), strict=False))
        gpu = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "l2_mib": round(properties.L2_cache_size / 2**20, 1),
            "driver": said.pop(QUERIES[0]) or None,
            "cuda": torch.version.cuda,
            "triton": report.version_of("triton"),
            "float32_precision": torch.get_float32_matmul_precision(),
            "flushed_bytes": self._buffer.nbytes,
        }
        return super().describe(command) | {"gpu": gpu, "clocks": said or None}

    def sample_s(self, call: Candidate, calls: int = 1) -> float:
        """Seconds per call by the GPU's clock, over `calls` calls that each start cold."""
        pairs = []
        for turn in range(calls):
            # Not zeros: some memory is faster with them.
            self._buffer.fill_(turn + 1)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(SLEEP_CYCLES)
            start.record()
            call()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in pairs) * 1e-3 / calls


BY_NAME = {"cpu": Device, "cuda": Gpu}
