"""Everything that has to be done on a machine with a GPU, in one go.

    python -m benchmarks.gpu                         build, check, measure, profile, test: 8 minutes
    python -m benchmarks.gpu --only build,matmul     some of the steps, in their order
    python -m benchmarks.gpu --smoke                 tiny shapes: does everything run?

Needs a checkout, PyTorch with CUDA, Triton, nvcc, pybind11, setuptools, ninja, pytest, hypothesis;
no network. Each step has a time limit and leaves its output in STEP.log in the folder `--out`, the
benchmarks also STEP.json, which has every case as soon as it is measured. gpu.json says how each
step ended. A step that fails does not stop the others, except that all need the build; the exit
status is 1 if any failed.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

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
# Steps that take hours run only where --only names them.
OPTIONAL = ("all", "tune")


class Step(NamedTuple):
    """One command, and how long it may take."""

    name: str
    limit_s: float
    command: list[str]


def plan(out: Path, *, smoke: bool = False) -> list[Step]:
    """The steps, in order. They end in 8 minutes, those of hours not counted."""
    python = shlex.quote(sys.executable)
    matmul, topk = (f"{python} -m benchmarks.{n} --device cuda" for n in ("matmul", "activation"))
    json = f"--json {shlex.quote(str(out))}"
    # Every kernel once on small shapes. Each tensor gets memory of its own, so that the sanitizer
    # sees an access outside of one.
    check = "--smoke --check --backend"
    sanitize = "env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 --tool"
    tune = "env SPARSE_KERNELS_TRITON_TUNE=1"
    chosen = "--smoke" if smoke else ""
    table = f"""
        build          60 env SPARSE_KERNELS_CUDA=1 {python} setup.py build_ext --inplace
        check-triton   40 {matmul} {check} triton
        matmul        150 {matmul} {chosen} {json}/matmul.json
        activation     20 {topk} {chosen} {json}/activation.json
        memcheck       35 {sanitize} memcheck {matmul} {check} cuda
        memcheck-topk  15 {sanitize} memcheck {topk} {check} cuda
        racecheck      35 {sanitize} racecheck {matmul} {check} cuda
        profile        45 ncu --metrics {METRICS} --csv {matmul} {check} cuda
        test           75 {python} -m pytest -q -x -o addopts=-ra -m gpu {TESTS}
        all          3600 {matmul} --full {json}/all.json
        tune         3600 {tune} {matmul} --backend triton {json}/tune.json
    """
    lines = map(shlex.split, table.strip().splitlines())
    return [Step(name, float(limit), command) for name, limit, *command in lines]


def run(step: Step, log: Path) -> dict[str, Any]:
    """Runs one step in the checkout, with its output in the log; returns how it ended."""
    started = time.monotonic()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with log.open("w") as file:
        try:
            done = subprocess.run(
                step.command, cwd=ROOT, env=environment, timeout=step.limit_s,
                stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip
            ending = f"exit status {done.returncode}" if done.returncode else "passed"
        except FileNotFoundError:
            ending = f"{step.command[0]} is not installed"
        except subprocess.TimeoutExpired:
            ending = f"stopped after {step.limit_s:.0f} s"
    seconds = round(time.monotonic() - started, 1)
    return {"step": step.name, "ending": ending, "seconds": seconds, "command": step.command}


def main(only: str = "", out: Path = Path("gpu-results"), smoke: bool = False) -> int:
    """Runs the steps.

    Args:
        only: some of the steps, with commas between them; by default every one that takes minutes.
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
        print(f"{name:<14} {row['seconds']:6.1f} s  {row['ending']}", flush=True)
        report.write_json(out / "gpu.json", machine, rows, complete=len(rows) == len(names))
    return 0 if all(row["ending"] == "passed" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(tyro.cli(main, prog=PROGRAM, description=__doc__))
