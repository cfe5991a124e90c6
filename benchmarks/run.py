"""One command line and one loop for all benchmarks.

A benchmark has cases, and measuring a case gives rows. Correctness comes first: a row that is wrong
has no times. Ctrl-C ends the run and keeps the rows of the finished cases.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import tyro

from benchmarks import devices, report
from benchmarks.devices import Device
from sparse_kernels import backends


@dataclass(frozen=True)
class Options:
    smoke: bool = False
    """Tiny sizes, in seconds."""
    json: Path | None = None
    """Write the rows to this file."""
    threads: int | None = None
    """Number of CPU threads; by default those of PyTorch."""
    device: str = "cpu"
    """cpu or cuda."""


@dataclass(frozen=True)
class Benchmark:
    """What differs between benchmarks. `report.VIEWS` names the module that prints the rows."""

    name: str  # the module is benchmarks.NAME
    description: str | None  # the text of --help
    cases: Callable[[Any, Device], Sequence[Any]]  # that the options ask for; str() names them
    measure: Callable[[Any, Any, Device], list[dict[str, Any]]]  # rows of a case with the options
    options: type[Options] = Options
    missing: Callable[[Any], list[str]] = lambda options: []  # sentences: what is not compared
    kept: Callable[[Any], list[dict[str, Any]]] = lambda options: []  # rows of a run that continues

    @property
    def program(self) -> str:
        return f"python -m benchmarks.{self.name}"


AnyOptions = TypeVar("AnyOptions")


# Options by name, wherever they occur: a sentence if the value cannot be used, else None.
_CHECKS: Mapping[str, Callable[[Any], str | None]] = {
    "device": devices.why_not,
    "json": report.why_not_writable,
    "threads": lambda n: None if n >= 1 else f"it must be at least 1, got {n}",
    "backend": lambda name: (
        None
        if name in backends.NAMES
        else f"it must be one of {', '.join(backends.NAMES)}, got {name!r}"
    ),
}


def why_not(options: object) -> str | None:
    """A sentence about the first option that cannot be met, or None."""
    for name, value in vars(options).items():
        if value is not None and (reason := _CHECKS.get(name, lambda _: None)(value)):
            return f"--{name}: {reason}"
    return None


def parse(
    kind: type[AnyOptions], name: str, description: str | None, arguments: Sequence[str] | None
) -> tuple[AnyOptions, list[str]]:
    """The options, and the words after `python`. Refuses what cannot be done; sets the threads."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    program, config = f"python -m benchmarks.{name}", (tyro.conf.UseAppendAction,)
    options = tyro.cli(kind, prog=program, description=description, args=words, config=config)
    if reason := why_not(options):
        report.refuse(program, reason)
    if threads := getattr(options, "threads", None):
        torch.set_num_threads(threads)
    return options, ["-m", f"benchmarks.{name}", *words]


def main(benchmark: Benchmark, arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; `arguments` are the words after the module's name.

    A case that fails ends alone. Returns 0, or 1 if a row is wrong or a case failed.
    """
    options, command = parse(benchmark.options, benchmark.name, benchmark.description, arguments)
    view, device = report.view_of(benchmark.name), devices.connect(options.device)
    cases, rows = benchmark.cases(options, device), benchmark.kept(options)
    failed: dict[str, str] = {}
    machine: dict[str, Any] = {}
    is_interrupted = False

    def save(*, complete: bool) -> None:
        if options.json is not None and machine:
            extra = {"failed": failed} if failed else {}
            report.write_json(options.json, machine, rows, complete=complete, **extra)

    with report.progress(total=len(cases) + 1) as bar:
        try:
            bar.set_description("peaks of this machine")
            sentences = [*device.prepare(smoke=options.smoke), *benchmark.missing(options)]
            machine.update(device.describe(command))
            bar.write("\n".join([report.machine_line(machine), *sentences, ""]))
            bar.update()
            for case in cases:
                bar.set_description(str(case))
                try:
                    measured = benchmark.measure(case, options, device)
                except RuntimeError as error:
                    # Out of memory, or a refused launch: the other cases may still run.
                    failed[str(case)] = str(error).splitlines()[0]
                    bar.write(f"{case}: FAIL, {failed[str(case)]}")
                else:
                    rows += measured
                    bar.write(view.lines(measured))
                save(complete=False)
                bar.update()
        except KeyboardInterrupt:
            is_interrupted = True
    save(complete=not is_interrupted)
    print("", *view.closing(rows), sep="\n")
    wrong = sum(not row["correct"] for row in rows)
    if failed:
        print(f"{len(failed)} cases did not run: see FAIL above")
    if wrong:
        print(f"{wrong} of {len(rows)} rows are WRONG: see FAIL above")
    if is_interrupted:
        print(f"interrupted; the rows of the finished cases are kept ({len(rows)})")
        return report.INTERRUPTED
    return 1 if wrong or failed else 0
