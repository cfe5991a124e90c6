"""Builds the CUDA sources for the CPU, where the tests run them; see emulation.h."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pybind11
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
BINDINGS = ROOT / "csrc/cuda/bindings_cuda.cpp"
MODULE = "_sparse_kernels_cuda_emulated"
EMULATION = Path(__file__).parent / "emulation.h"
# Two warps: enough for them to get in each other's way, few enough to be quick.
THREADS = 64
# Unoptimised: compiling takes longer than the tests. Bad pointers are AddressSanitizer's already.
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize=null,object-size,vptr"]
SANITIZE += ["-fno-sanitize-recover=all", "-g1", "-O0"]


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def included(source: Path) -> list[Path]:
    """The source and the files of the project that it includes, directly or not."""
    found = [source]
    for path in found:  # which grows
        for name in re.findall(r'#include "(.+)"', path.read_text()):
            folders = (path.parent, ROOT / "csrc/cuda", EMULATION.parent)
            file = next(folder / name for folder in folders if (folder / name).exists())
            if file not in found:
                found.append(file)
    return found


def make(command: list[str], sources: list[Path], name: str) -> Path:
    """The file `name` that the command makes with `-o`; again only if it or a source changed.

    Raises:
        AssertionError: the command fails; the message is the compiler's.
    """
    digest = hashlib.sha256(" ".join(command).encode())
    for path in sources:
        digest.update(path.read_bytes())
    folder = ROOT / "build" / "cuda-emulation" / digest.hexdigest()[:16]
    made = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):  # the other worker waits
        if not made.exists():
            half_made = folder / f"half_made_{name}"
            done = subprocess.run(
                [*command, "-o", str(half_made)], capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr
            half_made.rename(made)
    return made


def build(name: str, sources: list[Path], flags: list[str]) -> Path:
    """The path of the library `name` of these sources; flags are not for the bindings."""
    command = [compiler(), "-std=c++17", "-fPIC", "-fvisibility=hidden", "-O1"]
    command += [f"-DSK_MODULE={name}", "-DSK_EMULATION", f"-DSK_THREADS={THREADS}"]
    command += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-ffp-contract=off"]
    command += [f"-I{EMULATION.parent}", f"-I{ROOT / 'csrc/cuda'}"]
    command += [f"-isystem{p}" for p in (sysconfig.get_path("include"), pybind11.get_include())]
    objects = [
        make([*command, *more, "-c", "-x", "c++", str(source)], included(source), "object.o")
        for source in sources
        for more in [[] if source == BINDINGS else flags]
    ]
    link = [compiler(), "-shared", *flags, *map(str, objects)]
    return make(link, objects, f"{name}.so")


def load(name: str, path: Path) -> ModuleType:
    # The folder is part of the name: pybind11 returns the first module of a name to all who ask.
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}.{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def emulated(sanitize: bool = False) -> ModuleType:
    """The bindings of the CUDA kernels, on the CPU."""
    return load(MODULE, build(MODULE, [BINDINGS, *SOURCES], SANITIZE if sanitize else []))


def counted() -> ModuleType:
    """The same with blocks of as many threads as on a GPU, for SK_EMULATION_COUNT."""
    flags = ["-USK_THREADS", "-O0"]  # the sources have the number of threads
    return load(MODULE, build(MODULE, [BINDINGS, *SOURCES], flags))


def emulated_with(folder: Path, name: str, right: str, wrong: str) -> ModuleType:
    """The same after a change in the file `name` of csrc/cuda; `folder` is for changed copies.

    Products in the copies run the kernels of bfloat16 for every dtype: half the work to compile.
    """
    changed = ROOT / "csrc/cuda" / name
    assert changed.read_text().count(right) == 1, f"{right!r} must be once in {name}"
    sources = []
    for source in SOURCES:
        affected = changed in included(source)
        if affected:
            one = re.sub(r"return (\w+)<(float|Half)>\(", r"return \1<Bf16>(", source.read_text())
            (folder / source.name).write_text(one)
        sources.append(folder / source.name if affected else source)
    (folder / name).write_text(changed.read_text().replace(right, wrong))
    return load(MODULE, build(MODULE, [BINDINGS, *sources], []))
