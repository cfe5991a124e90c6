"""Everything that has to be done on a machine with a GPU, in one go.

    python -m benchmarks.gpu                         build, test, check, measure: about 25 minutes
    python -m benchmarks.gpu --only build,test       some of the steps, in their order
    python -m benchmarks.gpu --smoke                 tiny shapes: does everything run?

Needs a checkout, PyTorch with CUDA, Triton, nvcc, pybind11, setuptools, ninja, pytest, hypothesis;
no network. Leaves, in `--out` (default benchmarks/results), JSON files named by GPU and day and one
log, gpu-NAME-DAY.log. A step that fails does not stop those that do not need it; the exit status is
1 if any failed. The steps:

    build       the extensions, in place, with the CUDA kernels
    test        the tests on the GPU (pytest -m gpu)
    sanitize    compute-sanitizer over small shapes: memcheck, racecheck, synccheck
    goals       python -m benchmarks.matmul --device cuda --goals: the cases with a goal
    others      python -m benchmarks.matmul --device cuda --no-goals
    activation  python -m benchmarks.activation --device cuda
    tune        the cases with a goal on Triton again, with the tiles that a search finds
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import torch
import tyro

from benchmarks import report
from benchmarks.devices import why_not as why_no_device

ROOT = Path(__file__).resolve().parent.parent.parent
SANITIZERS = ("memcheck", "racecheck", "synccheck")
STEPS = ("build", "test", "sanitize", "goals", "others", "activation", "tune")
PROGRAM = "python -m benchmarks.gpu"


@dataclass(frozen=True)
class Command:
    """One process of a step."""

    step: str
    words: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its exit status, or None where it ran out of time."""

    command: Command
    status: int | None
    seconds: float

    @property
    def is_good(self) -> bool:
        return self.status == 0


def plan(*, gpu_name: str, day: str, out: Path, smoke: bool, steps: Sequence[str]) -> list[Command]:
    """The commands of the steps, in order."""
    python = sys.executable
    tiny = ("--smoke",) if smoke else ()

    def benchmark(step: str, module: str, *options: str, **environment: str) -> Command:
        name = module if module == step else f"{module}-{step}"
        path = out / f"{name}-{gpu_name}-{day}.json"
        # No tiny case has a goal.
        options = tiny or options
        words = (f"benchmarks.{module}", "--device", "cuda", *options, "--json", str(path))
        return Command(step, (python, "-m", *words), environment)

    commands = {
        "build": [
            Command(
                "build",
                (python, "setup.py", "build_ext", "--inplace"),
                {"SPARSE_KERNELS_CUDA": "1"},
            )
        ],
        "test": [
            Command("test", (python, "-m", "pytest", "-q", "-o", "addopts=-ra", "-m", "gpu"))
        ],
        "sanitize": [
            Command(
                "sanitize",
                (
                    "compute-sanitizer", "--tool", tool, "--error-exitcode", "1",
                    python, "-m", "benchmarks.gpu.small",
                ),
                {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            )
            for tool in SANITIZERS
        ],
        "goals": [benchmark("goals", "matmul", "--goals")],
        "others": [benchmark("others", "matmul", "--no-goals")],
        "activation": [benchmark("activation", "activation")],
        "tune": [
            benchmark(
                "tune", "matmul", "--goals", "--backend", "triton",
                SPARSE_KERNELS_TRITON_TUNE="1",
            )
        ],
    }  # fmt: skip
    return [command for step in STEPS if step in steps for command in commands[step]]


def run(command: Command, log: Path, limit_s: float) -> Outcome:
    """Runs one command in the checkout; what it prints goes to the terminal and the log."""
    started = time.monotonic()
    shown = " ".join(
        [*(f"{name}={value}" for name, value in command.environment.items()), *command.words]
    )
    with log.open("a") as file:
        for stream in (sys.stdout, file):
            print(f"\n==> {command.step}: {shown}", file=stream, flush=True)
        with subprocess.Popen(
            command.words,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **command.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            assert process.stdout is not None
            is_late = threading.Event()

            def stop() -> None:
                is_late.set()
                process.kill()

            timer = threading.Timer(limit_s, stop)
            timer.start()
            try:
                for line in process.stdout:
                    print(line, end="", flush=True)
                    print(line, end="", file=file, flush=True)
                process.wait()
            except BaseException:
                process.kill()
                raise
            finally:
                timer.cancel()
        seconds = time.monotonic() - started
        status = None if is_late.is_set() else process.returncode
        ending = "out of time" if status is None else f"exit status {status}"
        for stream in (sys.stdout, file):
            print(f"<== {command.step}: {ending}, {seconds:.0f} s", file=stream, flush=True)
    return Outcome(command, status, seconds)


def why_not(command: Command, failed: Sequence[str]) -> str | None:
    """None if the command can run, else a sentence."""
    if command.step != "build" and "build" in failed:
        return "the build failed"
    if shutil.which(command.words[0]) is None:
        return f"{command.words[0]} is not installed"
    return None


def short_name(gpu: str) -> str:
    """`NVIDIA H100 80GB HBM3` -> `h100-80gb-hbm3`, for names of files."""
    name = gpu.lower().replace("nvidia", "").strip()
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


@dataclass(frozen=True)
class Options:
    """Options of the command line."""

    only: str = ",".join(STEPS)
    """Some of the steps, with commas between them."""
    out: Path = ROOT / "benchmarks" / "results"
    """The folder of the results and the log."""
    smoke: bool = False
    """Tiny shapes."""
    minutes: float = 60.0
    """The longest that a command may take."""
    commit: str | None = None
    """What the results name, where the checkout has no git."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; `arguments` are the words after the module's name."""
    options = tyro.cli(Options, prog=PROGRAM, description=__doc__, args=arguments)
    steps = options.only.split(",")
    unknown = [step for step in steps if step not in STEPS]
    if unknown:
        report.refuse(
            PROGRAM, f"--only: no step is called {unknown[0]!r}; there are {', '.join(STEPS)}"
        )
    if not options.minutes > 0:
        report.refuse(PROGRAM, f"--minutes must be positive, got {options.minutes}")
    if reason := why_no_device("cuda"):
        report.refuse(PROGRAM, f"this needs a GPU: {reason}")
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    if options.commit:
        os.environ["BENCHMARK_COMMIT"] = options.commit
    name = short_name(torch.cuda.get_device_name())
    day = datetime.now(timezone.utc).date().isoformat()
    log = out / f"gpu-{name}-{day}.log"
    with log.open("a") as file:
        print(f"{torch.cuda.get_device_name()}, commit {report.commit()}", file=file)
    outcomes: list[Outcome] = []
    lines: list[str] = []
    try:
        for command in plan(gpu_name=name, day=day, out=out, smoke=options.smoke, steps=steps):
            failed = [done.command.step for done in outcomes if not done.is_good]
            reason = why_not(command, failed)
            if reason is not None:
                outcomes.append(Outcome(command, None, 0.0))
                lines.append(f"FAILED  {command.step:<11} did not run: {reason}")
                continue
            outcome = run(command, log, options.minutes * 60)
            outcomes.append(outcome)
            verdict = "passed" if outcome.is_good else "FAILED"
            lines.append(f"{verdict}  {command.step:<11} {outcome.seconds:5.0f} s")
    except KeyboardInterrupt:
        lines.append("interrupted")
        return report.INTERRUPTED
    finally:
        with log.open("a") as file:
            for stream in (sys.stdout, file):
                print("", *lines, f"log: {log}", sep="\n", file=stream, flush=True)
    return 0 if all(outcome.is_good for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
