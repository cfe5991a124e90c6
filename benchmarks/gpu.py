"""Everything that has to be done on a machine with a GPU, in one go.

    python -m benchmarks.gpu                         build, check, measure, profile, test: 8 minutes
    python -m benchmarks.gpu --only build,goals      some of the steps, in their order
    python -m benchmarks.gpu --smoke                 tiny shapes: does everything run?

Needs a checkout, PyTorch with CUDA, Triton, nvcc, pybind11, setuptools, ninja, pytest, hypothesis;
no network. Each step has a time limit and leaves its output in STEP.log in the folder `--out`, the
benchmarks also STEP.json, which has every case as soon as it is measured. gpu.json says how each
step ended. A step that fails does not stop the others, except that all need the build; the exit
status is 1 if any failed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from benchmarks import devices, report

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = "python -m benchmarks.gpu"
PYTHON = (sys.executable, "-m")
# Every kernel once on small shapes: for compute-sanitizer and a profiler.
CHECK = ("--device", "cuda", "--smoke", "--check", "--backend")
# The tests that run on a GPU; others need packages that a machine with a GPU may lack.
TESTS = tuple(
    f"tests/test_{name}.py" for name in ("cuda", "triton", "triton_refusals", "gpu_benchmarks")
)
METRICS = (
    "sm__inst_executed.avg.per_cycle_active,lts__t_bytes.sum.per_second,"
    "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum,dram__bytes.sum.per_second"
)
# Only run where --only names them: they take hours.
OPTIONAL = ("all", "tune")


@dataclass(frozen=True)
class Step:
    """One command, and how long it may take."""

    name: str
    limit_s: float
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


def plan(out: Path, *, smoke: bool = False) -> list[Step]:
    """The steps, in order. They end in 8 minutes, the optional ones not counted."""

    def benchmark(name: str, module: str, limit_s: float, *options: str, **extra: str) -> Step:
        options = ("--smoke",) if smoke else options  # no tiny case has a goal
        words = (f"benchmarks.{module}", "--device", "cuda", *options)
        return Step(name, limit_s, (*PYTHON, *words, "--json", str(out / f"{name}.json")), extra)

    def sanitizer(tool: str, module: str, limit_s: float) -> Step:
        command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *PYTHON)
        # Each tensor gets memory of its own, so that an access outside of one is seen.
        extra = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        words = (f"benchmarks.{module}", *CHECK, "cuda")
        return Step(f"{tool}-{module}", limit_s, (*command, *words), extra)

    build = (sys.executable, "setup.py", "build_ext", "--inplace")
    profile = ("ncu", "--metrics", METRICS, "--kernel-name-base", "demangled", "--csv", *PYTHON)
    test = (*PYTHON, "pytest", "-q", "-x", "-o", "addopts=-ra", "-m", "gpu", *TESTS)
    return [
        Step("build", 60, build, {"SPARSE_KERNELS_CUDA": "1"}),
        Step("check-triton", 40, (*PYTHON, "benchmarks.matmul", *CHECK, "triton")),
        benchmark("goals", "matmul", 150, "--goals"),
        benchmark("activation", "activation", 20, "--goals"),
        sanitizer("memcheck", "matmul", 35),
        sanitizer("memcheck", "activation", 15),
        sanitizer("racecheck", "matmul", 35),
        Step("profile", 45, (*profile, "benchmarks.matmul", *CHECK, "cuda")),
        Step("test", 75, test),
        benchmark("all", "matmul", 3600),
        benchmark(
            "tune", "matmul", 3600, "--goals", "--backend", "triton", SPARSE_KERNELS_TRITON_TUNE="1"
        ),
    ]


def run(step: Step, log: Path) -> dict[str, Any]:
    """Runs one step in the checkout, with its output in the log; returns how it ended."""
    started = time.monotonic()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **step.environment}
    ending = "passed"
    if shutil.which(step.command[0]) is None:
        ending = f"{step.command[0]} is not installed"
    else:
        with log.open("w") as file:
            try:
                done = subprocess.run(
                    step.command, cwd=ROOT, env=environment, timeout=step.limit_s,
                    stdout=file, stderr=subprocess.STDOUT,
                )  # fmt: skip
                if done.returncode != 0:
                    ending = f"exit status {done.returncode}"
            except subprocess.TimeoutExpired:
                ending = f"stopped after {step.limit_s:.0f} s"
    seconds = round(time.monotonic() - started, 1)
    return {"step": step.name, "ending": ending, "seconds": seconds, "command": step.command}


def main(only: str = "", out: Path = Path("gpu-results"), smoke: bool = False) -> int:
    """Runs the steps.

    Args:
        only: some of the steps, with commas between them; by default all but all and tune.
        out: the folder of the results and the logs.
        smoke: tiny shapes.
    """
    steps = {step.name: step for step in plan(out.absolute(), smoke=smoke)}
    names = only.split(",") if only else [name for name in steps if name not in OPTIONAL]
    if unknown := [name for name in names if name not in steps]:
        report.refuse(PROGRAM, f"--only: no step is {unknown[0]!r}; there are {', '.join(steps)}")
    if reason := devices.why_not("cuda"):
        report.refuse(PROGRAM, f"this needs a GPU: {reason}")
    out.mkdir(parents=True, exist_ok=True)
    machine = devices.connect("cuda").describe(["-m", "benchmarks.gpu"])
    rows: list[dict[str, Any]] = []
    for name in (name for name in steps if name in names):
        if rows and rows[0]["step"] == "build" and rows[0]["ending"] != "passed":
            row = {"step": name, "ending": "the build failed", "seconds": 0.0}
        else:
            row = run(steps[name], out / f"{name}.log")
        rows.append(row)
        print(f"{name:<20} {row['seconds']:6.1f} s  {row['ending']}", flush=True)
        report.write_json(out / "gpu.json", machine, rows, complete=len(rows) == len(names))
    return 0 if all(row["ending"] == "passed" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(tyro.cli(main, prog=PROGRAM, description=__doc__))
