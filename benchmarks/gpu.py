"""Everything that has to be done on a machine with a GPU, in one go.

    python -m benchmarks.gpu                         build, check, measure, profile, test: 8 minutes
    python -m benchmarks.gpu --smoke                 tiny shapes: does everything run?

Needs a checkout, PyTorch with CUDA, Triton, nvcc, pybind11, setuptools, ninja, pytest, hypothesis;
no network. Each command has a time limit and leaves its output in NAME.log in the folder `--out`,
the benchmarks also NAME.json. One that fails does not stop the others, except that all need the
build; the exit status is 1 if any failed. Two more take hours:

    python -m benchmarks.matmul --device cuda --full
    SPARSE_KERNELS_TRITON_TUNE=1 python -m benchmarks.matmul --device cuda --backend triton
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import tyro

from benchmarks import devices, report

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = "python -m benchmarks.gpu"
# The tests that run on a GPU; others need packages that a machine with a GPU may lack.
TESTS = " ".join(
    f"tests/test_{name}.py" for name in ("cuda", "triton", "triton_refusals", "gpu_benchmarks")
)
METRICS = (
    "sm__inst_executed.avg.per_cycle_active,lts__t_bytes.sum.per_second,"
    "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum,dram__bytes.sum.per_second"
)


def plan(out: Path, *, smoke: bool = False) -> list[tuple[str, int, str]]:
    """Each command with its name and the seconds that it may take."""
    python = shlex.quote(sys.executable)
    matmul, topk = (f"{python} -m benchmarks.{n} --device cuda" for n in ("matmul", "activation"))
    results = f"{'--smoke ' if smoke else ''}--json {shlex.quote(str(out))}"
    # Every kernel once on small shapes. Each tensor gets memory of its own, so that the sanitizer
    # sees an access outside of one.
    check = "--smoke --check --backend"
    sanitize = "env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 --tool"
    return [
        ("build", 60, f"env SPARSE_KERNELS_CUDA=1 {python} setup.py build_ext --inplace"),
        ("check-triton", 40, f"{matmul} {check} triton"),
        ("matmul", 150, f"{matmul} {results}/matmul.json"),
        ("activation", 20, f"{topk} {results}/activation.json"),
        ("memcheck", 35, f"{sanitize} memcheck {matmul} {check} cuda"),
        ("memcheck-topk", 15, f"{sanitize} memcheck {topk} {check} cuda"),
        ("racecheck", 35, f"{sanitize} racecheck {matmul} {check} cuda"),
        ("profile", 45, f"ncu --metrics {METRICS} --csv {matmul} {check} cuda"),
        ("test", 75, f"{python} -m pytest -q -x -o addopts=-ra -m gpu {TESTS}"),
    ]


def run(command: str, limit_s: float, log: Path) -> str:
    """Runs a command in the checkout, with its output in the log; returns how it ended."""
    words, environment = shlex.split(command), {**os.environ, "PYTHONUNBUFFERED": "1"}
    with log.open("w") as file:
        try:
            done = subprocess.run(
                words, cwd=ROOT, env=environment, timeout=limit_s,
                stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip
        except FileNotFoundError:
            return f"{words[0]} is not installed"
        except subprocess.TimeoutExpired:
            return f"stopped after {limit_s:.0f} s"
    return f"exit status {done.returncode}" if done.returncode else "passed"


def main(out: Path = Path("gpu-results"), smoke: bool = False) -> int:
    """Runs the commands.

    Args:
        out: the folder of the results and the logs.
        smoke: tiny shapes.
    """
    if reason := devices.why_not("cuda"):
        report.refuse(PROGRAM, f"this needs a GPU: {reason}")
    out.mkdir(parents=True, exist_ok=True)
    endings = []
    for name, limit_s, command in plan(out.absolute(), smoke=smoke):
        start = time.monotonic()
        endings.append(run(command, limit_s, out / f"{name}.log"))
        print(f"{name:<14} {time.monotonic() - start:6.1f} s  {endings[-1]}", flush=True)
        if name == "build" and endings[-1] != "passed":
            break
    return 0 if set(endings) == {"passed"} else 1


if __name__ == "__main__":
    sys.exit(tyro.cli(main, prog=PROGRAM, description=__doc__))
