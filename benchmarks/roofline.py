"""The least time that a product can take on this machine: `max(compute, operands, memory)`.

docs/benchmarks.md has the equations of the three terms. Nothing is fitted: every rate is measured
in the same process, with the vectors and the number of threads that the kernels use, as the best of
several runs. The C++ is csrc/bench/peaks.cpp. Each process compiles it, in two seconds, with the
compiler that CXX names or c++, g++ or clang++.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cases import DTYPES, Case
from benchmarks.report import output_of

SOURCE = Path(__file__).resolve().parent.parent / "csrc" / "bench" / "peaks.cpp"
FLAGS = ("-ffp-contract=fast", "-fPIC")
# The vectors are as wide as the kernels' own.
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mbmi2")
ISA_FLAGS = {
    "avx2": ("-mavx2", "-mfma", "-mbmi2"),
    "avx512": _AVX512,
    "avx512_bf16": (*_AVX512, "-mavx512bf16"),
}
VECTOR_BYTES = {"avx512": 64, "avx512_bf16": 64, "avx2": 32}
TILE_VECTORS = (1, 2, 4, 8, 16)
# Where the system does not say how large the first-level data cache is: no smaller than most.
L1_SIZE_UNKNOWN = 48 * 1024
# 16 KB a thread lie in every L1 data cache; 160 KB in every second-level cache and in no L1.
L1_BYTES, L2_BYTES = 16 * 1024, 160 * 1024
SIZES = tuple(2**20 * 4**i for i in range(4))  # 1 MB to 64 MB, all threads together
SMOKE_SIZES = (2**20, 2**24)
# Times that each rate is measured, in buffers of its own: another process may disturb one, and the
# rate depends on where in memory a buffer happens to lie.
BUFFERS = 4

Curve = tuple[tuple[int, float], ...]


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
    element_bytes = DTYPES[case.dtype].itemsize
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

    def bound_ms(self, work: Work, dtype: str) -> dict[str, float]:
        """The terms of the bound by their names; the largest is the bound."""
        rate = max(self.fma_gflops, self.bf16_gflops if dtype == "bfloat16" else 0.0)
        total = work.read_bytes + work.write_bytes
        read, write, copy = (
            bandwidth_gbs(curve, total) for curve in (self.read_gbs, self.write_gbs, self.copy_gbs)
        )
        either = max(read, write, copy)
        memory = max(work.read_bytes / read, work.write_bytes / write, total / either)
        # Giga-anything per second is a million a millisecond.
        return {
            "compute": work.flops / rate * 1e-6,
            "operands": work.operand_bytes * self._operand_ns(work) * 1e-6,
            "memory": memory * 1e-6,
        }

    def _operand_ns(self, work: Work) -> float:
        """Nanoseconds for each byte of operands, in the best of the tiles."""
        l1_ns, l2_ns = 1 / self.l1_read_gbs, 1 / self.l2_read_gbs

        def with_tile(vectors: int) -> float:
            tile = work.features * vectors * self.vector_bytes
            share = min(1.0, self.l1_size / max(tile, 1))
            weights = l1_ns / vectors if work.reads_weights else 0.0
            return work.loads * (share * l1_ns + (1 - share) * l2_ns) + weights

        return min(map(with_tile, TILE_VECTORS))


@dataclass(frozen=True)
class GpuPeaks:
    """Measured peaks: dense Tflop/s by dtype (float32 is IEEE, tf32 its short form), copy GB/s."""

    dense_tflops: dict[str, float]
    copy_gbs: float

    def bound_ms(self, work: Work, dtype: str) -> dict[str, float]:
        """The terms of the bound by their names; the largest is the bound."""
        total = work.read_bytes + work.write_bytes
        compute_ms = work.flops / self.dense_tflops[dtype] * 1e-9
        return {"compute": compute_ms, "memory": total / self.copy_gbs * 1e-6}


def bandwidth_gbs(curve: Curve, size: int) -> float:
    """The bandwidth that a buffer of `size` bytes may have at best, from a measured curve."""
    at = max((measured for measured, _ in curve if measured <= size), default=curve[0][0])
    return max(rate for measured, rate in curve if measured >= at)


def measure_peaks(isa: str, threads: int, *, smoke: bool = False) -> Peaks | str:
    """The peaks with an instruction set, in some seconds, or a sentence that says why not."""
    library = _load(isa)
    if isinstance(library, str):
        return library
    sizes = sorted({L1_BYTES * threads, L2_BYTES * threads, *(SMOKE_SIZES if smoke else SIZES)})

    def best(name: str, *arguments: int) -> float:
        function = getattr(library, f"peaks_{name}")
        function.restype = ctypes.c_double
        function.argtypes = [ctypes.c_int, ctypes.c_size_t][: 1 + len(arguments)]
        return max(function(threads, *arguments) for _ in range(BUFFERS))

    read, write, copy = (
        tuple((size, best(f"{name}_gbs", size)) for size in sizes)
        for name in ("read", "write", "copy")
    )
    return Peaks(
        isa=isa,
        threads=threads,
        vector_bytes=VECTOR_BYTES.get(isa, 16),
        l1_size=int(output_of("getconf", "LEVEL1_DCACHE_SIZE") or 0) or L1_SIZE_UNKNOWN,
        fma_gflops=best("fma_gflops"),
        bf16_gflops=best("bf16_gflops"),
        l1_read_gbs=dict(read)[L1_BYTES * threads],
        l2_read_gbs=dict(read)[L2_BYTES * threads],
        read_gbs=read,
        write_gbs=write,
        copy_gbs=copy,
    )


@functools.cache
def _load(isa: str) -> ctypes.CDLL | str:
    """The compiled library, or a sentence that says why there is none."""
    wanted = (os.environ.get("CXX", ""), "c++", "g++", "clang++")
    compiler = next(filter(None, map(shutil.which, filter(None, wanted))), None)
    if compiler is None:
        return "no bound: install a C++ compiler (or set CXX) to measure the peaks of this machine"
    # Without OpenMP the kernels run on one thread, and so do their peaks.
    for openmp in (["-fopenmp"], []):
        library = load(compiler, SOURCE, *FLAGS, *ISA_FLAGS.get(isa, ()), *openmp)
        if not isinstance(library, str):
            return library
    return f"no bound: {compiler} cannot compile csrc/bench/peaks.cpp ({library})"


def load(compiler: str, source: Path, *flags: str) -> ctypes.CDLL | str:
    """A source file as a library, or the first line of what the compiler has against it."""
    with tempfile.TemporaryDirectory() as folder:
        library = os.path.join(folder, "library.so")
        command = [compiler, "-std=c++17", "-O3", "-shared", *flags, str(source), "-o", library]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            return ctypes.CDLL(library)
    return (done.stderr.strip().splitlines() or ["no message"])[0]
