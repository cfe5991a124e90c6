"""Everything that has to be done on a machine with a GPU, in one go of at most 8 minutes.

    python -m benchmarks.gpu                  build, check, measure, profile, test
    python -m benchmarks.gpu --no-build       the kernels are built already
    python -m benchmarks.gpu --full           then every case and a search of tiles, in hours
    python -m benchmarks.gpu --rehearse       on any CPU: tiny shapes, interpreted and emulated
    python -m benchmarks.gpu --estimate       what instruction counts promise, without a GPU

Needs a checkout, PyTorch with CUDA, Triton, nvcc, pybind11, setuptools, ninja, pytest, hypothesis;
no network, and nothing installed from the checkout. --full also needs the packages of the other
benchmarks. On another machine with the same Python the kernels can be built beforehand:

    SPARSE_KERNELS_CUDA=1 SPARSE_KERNELS_CUDA_ARCHS=9.0a python setup.py build_ext --inplace

`plan` has the deadline of each step, in seconds after the start; a step that ends early leaves its
time to the following steps. Each row is written to OUT/gpu.json at once, and the output of a step
to OUT/STEP.log. A step that fails does not stop the others.
At the end each goal is printed beside what was measured, and which steps failed. The exit status is
1 if any failed, or if the kernels of a goal were wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import cases, devices, report, tables
from benchmarks.gpu import PACKAGES

ROOT = Path(__file__).resolve().parent.parent.parent
PROGRAM = "python -m benchmarks.gpu"
# The tests that run on a GPU; others need packages that a machine with a GPU may lack.
TESTS = [
    f"tests/{name}.py"
    for name in (
        "test_cuda", "test_triton", "test_triton_refusals", "test_gpu_benchmarks",
        "transformer/test_attention",
    )
]  # fmt: skip
# The clocks stay as they are.
PROFILER = ["ncu", "--profile-from-start", "off", "--clock-control", "none", "--csv", "--metrics"]
PROFILER += [
    "gpu__time_duration.sum,sm__inst_executed.avg.per_cycle_active,lts__t_bytes.sum.per_second,"
    "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum,dram__bytes.sum.per_second"
]
WORKERS = 10
FOREVER = 1e6
POLL_S = 0.1
# What is stopped has so many seconds to say where it was, or which tests failed.
GRACE_S = 3.0

# The seconds after the start at which steps that run side by side end, and their commands by name.
Group = tuple[float, dict[str, list[str]]]


def plan(
    out: Path, *, rehearse: bool = False, builds: bool = True, full: bool = False
) -> list[Group]:
    """What is run, in this order. A rehearsal builds nothing: its steps make the emulation."""
    python = [sys.executable]
    step = [*python, "-m", "benchmarks.gpu.steps", *(["--rehearse"] if rehearse else [])]
    build = {"build": [*python, "setup.py", "build_ext", "--inplace"]}
    # Each tensor gets memory of its own, so that the sanitizer sees an access outside of one.
    sanitize = ["PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer"]
    sanitize += ["--error-exitcode", "1", "--tool"]
    test = [*python, "-m", "pytest", "-q", "-o", "addopts=-ra", "-p", "no:cacheprovider"]
    test += ["-m", "gpu"]
    workers = 1 if rehearse else WORKERS
    tools = ("memcheck", "racecheck")
    shards = [f"SPARSE_KERNELS_TEST_SHARD={n}/{workers}" for n in range(workers)]
    compilations = {f"compile-{n}": [*step, "compile", str(n)] for n in range(workers)}
    # The build may leave more, hence ends, not durations.
    goals = range(len(cases.REHEARSED if rehearse else cases.GOALS))
    groups: list[Group] = [
        (120, build if builds and not rehearse else {}),
        (132, {"machine": [*step, "machine"]}),
        (165, {"check-cuda": [*step, "check", "cuda"], **compilations}),
        (190, {"ceilings": [*step, "ceilings"]}),
        *((208 + 18 * n, {f"goal-{n}": [*step, "goal", str(n)]}) for n in goals),
        (325, {"fused": [*step, "fused"]}),
        (345, {"streams": [*test, "-k", "graph or stream", TESTS[0]]}),
        (390, {tool: [*sanitize, tool, *step, "check", "cuda"] for tool in tools}),
        (425, {"profile": [*PROFILER, *step, "launch"]}),
        (480 - GRACE_S, {f"tests-{n}": [shard, *test, *TESTS] for n, shard in enumerate(shards)}),
    ]
    if full:
        options = ["--device", "cuda", "--full", "--json"]
        tune = ["SPARSE_KERNELS_TRITON_TUNE=1", *python, "-m", "benchmarks.matmul"]
        groups += [
            (FOREVER, {name: [*python, "-m", f"benchmarks.{name}", *options, f"{out}/{name}.json"]})
            for name in ("matmul", "activation")
        ]
        groups.append((FOREVER, {"tune": [*tune, *options[:2], "--backend", "triton"]}))
    return groups


@dataclass
class Record:
    """The folder of results, and its gpu.json, which is complete JSON after every row."""

    out: Path
    machine: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    start: float = field(default_factory=time.monotonic)

    @property
    def path(self) -> Path:
        return self.out / "gpu.json"

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.start

    def add(self, row: dict[str, Any]) -> None:
        """Writes the file with this row, and prints the row."""
        if "machine" in row:
            self.machine = row["machine"]
        else:
            self.rows.append(row)
            print(f"{self.elapsed_s:6.1f} s  {describe(row)}", flush=True)
        self.save(complete=False)

    def save(self, *, complete: bool) -> None:
        report.write_json(self.path, self.machine, self.rows, complete=complete)


def describe(row: Mapping[str, Any]) -> str:
    """A row in a line."""
    if "correct" not in row:
        return ", ".join(f"{name} {value}" for name, value in row.items() if name != "baselines")
    goal = f" (goal {row['goal']:g} times)" if row.get("goal") else ""
    return f"{row['step']}: {row['backend']} {row['product']} {tables.lines([row])}{goal}"


class Command:
    """A process that can be ended with those that it starts; it prints into OUT/NAME.log."""

    def __init__(self, name: str, words: Sequence[str], out: Path) -> None:
        self.name, self.words, self.start = name, words, time.monotonic()
        path = out / f"{name}.log"
        with path.open("w") as log:
            print(f"$ {shlex.join(words)}", file=log, flush=True)
            # `env` sets the variables before the program, and has a status for a missing one.
            self._process = subprocess.Popen(
                ["env", *words], cwd=ROOT, stdout=log, stderr=log, start_new_session=True
            )
        self._log, self._incomplete = path.open(errors="replace"), ""

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows that it printed since the last call: JSON, and the profiler's table."""
        *lines, self._incomplete = (self._incomplete + self._log.read()).split("\n")
        for line in lines:
            if line.startswith('{"step"'):
                # A message of another thread may stand in the middle: that row is in the log alone.
                with contextlib.suppress(ValueError):
                    yield json.loads(line)
            elif line.startswith('"'):
                yield {"step": self.name, "ncu": next(csv.reader([line]))}

    def ended(self) -> str | None:
        """How it ended, or None."""
        status = self._process.poll()
        if status == 127:
            return f"{next(word for word in self.words if '=' not in word)} is not installed"
        return None if status is None else f"exit status {status}" if status else "passed"

    def interrupt(self) -> None:
        """Asks it to stop, as Ctrl-C does."""
        self._process.send_signal(signal.SIGINT)

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()


