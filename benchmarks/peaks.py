"""Measures the peaks of this processor or GPU for `benchmarks.roofline`.

The C++ is csrc/bench/peaks.cpp. It is compiled at first use, with the compiler that CXX names or
c++, g++ or clang++, into the user's cache folder, under a name that changes with source and flags.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch  # noqa: F401  loaded first, so that both share one OpenMP runtime

from benchmarks.roofline import Curve, Peaks

SOURCE = Path(__file__).resolve().parent.parent / "csrc" / "bench" / "peaks.cpp"
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC", "-shared")
# The vectors are as wide as the kernels' own.
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mbmi2")
ISA_FLAGS = {
    "avx2": ("-mavx2", "-mfma", "-mbmi2"),
    "avx512": _AVX512,
    "avx512_bf16": (*_AVX512, "-mavx512bf16"),
}
VECTOR_BYTES = {"avx512": 64, "avx512_bf16": 64, "avx2": 32}

# Where the system does not say how large the first-level data cache is: no smaller than most.
L1_SIZE_UNKNOWN = 48 * 1024
# 16 KB a thread lie in every L1 data cache; 160 KB in every second-level cache and in no L1.
L1_BYTES = 16 * 1024
L2_BYTES = 160 * 1024
SIZES = tuple(2**20 * 4**i for i in range(5))  # 1 MB to 256 MB, all threads together
SMOKE_SIZES = (2**20, 2**24)
# Times that each rate is measured, in buffers of its own: another process may disturb one.
BUFFERS = 4


def measure(isa: str, threads: int, sizes: Iterable[int] = SIZES) -> Peaks | str:
    """The peaks with an instruction set, in some seconds, or a sentence that says why not."""
    library = _load(isa)
    if isinstance(library, str):
        return library
    all_sizes = sorted({L1_BYTES * threads, L2_BYTES * threads, *sizes})

    def curve(name: str) -> Curve:
        rate = getattr(library, f"peaks_{name}_gbs")
        # The rate depends on where in memory a buffer happens to lie: the best of several.
        return tuple((size, max(rate(threads, size) for _ in range(BUFFERS))) for size in all_sizes)

    read = curve("read")
    rates = dict(read)
    return Peaks(
        isa=isa,
        threads=threads,
        vector_bytes=VECTOR_BYTES.get(isa, 16),
        l1_size=_l1_size(),
        fma_gflops=max(library.peaks_fma_gflops(threads) for _ in range(BUFFERS)),
        bf16_gflops=max(library.peaks_bf16_gflops(threads) for _ in range(BUFFERS)),
        l1_read_gbs=rates[L1_BYTES * threads],
        l2_read_gbs=rates[L2_BYTES * threads],
        read_gbs=read,
        write_gbs=curve("write"),
        copy_gbs=curve("copy"),
    )


@functools.cache
def _load(isa: str) -> ctypes.CDLL | str:
    """The compiled library, or a sentence that says why there is none."""
    wanted = (os.environ.get("CXX", ""), "c++", "g++", "clang++")
    compiler = next(filter(None, map(shutil.which, filter(None, wanted))), None)
    if compiler is None:
        return "no bound: install a C++ compiler (or set CXX) to measure the peaks of this machine"
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparse-kernels"
    flags = (*FLAGS, *ISA_FLAGS.get(isa, ()))
    key = hashlib.sha256(SOURCE.read_bytes() + " ".join((compiler, *flags)).encode())
    path = base / f"peaks-{key.hexdigest()[:16]}.so"
    if not path.exists():
        base.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=base) as folder:
            made = Path(folder) / "peaks.so"
            # Without OpenMP the kernels run on one thread, and so do their peaks.
            for openmp in (("-fopenmp",), ()):
                command = [compiler, *flags, *openmp, str(SOURCE), "-o", str(made)]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode == 0:
                    break
            else:
                reason = (done.stderr.strip().splitlines() or ["no message"])[0]
                return f"no bound: {compiler} cannot compile csrc/bench/peaks.cpp ({reason})"
            made.replace(path)
    library = ctypes.CDLL(str(path))
    for name in ("fma_gflops", "bf16_gflops", "read_gbs", "write_gbs", "copy_gbs"):
        function = getattr(library, f"peaks_{name}")
        function.restype = ctypes.c_double
        function.argtypes = [ctypes.c_int] + [ctypes.c_size_t] * name.endswith("gbs")
    return library


def _l1_size() -> int:
    """Bytes of the first-level data cache of a core, as Linux says."""
    for cache in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind = (cache / "level").read_text(), (cache / "type").read_text()
            size = (cache / "size").read_text().strip()
        except OSError:
            continue
        if level.strip() == "1" and kind.strip() == "Data" and size[:-1].isdigit():
            return int(size[:-1]) * {"K": 1024, "M": 1024**2}.get(size[-1], 1)
    return L1_SIZE_UNKNOWN
