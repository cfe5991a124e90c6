"""The least time that a product can take on this machine, from what the machine was seen to do.

`bound = max(compute, operands, memory)`. The three overlap in a good kernel, so the longest of them
is a lower bound, and `bound / time` is the fraction of the limit that a kernel reaches. Nothing in
it is fitted: every rate is measured in the same process, with the vectors and the number of threads
that the kernels use, as the best of several runs (`csrc/cpu/ceilings.h`).

compute = 2 * M * nnz / (multiply-add rate)
    Each kept weight meets each token once, one multiply and one add. The rate is that of fused
    multiply-adds out of registers. For bf16 it is the larger of the fp32 rate (widen, then
    multiply) and that of `vdpbf16ps` where the processor has it: on some it is half as fast.

operands = M * nnz * bytes / max(block) / (L1 read rate)
    The multiply-add has a third operand: the token's activation (or, in `grad_weight`, the token's
    activation again, with its gradient held in a register). A block of `block_out x block_in`
    weights uses `block_out + block_in` activation vectors for `block_out * block_in`
    multiply-adds. The larger of the two groups may stay in registers from one block to the next;
    the smaller, `min(block)` vectors, is loaded for each block, which is `1 / max(block)` loads a
    multiply-add, from the first-level cache at best. Without blocks that is one load for each
    multiply-add: for fp32 half a flop per byte. (Two rows of an unstructured pattern that happen
    to share an input could share its load too; no kernel can count on it, and this bound does not.)

memory = compulsory bytes / (bandwidth of a buffer of that size)
    Activations read once and written once, values and indices read once (2 bytes an index where
    the block columns can be counted in uint16). Inputs that no output reads are not counted.
    Reading takes at least `read / read rate`, writing at least `write / write rate` (the better
    of ordinary and non-temporal stores), and both together at least `(read + write) / (the fastest
    of read, write and copy)`. The rates fall as the buffer outgrows the caches; each is taken at
    the largest measured size that is not above the bytes of the case, and is never less than what a
    larger buffer reached. That is the best case: nothing else has used the caches in between.

For one token (M = 1) there is nothing to share: memory, that is values and indices, decides.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from types import ModuleType

import torch  # noqa: F401  before the extension, so that both share one OpenMP runtime

try:
    import _sparse_kernels_cpu as _extension
except ImportError:
    _extension: ModuleType | None = None  # type: ignore[no-redef]

# 16 KB a thread lie in every L1 data cache; 160 KB in every second-level cache and in no L1.
L1_BYTES = 16 * 1024
L2_BYTES = 160 * 1024
SIZES = tuple(2**20 * 4**i for i in range(5))  # 1 MB to 256 MB, all threads together
SMOKE_SIZES = (2**20, 2**24)

Curve = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Ceilings:
    """Measured peaks of all `threads` together. A curve is `((bytes, GB/s), ...)`, ascending."""

    isa: str
    threads: int
    fma_gflops: float
    bf16_gflops: float
    l1_read_gbs: float
    l2_read_gbs: float
    read_gbs: Curve
    write_gbs: Curve
    copy_gbs: Curve

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Bound:
    """The terms of the bound of one product, in milliseconds."""

    compute_ms: float
    operands_ms: float
    memory_ms: float

    @property
    def ms(self) -> float:
        return max(self.compute_ms, self.operands_ms, self.memory_ms)

    @property
    def limit(self) -> str:
        """Which term decides: "compute", "operands" or "memory"."""
        terms = {
            "compute": self.compute_ms,
            "operands": self.operands_ms,
            "memory": self.memory_ms,
        }
        return max(terms, key=lambda name: terms[name])


def measure(isa: str, threads: int, sizes: Iterable[int] = SIZES) -> Ceilings | None:
    """Measures the ceilings of an instruction set, in about two seconds.

    Returns None where the C++ extension is missing: there is no bound then.
    """
    if _extension is None:
        return None
    all_sizes = sorted({L1_BYTES * threads, L2_BYTES * threads, *sizes})

    def curve(name: str) -> Curve:
        rate = getattr(_extension, name)
        return tuple((size, rate(isa, threads, size)) for size in all_sizes)

    read = curve("measure_read_gbs")
    rates = dict(read)
    return Ceilings(
        isa=isa,
        threads=threads,
        fma_gflops=_extension.measure_fma_gflops(isa, threads),
        bf16_gflops=_extension.measure_bf16_gflops(isa, threads),
        l1_read_gbs=rates[L1_BYTES * threads],
        l2_read_gbs=rates[L2_BYTES * threads],
        read_gbs=read,
        write_gbs=curve("measure_write_gbs"),
        copy_gbs=curve("measure_copy_gbs"),
    )


def bandwidth_gbs(curve: Curve, size: int) -> float:
    """The bandwidth that a buffer of `size` bytes may have at best, from a measured curve."""
    at = max((measured for measured, _ in curve if measured <= size), default=curve[0][0])
    return max(rate for measured, rate in curve if measured >= at)


@dataclass(frozen=True)
class Work:
    """What one product has to do, whoever does it."""

    flops: float
    operand_bytes: float
    read_bytes: int
    write_bytes: int


def count_work(
    product: str,
    *,
    tokens: int,
    in_features: int,
    out_features: int,
    fan_in: int,
    block: tuple[int, int],
    element_bytes: int,
    used_in_features: int | None = None,
) -> Work:
    """The `Work` of a product ("forward", "grad_input" or "grad_weight"), without bias.

    Args:
        used_in_features: inputs that at least one output reads; by default all.
    """
    nnz = out_features * fan_in
    used = in_features if used_in_features is None else used_in_features
    blocks = nnz // (block[0] * block[1])
    index_bytes = blocks * (2 if in_features // block[1] <= 2**16 else 4)
    values_bytes = nnz * element_bytes
    read_x = tokens * used * element_bytes
    outputs = tokens * out_features * element_bytes
    if product == "forward":
        read, write = read_x + values_bytes + index_bytes, outputs
    elif product == "grad_input":
        read = outputs + values_bytes + index_bytes
        write = tokens * in_features * element_bytes
    elif product == "grad_weight":
        read, write = outputs + read_x + index_bytes, values_bytes
    else:
        raise ValueError(f"product must be forward, grad_input or grad_weight, got {product!r}")
    return Work(
        flops=2.0 * tokens * nnz,
        operand_bytes=tokens * nnz * element_bytes / max(block),
        read_bytes=read,
        write_bytes=write,
    )


def bound(work: Work, ceilings: Ceilings, *, is_bf16: bool) -> Bound:
    """The lower bound of the time of `work`; see the module's docstring."""
    flops_rate = ceilings.fma_gflops
    if is_bf16:
        flops_rate = max(flops_rate, ceilings.bf16_gflops)
    total = work.read_bytes + work.write_bytes
    read = bandwidth_gbs(ceilings.read_gbs, total)
    write = bandwidth_gbs(ceilings.write_gbs, total)
    either = max(read, write, bandwidth_gbs(ceilings.copy_gbs, total))
    memory = max(work.read_bytes / read, work.write_bytes / write, total / either)
    # Giga-anything per second is a million a millisecond.
    return Bound(
        compute_ms=work.flops / flops_rate * 1e-6,
        operands_ms=work.operand_bytes / ceilings.l1_read_gbs * 1e-6,
        memory_ms=memory * 1e-6,
    )


def geometric_mean(values: Iterable[float]) -> float:
    """The geometric mean of positive numbers; NaN of none."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan
