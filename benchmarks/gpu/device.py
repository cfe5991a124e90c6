"""The GPU as a benchmark sees it: its clock, its peaks and what ours is compared with there.

Clock: before each call a buffer larger than the second-level cache is written, so no candidate
finds its operands there; the time from the event before the call to the event after it is the
GPU's. While the buffer is written the processor has time to queue the call. For a call so short
that it may not have (`GRAPH_BELOW_S`) every candidate is captured in a CUDA graph: one launch.

Bound: `max(compute, memory)`.
compute = 2 * M * nnz / (rate of torch's dense product of 8192 x 8192 matrices in that dtype)
memory = compulsory bytes / (bytes read plus written by a large copy on the device, per second)
Blocks may reach `compute` on the tensor cores; unstructured weights cannot.

Baselines: cuBLAS in every precision, masked dense, also compiled, torch's CSR and BSR. Operands are
in the dtype and layout that each likes best, converted before the clock starts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import baselines, report, roofline, timing
from benchmarks.baselines import Operands
from benchmarks.cases import DTYPES
from benchmarks.devices import Baselines
from benchmarks.timing import Budget, Candidate, Timing

# The flush must not fit the cache, nor be so short that the processor falls behind.
FLUSH_CACHES = 4
FLUSH_MIN_BYTES = 256 * 2**20
# Where a candidate is faster than this, its launches may take as long as its kernels.
GRAPH_BELOW_S = 3e-4
WARM_UP_CALLS = 2
# Sizes of the dense product and the copy that the peaks are measured with.
SIZE, SMOKE_SIZE = 8192, 512
COPY_BYTES, SMOKE_COPY_BYTES = 2**30, 2**24
RUNS = 10
# Blocks that torch's BSR kernels take.
BSR_SIDES = (16, 32, 64, 128)
COMPILE_MODE = "max-autotune-no-cudagraphs"


class Gpu:
    """PyTorch's current GPU, or another device, for tests."""

    backend: str | None = None

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device or torch.device("cuda", torch.cuda.current_device())
        self.name = self._device.type
        self._clock = Clock(self._device)
        self._peaks: GpuPeaks | None = None

    def prepare(self, *, smoke: bool) -> list[str]:
        self._peaks = measure(self._device, self._clock, smoke=smoke)
        return []

    def describe(self, command: Sequence[str]) -> dict[str, Any]:
        peaks = None if self._peaks is None else asdict(self._peaks)
        machine = report.describe_machine(command, isa=None, peaks=peaks)
        return machine | {"gpu": describe_gpu(self._device, self._clock.flushed_bytes)}

    def baselines(self, operands: Operands, product: str, ours: Candidate) -> Baselines:
        compiles = operands.case.has_goal
        sparse, notes = sparse_candidates(operands, product)
        if not compiles:
            notes["compiled_masked_note"] = "only the cases with a goal are compiled"
        return Baselines(
            masked=masked_candidates(operands, product, compiled=compiles),
            dense=dense_candidates(operands, product),
            same_dtype=same_dtype(operands),
            sparse=sparse,
            notes=notes,
        )

    def bound(self, work: roofline.Work, dtype: str) -> GpuBound | None:
        return None if self._peaks is None else bound(work, self._peaks, dtype)

    def estimate_s(self, candidates: Mapping[str, Candidate]) -> dict[str, float]:
        return self._clock.estimate_s(candidates)

    def interleave(
        self,
        candidates: Mapping[str, Candidate],
        budget: Budget,
        estimates: Mapping[str, float] | None = None,
    ) -> tuple[dict[str, Timing], str]:
        return self._clock.interleave(candidates, budget, estimates)


