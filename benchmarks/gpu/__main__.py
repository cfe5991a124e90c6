"""Everything that has to be done on a machine with a GPU, in one go of at most 8 minutes.

    python -m benchmarks.gpu                  build, check, measure, profile, test
    python -m benchmarks.gpu --no-build       the kernels are built already
    python -m benchmarks.gpu --full           then every case and a search of tiles, in hours
    python -m benchmarks.gpu --rehearse       on any CPU: tiny shapes, interpreted and emulated
    python -m benchmarks.gpu --estimate       what instruction counts promise, without a GPU

Needs a checkout, PyTorch with CUDA, Triton, nvcc, pybind11, setuptools, ninja, pytest, hypothesis;
no network. --full also needs the packages of the other benchmarks.

Each step ends at the latest so many seconds after the start as `plan` says, and a step that ends
early leaves its time to those that follow. Each row is in the result file (OUT/gpu.json) as soon as
it is known; what a step prints beside rows is in OUT/STEP.log. A step that fails does not stop the
others. The exit status is 1 if any failed, or if the kernels of a goal were wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from benchmarks import devices, report
from benchmarks.gpu import estimate

ROOT = Path(__file__).resolve().parent.parent.parent
PROGRAM = "python -m benchmarks.gpu"
# The tests that run on a GPU; others need packages that a machine with a GPU may lack.
TESTS = [
    f"tests/test_{name}.py" for name in ("cuda", "triton", "triton_refusals", "gpu_benchmarks")
]
WORKERS = 10
FOREVER = 1e6

# The seconds after the start at which steps that run side by side end, and their commands by name.
Group = tuple[float, dict[str, list[str]]]


def plan(
    out: Path, *, rehearse: bool = False, builds: bool = True, full: bool = False
) -> list[Group]:
    """What is run, in this order."""
    python = [sys.executable]
    step = [*python, "-m", "benchmarks.gpu.steps", *(["--rehearse"] if rehearse else [])]
    build = [*step, "build"] if rehearse else [*python, "setup.py", "build_ext", "--inplace"]
    # Each tensor gets memory of its own, so that the sanitizer sees an access outside of one.
    sanitize = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer"]
    sanitize += ["--error-exitcode", "1", "--tool"]
    test = [*python, "-m", "pytest", "-q", "-o", "addopts=-ra", "-p", "no:cacheprovider"]
    test += ["-m", "gpu"]
    workers = 1 if rehearse else WORKERS
    compilations = {f"compile-{n}": [*step, "compile", str(n)] for n in range(workers)}
    groups: list[Group] = [
        (120, {"build": build} if builds else {}),
        (135, {"machine": [*step, "machine"]}),
        (170, {"check-cuda": [*step, "check", "cuda"], **compilations}),
        (200, {"ceilings": [*step, "ceilings"]}),
        (290, {"products": [*step, "products"]}),
        (315, {"abs_topk": [*step, "abs_topk"]}),
        (340, {"streams": [*test, "-k", "graph or stream", TESTS[0]]}),
        (
            390,
            {tool: [*sanitize, tool, *step, "check", "cuda"] for tool in ("memcheck", "racecheck")},
        ),
        (430, {"profile": [*step, "profile"]}),
        (
            480,
            {
                f"tests-{n}": ["env", f"SPARSE_KERNELS_TEST_SHARD={n}/{workers}", *test, *TESTS]
                for n in range(workers)
            },
        ),
    ]
    if full:
        matmul = [*python, "-m", "benchmarks.matmul", "--device", "cuda"]
        every = [*matmul, "--full", "--json"]
        tune = ["env", "SPARSE_KERNELS_TRITON_TUNE=1", *matmul, "--backend", "triton"]
        groups += [
            (FOREVER, {"matmul": [*every, str(out / "matmul.json")]}),
            (FOREVER, {"topk": [*every, str(out / "topk.json"), "--operation", "abs_topk"]}),
            (FOREVER, {"tune": tune}),
        ]
    return groups


@dataclass
class Record:
    """The result file, which is complete JSON after every row."""

    path: Path
    machine: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    start: float = field(default_factory=time.monotonic)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.start

    def add(self, row: dict[str, Any]) -> None:
        """Writes the file with this row, and prints the row."""
        with self._lock:
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
    words = [str(row["step"])]
    if "K" in row:
        words.append(f"{row['K']}->{row['N']} fan-in {row['fan_in']} {row['block']} {row['dtype']}")
    words += [
        str(row[name]) for name in ("what", "product", "backend", "launched") if row.get(name)
    ]
    if row.get("correct") is False:
        words.append("WRONG")
    if "time_ms" in row:
        words.append(f"{row['time_ms'] * 1e3:.1f} us")
    for name in (name for name in row if name.startswith("over_")):
        goal = f" (goal {row['goal']:g}x)" if row.get("goal") else ""
        words.append(f"{row[name]:.2f}x {name.removeprefix('over_')}{goal}")
    known = ("gbs", "seconds", "ended", "why_not", "note", "Kernel Name", "Metric Name")
    words += [f"{name}: {row[name]}" for name in (*known, "Metric Value") if row.get(name)]
    return ", ".join(words)


class Runner:
    """Runs commands as processes of their own, which it can end."""

    def __init__(self, out: Path, record: Record, environment: Mapping[str, str]) -> None:
        self.out, self.record, self.environment = out, record, dict(environment)
        self._running: set[subprocess.Popen[str]] = set()

    def group(self, until_s: float, commands: Mapping[str, Sequence[str]]) -> list[str]:
        """Runs the commands side by side until they end or their time does; how they ended."""
        with ThreadPoolExecutor(max(1, len(commands))) as pool:
            limit_s = until_s - self.record.elapsed_s
            found = [pool.submit(self.run, n, words, limit_s) for n, words in commands.items()]
            try:
                return [future.result() for future in found]
            except BaseException:
                for process in list(self._running):
                    end(process)
                raise

    def run(self, name: str, words: Sequence[str], limit_s: float) -> str:
        """Runs a command, and adds the rows that it prints and one about how it ended."""
        start = time.monotonic()
        with (self.out / f"{name}.log").open("w") as log:
            print(f"$ {shlex.join(words)}", file=log, flush=True)
            ended = self._run(words, limit_s, log)
        seconds = round(time.monotonic() - start, 1)
        self.record.add({"step": name, "ended": ended, "seconds": seconds})
        return ended

    def _run(self, words: Sequence[str], limit_s: float, log: TextIO) -> str:
        if limit_s <= 0:
            return "not started: no time was left"
        try:
            process = subprocess.Popen(
                words, cwd=ROOT, env=self.environment, text=True, start_new_session=True,
                stdout=subprocess.PIPE, stderr=log,
            )  # fmt: skip
        except FileNotFoundError:
            return f"{words[0]} is not installed"
        self._running.add(process)
        late = threading.Event()

        def stop() -> None:
            late.set()
            end(process)

        timer = threading.Timer(min(limit_s, FOREVER), stop)
        timer.start()
        try:
            with process:
                assert process.stdout is not None
                for row in rows_of(process.stdout, log):
                    self.record.add(row)
        finally:
            timer.cancel()
            self._running.discard(process)
        status = process.returncode
        if late.is_set():
            return f"stopped after {limit_s:.0f} s"
        # `env` says so for the program that it runs.
        missing = f"{words[2]} is not installed" if status == 127 and words[0] == "env" else None
        return missing or (f"exit status {status}" if status else "passed")


def end(process: subprocess.Popen[str]) -> None:
    """Ends a process and those that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def rows_of(lines: Iterable[str], log: TextIO) -> Iterator[dict[str, Any]]:
    """The lines that are rows; the others go to the log."""
    for line in lines:
        try:
            row = json.loads(line) if line.startswith("{") else None
        except ValueError:  # cut off
            row = None
        if row is None or not row.keys() & {"step", "machine"}:
            log.write(line)
            log.flush()
        else:
            yield row


