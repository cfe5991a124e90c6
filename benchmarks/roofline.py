"""The least time that a product can take on this machine, from what the machine was seen to do.

`bound = max(compute, operands, memory)`. The three overlap in a good kernel, so the longest of them
is a lower bound, and `bound / time` is the fraction of the limit that a kernel reaches. Nothing in
it is fitted: every rate is measured in the same process, with the vectors and the number of threads
that the kernels use, as the best of several runs (`benchmarks/peaks.py`).

compute = 2 * M * nnz / (multiply-add rate)
    Each kept weight meets each token once, one multiply and one add. The rate is that of fused
    multiply-adds out of registers. For bf16 it is the larger of the fp32 rate (widen, then
    multiply) and that of `vdpbf16ps` where the processor has it: on some it is half as fast.

operands = M * nnz * bytes * (time of a byte), the least over tiles of V = 1 .. 16 vectors of tokens
    Each multiply-add reads an activation, 1 / max(block) of them where the outputs or inputs of a
    block share it: the larger side may stay in registers from one block to the next, the smaller
    is loaded for each block. Which activation it is, is random. So it comes from the first-level
    cache as far as the tile fits there, and else from the second level at best:
    `share = min(1, L1 size / (features * V * bytes of a vector))` of them. The features are the
    inputs that are read, in `grad_input` the outputs, in `grad_weight` the fewer of both. Forward
    and grad_input also read each weight once for V vectors, from the first level. In all,
    `(share / L1 rate + (1 - share) / L2 rate) / max(block) + 1 / (V * L1 rate)` for a byte.
    A kernel could sort the inputs into panels that fit the first level, and would then pass over
    its sums once a panel instead; docs/experiments.md has some, all slower. `peak_bound_ms` leaves
    this term out: no kernel whatever can be faster than that.

memory = compulsory bytes / (bandwidth of a buffer of that size)
    Activations read once and written once, values and indices read once (2 bytes an index where
    the block columns can be counted in uint16). Inputs that no output reads are not counted.
    Reading takes at least `read / read rate`, writing at least `write / write rate` (the better
    of ordinary and non-temporal stores), and both together at least `(read + write) / (the fastest
    of read, write and copy)`. The rates fall as the buffer outgrows the caches; each is taken at
    the largest measured size that is not above the bytes of the case, and is never less than what a
    larger buffer reached. That is the best case: nothing else has used the caches in between.

For one token (M = 1) there is nothing to share: memory, that is values and indices, decides.

On a GPU compute is at torch's rate of dense products of 8192 x 8192 matrices in that dtype, memory
at the rate of a large copy, and there is no term for operands. Blocks may reach `compute` on the
tensor cores; unstructured weights cannot.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.cases import Case

TILE_VECTORS = (1, 2, 4, 8, 16)
Curve = tuple[tuple[int, float], ...]


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
    def peak_ms(self) -> float:
        """The bound of a kernel whose operands are always in registers."""
        return max(self.compute_ms, self.memory_ms)

    @property
    def limit(self) -> str:
        """Which term decides: "compute", "operands" or "memory"."""
        return max(("compute", "operands", "memory"), key=lambda name: getattr(self, f"{name}_ms"))


@dataclass(frozen=True)
class Work:
    """What one product has to do, whatever the kernel."""

    flops: float
    operand_bytes: int  # if each multiply-add read an activation
    read_bytes: int
    write_bytes: int
    loads: float = 1.0  # activations that a multiply-add does read
    reads_weights: bool = False
    features: int = 1  # that the activations are taken from


def count_work(case: Case, product: str, used_in_features: int | None = None) -> Work:
    """The `Work` of a product ("forward", "grad_input" or "grad_weight"), without bias.

    Args:
        used_in_features: inputs that at least one output reads; by default all.
    """
    element_bytes = case.torch_dtype.itemsize
    nnz = case.out_features * case.fan_in
    used = case.in_features if used_in_features is None else used_in_features
    blocks = nnz // (case.block[0] * case.block[1])
    indices = blocks * (2 if case.in_features // case.block[1] <= 2**16 else 4)
    values = nnz * element_bytes
    x = case.tokens * used * element_bytes
    y = case.tokens * case.out_features * element_bytes
    grad_x = case.tokens * case.in_features * element_bytes
    read, write, features = {
        "forward": (x + values + indices, y, used),
        "grad_input": (y + values + indices, grad_x, case.out_features),
        "grad_weight": (y + x + indices, values, min(used, case.out_features)),
    }[product]
    return Work(
        flops=2.0 * case.tokens * nnz,
        operand_bytes=case.tokens * nnz * element_bytes,
        read_bytes=read,
        write_bytes=write,
        loads=1 / max(case.block),
        reads_weights=product != "grad_weight",
        features=features,
    )


@dataclass(frozen=True)
class Peaks:
    """Measured peaks of all `threads` together. A curve is `((bytes, GB/s), ...)`, ascending."""

    isa: str
    threads: int
    vector_bytes: int
    l1_size: int  # bytes of one core's data cache
    fma_gflops: float
    bf16_gflops: float
    l1_read_gbs: float
    l2_read_gbs: float
    read_gbs: Curve
    write_gbs: Curve
    copy_gbs: Curve

    def bound(self, work: Work, dtype: str) -> Bound:
        """The lower bound of the time of `work`; see the module's docstring."""
        rate = max(self.fma_gflops, self.bf16_gflops if dtype == "bfloat16" else 0.0)
        total = work.read_bytes + work.write_bytes
        read, write, copy = (
            bandwidth_gbs(curve, total) for curve in (self.read_gbs, self.write_gbs, self.copy_gbs)
        )
        either = max(read, write, copy)
        memory = max(work.read_bytes / read, work.write_bytes / write, total / either)
        # Giga-anything per second is a million a millisecond.
        return Bound(
            compute_ms=work.flops / rate * 1e-6,
            operands_ms=work.operand_bytes * self._operand_ns(work) * 1e-6,
            memory_ms=memory * 1e-6,
        )

    def _operand_ns(self, work: Work) -> float:
        """Nanoseconds for each byte of operands, in the best of the tiles."""
        l1_ns, l2_ns = 1 / self.l1_read_gbs, 1 / self.l2_read_gbs

        def with_tile(vectors: int) -> float:
            tile = work.features * vectors * self.vector_bytes
            share = min(1.0, self.l1_size / max(tile, 1))
            weights = l1_ns / vectors if work.reads_weights else 0.0
            return work.loads * (share * l1_ns + (1 - share) * l2_ns) + weights

        return min(with_tile(vectors) for vectors in TILE_VECTORS)


@dataclass(frozen=True)
class GpuPeaks:
    """Measured peaks: dense Tflop/s by dtype (float32 is IEEE, tf32 its short form), copy GB/s."""

    dense_tflops: dict[str, float]
    copy_gbs: float

    def bound(self, work: Work, dtype: str) -> Bound:
        """The lower bound of the time of `work`; see the module's docstring."""
        total = work.read_bytes + work.write_bytes
        return Bound(
            compute_ms=work.flops / self.dense_tflops[dtype] * 1e-9,
            operands_ms=0.0,
            memory_ms=total / self.copy_gbs * 1e-6,
        )


def bandwidth_gbs(curve: Curve, size: int) -> float:
    """The bandwidth that a buffer of `size` bytes may have at best, from a measured curve."""
    at = max((measured for measured, _ in curve if measured <= size), default=curve[0][0])
    return max(rate for measured, rate in curve if measured >= at)