def describe_gpu(device: torch.device, flushed_bytes: int) -> dict[str, Any]:
    """Name, size and software of the GPU."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": round(properties.L2_cache_size / 2**20, 1),
        "driver": report.output_of(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        ),
        "cuda": torch.version.cuda,
        "triton": report.version_of("triton"),
        "tf32_in_ours": torch.backends.cuda.matmul.allow_tf32,
        "flushed_bytes": flushed_bytes,
    }


class Clock:
    """The events and the flushing buffer of one GPU.

    Attributes:
        flushed_bytes: how much is written before each call.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self.flushed_bytes = max(FLUSH_CACHES * cache, FLUSH_MIN_BYTES)
        self._buffer = torch.empty(self.flushed_bytes // 4, dtype=torch.int32, device=device)

    def sample_s(self, call: Candidate, calls: int = 1) -> float:
        """Seconds per call by the GPU's clock, over `calls` calls that each start cold."""
        pairs = []
        for turn in range(calls):
            # Not zeros: some memory is faster with them.
            self._buffer.fill_(turn + 1)
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize(self._device)
        return sum(start.elapsed_time(end) for start, end in pairs) * 1e-3 / calls

    def warm_up(self, candidates: Mapping[str, Candidate]) -> None:
        """Calls each candidate until what is compiled, tuned or derived at first use is there."""
        for call in candidates.values():
            for _ in range(WARM_UP_CALLS):
                call()
        torch.cuda.synchronize(self._device)

    def estimate_s(self, candidates: Mapping[str, Candidate]) -> dict[str, float]:
        """Warms the candidates up and guesses their times, in seconds."""
        self.warm_up(candidates)
        return timing.estimate_s(candidates, self.sample_s)

    def interleave(
        self,
        candidates: Mapping[str, Candidate],
        budget: Budget,
        estimates: Mapping[str, float] | None = None,
    ) -> tuple[dict[str, Timing], str]:
        """Times the candidates in turns; also says how: with events, or CUDA graphs.

        One that cannot be captured is queued call by call among the graphs, and named.
        """
        guesses = self.estimate_s(candidates) if estimates is None else estimates
        chosen, how = dict(candidates), "events"
        if min((guesses[name] for name in candidates), default=1.0) < GRAPH_BELOW_S:
            refused = []
            for name, call in candidates.items():
                try:
                    chosen[name] = capture(call)
                except RuntimeError:
                    # What torch raises where a call waits for the device, or allocates outside.
                    torch.cuda.synchronize(self._device)
                    refused.append(name)
            how = "CUDA graphs" + (f" (not {', '.join(refused)})" if refused else "")
        timings = timing.interleave(
            chosen,
            budget_s=budget.seconds,
            repeats=budget.repeats,
            limit_s=budget.limit_s,
            estimates={name: guesses[name] for name in chosen},
            sampler=self.sample_s,
        )
        return timings, f"{how}, cold L2"


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


@dataclass(frozen=True)
class GpuPeaks:
    """Measured peaks: dense Tflop/s by dtype (float32 is IEEE, tf32 its short form), copy GB/s."""

    dense_tflops: dict[str, float]
    copy_gbs: float


@dataclass(frozen=True)
class GpuBound:
    """The two terms, in milliseconds."""

    compute_ms: float
    memory_ms: float

    @property
    def ms(self) -> float:
        return max(self.compute_ms, self.memory_ms)

    @property
    def peak_ms(self) -> float:
        """The same: neither term depends on how a kernel is written."""
        return self.ms

    @property
    def limit(self) -> str:
        """Which term decides: "compute" or "memory"."""
        return "compute" if self.compute_ms >= self.memory_ms else "memory"


def measure(device: torch.device, clock: Clock, *, smoke: bool) -> GpuPeaks:
    """Measures the peaks, in a second or two."""
    size = SMOKE_SIZE if smoke else SIZE
    tflops = {}
    for name, dtype in DTYPES.items():
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        forms = {"float32": False, "tf32": True} if name == "float32" else {name: None}
        for key, allowed in forms.items():
            with tf32(allowed):
                tflops[key] = 2 * size**3 / _best_s(clock, partial(torch.mm, left, right)) * 1e-12
    source = torch.randn((SMOKE_COPY_BYTES if smoke else COPY_BYTES) // 4, device=device)
    target = torch.empty_like(source)
    seconds = _best_s(clock, partial(target.copy_, source))
    return GpuPeaks(tflops, 2 * source.numel() * 4 / seconds * 1e-9)


def _best_s(clock: Clock, call: Candidate) -> float:
    return min(clock.sample_s(call) for _ in range(RUNS))


@contextmanager
def tf32(allowed: bool | None) -> Iterator[None]:
    """Lets float32 products use the tensor cores' short form, or not; None changes nothing."""
    before = torch.backends.cuda.matmul.allow_tf32
    if allowed is not None:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def bound(work: roofline.Work, peaks: GpuPeaks, dtype: str) -> GpuBound:
    """The lower bound of the time of `work` in `dtype`."""
    total = work.read_bytes + work.write_bytes
    return GpuBound(
        compute_ms=work.flops / peaks.dense_tflops[dtype] * 1e-9,
        memory_ms=total / peaks.copy_gbs * 1e-6,
    )


def dense_candidates(operands: Operands, product: str) -> dict[str, Candidate]:
    """cuBLAS in the dtype of the case; for float32 also in its short form and in bfloat16.

    A name ends with the precision of the multiplications.
    """
    dtype = operands.case.torch_dtype
    call = baselines.dense(operands, product, dtype)
    if dtype != torch.float32:
        return {same_dtype(operands): call}

    def short() -> None:
        with tf32(True):
            call()

    def exact() -> None:
        with tf32(False):
            call()

    return {
        "cuBLAS fp32": exact,
        "cuBLAS tf32": short,
        "cuBLAS bf16": baselines.dense(operands, product, torch.bfloat16),
    }


def same_dtype(operands: Operands) -> str:
    """The name of the dense candidate in the dtype of the case."""
    return {torch.float32: "cuBLAS fp32", torch.bfloat16: "cuBLAS bf16"}.get(
        operands.case.torch_dtype, "cuBLAS fp16"
    )


def masked_candidates(operands: Operands, product: str, *, compiled: bool) -> dict[str, Candidate]:
    """Masked dense as users run it and, where asked for, through torch.compile at its best."""
    candidates = {"masked dense": baselines.masked_dense(operands, product)}
    if compiled:
        candidates["compiled masked"] = _compiled_masked(operands, product)
    return candidates


def _forward(x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    return functional.linear(x, weight * mask)


def _grad_input(grad: Tensor, masked: Tensor) -> Tensor:
    return grad @ masked


def _grad_weight(grad: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    return (grad.t() @ x) * mask


def _compiled_masked(operands: Operands, product: str) -> Candidate:
    x, grad, weight, mask = operands.x, operands.grad_output, operands.weight, operands.mask
    calls: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
        "forward": (_forward, (x, weight, mask)),
        "grad_input": (_grad_input, (grad, weight * mask)),
        "grad_weight": (_grad_weight, (grad, x, mask)),
    }
    function, arguments = calls[product]
    compiled = torch.compile(function, fullgraph=True, dynamic=False, mode=COMPILE_MODE)
    return lambda: compiled(*arguments)


def sparse_candidates(
    operands: Operands, product: str
) -> tuple[dict[str, Candidate], dict[str, str]]:
    """torch's CSR and BSR in every form that runs this product, and why the others do not.

    Each form is called once to see whether torch refuses it: versions differ.

    Returns:
        `({"torch CSR <form>": call}, {"torch_csr_note" | "torch_bsr_note": sentence})`.
    """
    found: dict[str, Candidate] = {}
    notes = {}
    for kind, build in (("csr", _csr), ("bsr", _bsr)):
        try:
            with warnings.catch_warnings():
                # Both are in beta, says torch, once a process.
                warnings.simplefilter("ignore", UserWarning)
                forms = build(operands, product)
        except (RuntimeError, ValueError) as error:  # NotImplementedError is a RuntimeError
            notes[f"torch_{kind}_note"] = f"torch refuses: {_first_line(error)}"
            continue
        for name, call in forms.items():
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)
                    call()
                torch.cuda.synchronize()
            except (RuntimeError, ValueError, AssertionError) as error:
                notes[f"torch_{kind}_note"] = f"torch refuses {name}: {_first_line(error)}"
            else:
                found[f"torch {kind.upper()} {name}"] = call
        if any(name.startswith(f"torch {kind.upper()}") for name in found):
            notes.pop(f"torch_{kind}_note", None)
    return found, notes


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _csr(operands: Operands, product: str) -> dict[str, Candidate]:
    x, grad = operands.x, operands.grad_output
    if product == "grad_weight":
        pattern, left = _compressed(operands.mask), grad.t().contiguous()
        return {"sampled_addmm": lambda: torch.sparse.sampled_addmm(pattern, left, x, beta=0.0)}
    matrix, dense_side = (
        (operands.weight, x) if product == "forward" else (operands.weight.t(), grad)
    )
    sparse, turned = _compressed(matrix), dense_side.t()
    straight = turned.contiguous()
    return {
        "linear": lambda: functional.linear(dense_side, sparse),
        "sparse.mm": lambda: torch.sparse.mm(sparse, turned).t(),
        "sparse.mm, feature-major": lambda: torch.sparse.mm(sparse, straight).t(),
    }


def _compressed(matrix: Tensor) -> Tensor:
    csr = matrix.to_sparse_csr()
    return torch.sparse_csr_tensor(
        csr.crow_indices().int(), csr.col_indices().int(), csr.values(), csr.shape
    )


def _bsr(operands: Operands, product: str) -> dict[str, Candidate]:
    block = operands.case.block
    if block[0] != block[1] or block[0] not in BSR_SIDES:
        raise ValueError(f"its BSR kernels take square blocks of {BSR_SIDES}")
    x, grad = operands.x, operands.grad_output
    if product == "grad_weight":
        pattern, left = operands.mask.to_sparse_bsr(block), grad.t().contiguous()
        return {"sampled_addmm": lambda: torch.sparse.sampled_addmm(pattern, left, x, beta=0.0)}
    matrix, dense_side = (
        (operands.weight, x) if product == "forward" else (operands.weight.t().contiguous(), grad)
    )
    sparse = matrix.to_sparse_bsr(block)
    return {"linear": lambda: functional.linear(dense_side, sparse)}