def run(until_s: float, commands: Mapping[str, Sequence[str]], record: Record) -> list[str]:
    """Runs commands side by side until they end or their time does; how they ended."""
    limit_s, endings = until_s - record.elapsed_s, []
    if limit_s <= 0:
        for name in commands:
            record.add({"step": name, "ended": "not started: no time was left"})
        return ["not started"] * len(commands)
    running = [Command(name, words, record.out) for name, words in commands.items()]
    is_late = False
    try:
        while running:
            time.sleep(POLL_S)
            if not is_late and (is_late := record.elapsed_s > until_s):
                for command in running:
                    command.interrupt()
            is_over = record.elapsed_s > until_s + GRACE_S
            for command in list(running):
                ended = command.ended()
                if is_over or (ended not in (None, "passed") and is_late):
                    ended = f"stopped after {limit_s:.0f} s"
                for row in command.rows():
                    record.add(row)
                if ended:
                    command.end()
                    running.remove(command)
                    endings.append(ended)
                    seconds = round(time.monotonic() - command.start, 1)
                    record.add({"step": command.name, "ended": ended, "seconds": seconds})
    finally:
        for command in running:
            command.end()
    return endings


def verdicts(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Lines: what is wrong, which steps failed, and each goal that was measured."""
    reached: dict[str, tuple[float, str]] = {}
    for row in rows:
        name = f"{cases.name_of(row)} {row['product']}" if "correct" in row else row["step"]
        if not row.get("correct", True):
            yield f"WRONG: {row['backend']} {name}, error {row['error']:.1e}"
        elif row.get("failed"):
            yield f"FAILED: {row['backend']} {cases.name_of(row)}: {row['failed']}"
        elif row.get("ended", "passed") != "passed":
            yield f"FAILED: {name}: {row['ended']} (see {name}.log)"
        elif row.get("goal"):
            over = tables.speedup(row, "dense") or tables.speedup(row, "torch") or 0.0
            said = f"{over:.2f} times with {row['backend']}, goal {row['goal']:g}"
            reached[name] = max(reached.get(name, (0.0, "")), (over, said))
    for name, (_, said) in reached.items():
        yield f"{name}: {said}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the plan. Returns 0, 1 if a step failed, or the status of an interrupted program."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder of results")
    parser.add_argument("--full", action="store_true", help="then every case and a search of tiles")
    parser.add_argument("--no-build", action="store_true", help="the kernels are built already")
    parser.add_argument("--estimate", action="store_true", help="only count instructions")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, in place of a GPU")
    options = parser.parse_args(arguments)
    if options.estimate:
        # In a process of its own Triton compiles, even if it interprets here.
        os.environ.pop("TRITON_INTERPRET", None)
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
        return subprocess.call([sys.executable, str(ROOT / "tests/tile_estimate.py")])
    rehearse = options.rehearse
    if not rehearse and (reason := devices.why_not("cuda")):
        report.refuse(PROGRAM, f"this needs a GPU: {reason}")
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    record = Record(out)
    record.save(complete=False)
    # One cache of compiled Triton kernels, deterministic cuBLAS.
    os.environ |= {"PYTHONUNBUFFERED": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    os.environ |= {"TRITON_CACHE_DIR": f"{out}/triton-cache"}
    packages = [PACKAGES, *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(packages)
    os.environ.pop("SPARSE_KERNELS_CUDA", None)  # it is built for the GPU that is visible
    groups = plan(out, rehearse=rehearse, builds=not options.no_build, full=options.full)
    if rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
        # A rehearsal on a slow machine shows what runs, not how fast.
        groups = [(FOREVER, commands) for _, commands in groups]
    # Ended by `timeout` or a scheduler, it ends what it started, too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    endings: list[str] = []
    try:
        for until_s, commands in groups:
            endings += run(until_s, commands, record)
    except KeyboardInterrupt:
        print(f"interrupted; {len(record.rows)} rows are in {record.path}")
        return report.INTERRUPTED
    record.save(complete=True)
    print("", *verdicts(record.rows), f"{len(record.rows)} rows are in {record.path}", sep="\n")
    return 0 if set(endings) == {"passed"} else 1


if __name__ == "__main__":
    sys.exit(main())