def environment(out: Path, *, rehearse: bool) -> dict[str, str]:
    """That of the steps: one cache of compiled Triton kernels, deterministic cuBLAS."""
    found = {**os.environ, "PYTHONUNBUFFERED": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    found["TRITON_CACHE_DIR"] = str(out / "triton-cache")
    found.pop("SPARSE_KERNELS_CUDA", None)  # it is built for the GPU that is visible
    return found | ({"TRITON_INTERPRET": "1"} if rehearse else {})


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder of results")
    parser.add_argument("--full", action="store_true", help="then hours of everything else")
    parser.add_argument("--no-build", action="store_true", help="the kernels are built already")
    parser.add_argument("--estimate", action="store_true", help="only count instructions")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, in place of a GPU")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the plan. Returns 0, 1 if a step failed, or the status of an interrupted program."""
    options = parse(arguments)
    if options.estimate:
        return estimate.main()
    if not options.rehearse and (reason := devices.why_not("cuda")):
        report.refuse(PROGRAM, f"this needs a GPU: {reason}")
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    record = Record(out / "gpu.json")
    record.save(complete=False)
    runner = Runner(out, record, environment(out, rehearse=options.rehearse))
    # Ended by `timeout` or a scheduler, it ends what it started, too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    endings = []
    try:
        for until_s, commands in plan(
            out, rehearse=options.rehearse, builds=not options.no_build, full=options.full
        ):
            # A rehearsal on a slow machine shows what runs, not how fast.
            limit_s = FOREVER if options.rehearse else until_s
            endings += runner.group(limit_s, commands)
    except KeyboardInterrupt:
        print(f"interrupted; {len(record.rows)} rows are in {record.path}")
        return report.INTERRUPTED
    record.save(complete=True)
    print(f"{len(record.rows)} rows are in {record.path}")
    return 0 if set(endings) == {"passed"} else 1


if __name__ == "__main__":
    sys.exit(main())
