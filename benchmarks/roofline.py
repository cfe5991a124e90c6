"""The least time that a product can take on this machine.

    python -m benchmarks.roofline      beside the time of a loop with nothing else in it

docs/benchmarks.md has the equations of its terms. Nothing is fitted: every rate is measured
in the same process, with the vectors and the number of threads that the kernels use, as the best of
several runs. The C++ is csrc/bench/peaks.cpp. Each process compiles it, in two seconds, with the
compiler that CXX names or c++, g++ or clang++.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import cases
from benchmarks.cases import DTYPES, Case
from benchmarks.report import number, refuse, table
from sparse_kernels import cpu

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
# Tiles of a thread, whose rows are gathered.
TILE_VECTORS = (1, 2, 4, 8)
TILE_BYTES = tuple(2**n for n in range(14, 21))  # 16 KB to 1 MB
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
        features=features,
    )


@dataclass(frozen=True)
class Peaks:
    """Measured peaks of all `threads` together. A curve is `((bytes, GB/s), ...)`, ascending."""

    isa: str
    threads: int
    vector_bytes: int
    fma_gflops: float
    bf16_gflops: float
    gather_gbs: tuple[tuple[int, Curve], ...]  # by the vectors of a tile, over its bytes
    read_gbs: Curve
    write_gbs: Curve
    copy_gbs: Curve
    one_read_gbs: Curve  # of one thread alone

    def bound_ms(self, work: Work, dtype: str) -> dict[str, float]:
        """The terms of the bound by their names; the largest is the bound."""
        rate = max(self.fma_gflops, self.bf16_gflops if dtype == "bfloat16" else 0.0)
        total = work.read_bytes + work.write_bytes
        read, write, copy = (
            bandwidth_gbs(curve, total) for curve in (self.read_gbs, self.write_gbs, self.copy_gbs)
        )
        memory = max(
            work.read_bytes / read, work.write_bytes / write, total / max(read, write, copy)
        )
        # A thread packs a tile before it multiplies it; its stores leave meanwhile.
        one_read = self.threads * bandwidth_gbs(self.one_read_gbs, total // self.threads)
        packed = work.read_bytes / one_read
        gathered = work.operand_bytes * work.loads / self._gathers(work)
        # Giga-anything per second is a million a millisecond.
        return {
            "compute": (packed + work.flops / rate) * 1e-6,
            "operands": (packed + gathered) * 1e-6,
            "memory": memory * 1e-6,
        }

    def _gathers(self, work: Work) -> float:
        """GB/s of gathered activations, from the best of the tiles."""
        return max(
            bandwidth_gbs(curve, size)
            for vectors, curve in self.gather_gbs
            if (size := work.features * vectors * self.vector_bytes) <= TILE_BYTES[-1]
            or vectors == TILE_VECTORS[0]
        )


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
    sizes = SMOKE_SIZES if smoke else SIZES
    tiles = TILE_BYTES[::6] if smoke else TILE_BYTES

    def best(name: str, *arguments: int, threads: int = threads) -> float:
        return max(_call(library, name, threads, *arguments) for _ in range(BUFFERS))

    def curve(name: str, threads: int = threads) -> Curve:
        return tuple((size, best(f"{name}_gbs", size, threads=threads)) for size in sizes)

    return Peaks(
        isa=isa,
        threads=threads,
        vector_bytes=VECTOR_BYTES.get(isa, 16),
        fma_gflops=best("fma_gflops"),
        bf16_gflops=best("bf16_gflops"),
        gather_gbs=tuple(
            (vectors, tuple((size, best("gather_gbs", vectors, size)) for size in tiles))
            for vectors in TILE_VECTORS
        ),
        read_gbs=curve("read"),
        write_gbs=curve("write"),
        copy_gbs=curve("copy"),
        one_read_gbs=curve("read", 1),
    )


def product_ms(isa: str, threads: int, case: Case) -> float:
    """A float32 forward with unstructured weights by a loop that does what the bound counts."""
    library = _load(isa)
    assert not isinstance(library, str), library
    sizes = case.tokens, case.in_features, case.out_features, case.fan_in
    turns = [vectors for vectors in TILE_VECTORS for _ in range(BUFFERS)]
    return min(_call(library, "product_ms", threads, vectors, *sizes) for vectors in turns)


def _call(library: ctypes.CDLL, name: str, threads: int, *sizes: int) -> float:
    function = getattr(library, f"peaks_{name}")
    function.restype = ctypes.c_double
    function.argtypes = [ctypes.c_int, *[ctypes.c_size_t] * len(sizes)]
    result: float = function(threads, *sizes)
    return result


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


def main() -> None:
    """Prints the bound of each goal, and the share of it that the loop reaches."""
    argparse.ArgumentParser(
        prog="python -m benchmarks.roofline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    isa, threads = cpu.isa(), torch.get_num_threads()
    peaks = measure_peaks(isa, threads)
    if isinstance(peaks, str):
        refuse("python -m benchmarks.roofline", peaks)
    lines = []
    for case in cases.combine([cases.TOKENS], cases.LAYERS):
        terms = peaks.bound_ms(count_work(case, "forward"), case.dtype)
        time_ms = product_ms(isa, threads, case)
        terms_ms = {term: number(ms) for term, ms in terms.items()}
        reached = f"{max(terms.values()) / time_ms:.0%}"
        lines.append({"forward": case, **terms_ms, "loop": number(time_ms), "reached": reached})
    print(f"{isa}, {threads} threads, ms", table(lines), sep="\n")


if __name__ == "__main__":
    main()
