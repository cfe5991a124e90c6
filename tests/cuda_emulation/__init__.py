"""Builds the CUDA sources for the CPU, where the tests run them; see emulation.h."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pybind11
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [ROOT / "csrc/cuda" / name for name in ("device.cu", "spmm.cu", "sddmm.cu", "topk.cu")]
BINDINGS = ROOT / "csrc/cuda/bindings_cuda.cpp"
EMULATION = Path(__file__).parent / "emulation.h"
# Two warps: enough for them to get in each other's way, few enough to be quick.
THREADS = 64
# Unoptimised: compiling takes longer than the tests. Bad pointers are AddressSanitizer's already.
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize=null,object-size,vptr"]
SANITIZE += ["-fno-sanitize-recover=all", "-g1", "-O0"]


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def build(name: str, sources: list[Path], flags: list[str]) -> Path:
    """The path of the library `name`; built again only if a source or a flag changed.

    Raises:
        AssertionError: it does not compile; the message is the compiler's.
    """
    command = [compiler(), "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-O1"]
    command += [f"-DSK_MODULE={name}", "-DSK_EMULATION", f"-DSK_THREADS={THREADS}", *flags]
    command += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-ffp-contract=off"]
    command += [f"-I{EMULATION.parent}", f"-I{ROOT / 'csrc/cuda'}"]
    command += [f"-isystem{p}" for p in (sysconfig.get_path("include"), pybind11.get_include())]
    for source in sources:
        command += ["-x", "c++", str(source)]
    digest = hashlib.sha256(" ".join(command).encode())
    for path in [*sources, EMULATION, *sorted((ROOT / "csrc/cuda").glob("*"))]:
        digest.update(path.read_bytes())
    folder = ROOT / "build" / "cuda-emulation" / digest.hexdigest()[:16]
    built = folder / f"{name}.so"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):  # the other worker waits
        if not built.exists():
            half_built = folder / "half_built.so"
            done = subprocess.run(
                [*command, "-o", str(half_built)], capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr
            half_built.rename(built)
    return built


def load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def emulated(sanitize: bool = False) -> ModuleType:
    """The bindings of the CUDA kernels, on the CPU."""
    name = "_sparse_kernels_cuda_emulated"
    flags = SANITIZE if sanitize else []
    return load(name, build(name, [BINDINGS, *SOURCES], flags))
