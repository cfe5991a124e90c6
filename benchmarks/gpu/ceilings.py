"""What the GPU was seen to do, and the bound that follows: `max(compute, memory)`.

compute = 2 * M * nnz / (rate of torch's dense product of 8192 x 8192 matrices in that dtype)
    The best of several runs on random numbers, not zeros. Blocks may reach it on the tensor cores;
    unstructured weights cannot, whose multiply-adds gather operands one by one: for them the bound
    is far from what any kernel can do, and only memory may be near it.

memory = compulsory bytes / (bytes read plus written by a large copy on the device, per second)

Every byte is counted once, as in `benchmarks.roofline`. No kernel from a cold cache is faster.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial

import torch

from benchmarks.gpu.clock import Clock
from benchmarks.problems import DTYPES
from benchmarks.roofline import Work
from benchmarks.timing import Candidate

SIZE = 8192
SMOKE_SIZE = 512
COPY_BYTES = 2**30
SMOKE_COPY_BYTES = 2**24
RUNS = 10


@dataclass(frozen=True)
class GpuCeilings:
    """Measured peaks: dense Tflop/s by dtype (float32 is IEEE, tf32 its short form), copy GB/s."""

    dense_tflops: dict[str, float]
    copy_gbs: float

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


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


def measure(device: torch.device, clock: Clock, *, smoke: bool) -> GpuCeilings:
    """Measures the ceilings, in a second or two."""
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
    return GpuCeilings(tflops, 2 * source.numel() * 4 / seconds * 1e-9)


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


def bound(work: Work, ceilings: GpuCeilings, dtype: str) -> GpuBound:
    """The lower bound of the time of `work` in `dtype`; see the module's docstring."""
    total = work.read_bytes + work.write_bytes
    return GpuBound(
        compute_ms=work.flops / ceilings.dense_tflops[dtype] * 1e-9,
        memory_ms=total / ceilings.copy_gbs * 1e-6,
    )
