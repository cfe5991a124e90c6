"""The devices that a benchmark runs on: their peaks, their description and their clock.

The clock of a GPU: before each call a buffer larger than the second-level cache is written, so no
candidate finds its operands there; the time from the event before the call to the event after it
counts. While the buffer is written the processor has time to queue the call. Where a call is so
short that it may not have (`GRAPH_BELOW_S`), ours and the dense ones are replayed CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from benchmarks import baselines, peaks, report, timing
from benchmarks.cases import DTYPES
from benchmarks.roofline import Bound, GpuPeaks, Peaks, Work
from benchmarks.timing import Budget, Candidate, Timing
from sparse_kernels import cpu
from sparse_transformer import keep_freed_memory

NAMES = ("cpu", "cuda")
# The flush must not fit the cache, nor be so short that the processor falls behind.
FLUSH_CACHES = 4
FLUSH_MIN_BYTES = 256 * 2**20
# Where a candidate is faster than this, its launches may take as long as its kernels.
GRAPH_BELOW_S = 3e-4
# Sparse peers wait for the device while they run, which spoils a capture.
CAPTURED = ("ours", "masked dense", "cuBLAS")
# Sizes of the dense product and the copy that the peaks are measured with.
SIZE, SMOKE_SIZE = 8192, 512
COPY_BYTES, SMOKE_COPY_BYTES = 2**30, 2**24
RUNS = 10


def why_not(name: str) -> str | None:
    """None if a benchmark can run on that device here, else a sentence."""
    if name not in NAMES:
        return f"it must be one of {', '.join(NAMES)}, got {name!r}"
    if name == "cuda" and not torch.cuda.is_available():
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        return (
            "PyTorch finds no GPU (torch.cuda.is_available() is False, "
            f"torch {torch.__version__} was built {built})"
        )
    return None


def connect(name: str) -> Device:
    """The device of that name."""
    return Gpu() if name == "cuda" else Device()


class Device:
    """The processor, with the threads that torch has."""

    name = "cpu"  # torch's name of the device type
    backend: str | None = "cpu"  # measured unless the user names another; None: sk chooses

    def __init__(self) -> None:
        self._peaks: Peaks | GpuPeaks | None = None
        self._keeps_freed_memory = False

    def prepare(self, *, smoke: bool) -> list[str]:
        """Measures the peaks and sets the allocator; returns sentences about what is missing."""
        # For every candidate alike: otherwise each large result starts with page faults, which can
        # take longer than the product.
        self._keeps_freed_memory = keep_freed_memory()
        if not cpu.isas():
            return []
        sizes = peaks.SMOKE_SIZES if smoke else peaks.SIZES
        found = peaks.measure(cpu.isa(), torch.get_num_threads(), sizes)
        if isinstance(found, str):
            return [found]
        self._peaks = found
        return []

    def describe(self, command: Sequence[str]) -> dict[str, Any]:
        """What a reader needs to judge or repeat the numbers."""
        isa = cpu.isa() if cpu.isas() else None
        versions = {name: report.version_of(name) for name in ("scipy", "sparselab", "mkl")}
        found = None if self._peaks is None else asdict(self._peaks)
        return {
            **report.describe_machine(command, isa=isa, peaks=found),
            "keeps_freed_memory": self._keeps_freed_memory,
            "peers": versions,
        }

    def bound(self, work: Work, dtype: str) -> Bound | None:
        """The least time that `work` takes, or None if nothing was measured."""
        return None if self._peaks is None else self._peaks.bound(work, dtype)

    def estimate_s(self, candidates: Mapping[str, Candidate]) -> dict[str, float]:
        """Warms the candidates up and guesses their times, in seconds."""
        return timing.estimate_s(candidates)

    def interleave(
        self,
        candidates: Mapping[str, Candidate],
        budget: Budget,
        estimates: Mapping[str, float],
    ) -> tuple[dict[str, Timing], str]:
        """Times the candidates in turns; also says in some words how."""
        timings = timing.interleave(candidates, **asdict(budget), estimates=estimates)
        return timings, "wall clock, in turns"


class Gpu(Device):
    """PyTorch's current GPU."""

    name = "cuda"
    backend = None

    def __init__(self) -> None:
        super().__init__()
        cache = torch.cuda.get_device_properties().L2_cache_size
        size = max(FLUSH_CACHES * cache, FLUSH_MIN_BYTES)
        self._buffer = torch.empty(size // 4, dtype=torch.int32, device="cuda")

    def prepare(self, *, smoke: bool) -> list[str]:
        size = SMOKE_SIZE if smoke else SIZE
        tflops = {}
        for name in (*DTYPES, "tf32"):
            sides = torch.randn(2, size, size, device="cuda").to(DTYPES.get(name, torch.float32))
            product = partial(torch.mm, *sides)
            call = baselines.with_precision(product, "high" if name == "tf32" else "highest")
            tflops[name] = 2 * size**3 / self._best_s(call) * 1e-12
        source = torch.randn((SMOKE_COPY_BYTES if smoke else COPY_BYTES) // 4, device="cuda")
        seconds = self._best_s(partial(torch.empty_like(source).copy_, source))
        self._peaks = GpuPeaks(tflops, 2 * source.nbytes / seconds * 1e-9)
        return []

    def _best_s(self, call: Candidate) -> float:
        call()
        return min(self.sample_s(call) for _ in range(RUNS))

    def describe(self, command: Sequence[str]) -> dict[str, Any]:
        properties = torch.cuda.get_device_properties()
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        gpu = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "l2_mib": round(properties.L2_cache_size / 2**20, 1),
            "driver": report.output_of(*query),
            "cuda": torch.version.cuda,
            "triton": report.version_of("triton"),
            "float32_precision": torch.get_float32_matmul_precision(),
            "flushed_bytes": self._buffer.nbytes,
        }
        return super().describe(command) | {"gpu": gpu}

    def sample_s(self, call: Candidate, calls: int = 1) -> float:
        """Seconds per call by the GPU's clock, over `calls` calls that each start cold."""
        pairs = []
        for turn in range(calls):
            # Not zeros: some memory is faster with them.
            self._buffer.fill_(turn + 1)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in pairs) * 1e-3 / calls

    def estimate_s(self, candidates: Mapping[str, Candidate]) -> dict[str, float]:
        for call in candidates.values():
            call()  # compiles, tunes and derives what is missing
        return timing.estimate_s(candidates, self.sample_s)

    def interleave(
        self,
        candidates: Mapping[str, Candidate],
        budget: Budget,
        estimates: Mapping[str, float],
    ) -> tuple[dict[str, Timing], str]:
        chosen, how = dict(candidates), "events, cold L2"
        if min(estimates[name] for name in candidates) < GRAPH_BELOW_S:
            graphs = {n: capture(c) for n, c in candidates.items() if n.startswith(CAPTURED)}
            chosen |= graphs
            how = f"CUDA graphs of {', '.join(graphs)}, else events, cold L2"
        timings = timing.interleave(
            chosen, **asdict(budget), estimates=estimates, sampler=self.sample_s
        )
        return timings, how


def capture(call: Candidate) -> Candidate:
    """The replay of a CUDA graph of the call, which must have been called before.

    Raises:
        RuntimeError: the call cannot be captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> object:
        graph.replay()
        # Its memory is the graph's: it has to live as long as the replay can be called.
        return result

    return replay
