"""One command line and one loop for all benchmarks.

A benchmark has cases, and measuring a case gives rows. Correctness comes first: a row that is wrong
has no times. Ctrl-C ends the run and keeps the rows of the finished cases.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
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


AnyOptions = TypeVar("AnyOptions")


def why_not(name: str, value: Any) -> str | None:
    """A sentence if an option of that name cannot have the value, wherever it occurs, else None."""
    if name == "device":
        return devices.why_not(value)
    if name == "json":
        return report.why_not_writable(value)
    if name == "threads" and value < 1:
        return f"it must be at least 1, got {value}"
    if name == "backend" and value not in backends.NAMES:
        return f"it must be one of {', '.join(backends.NAMES)}, got {value!r}"
    return None


def parse(
    kind: type[AnyOptions], name: str, description: str | None, arguments: Sequence[str] | None
) -> tuple[AnyOptions, list[str]]:
    """The options, and the words after `python`. Refuses what cannot be done; sets the threads."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    program, config = f"python -m benchmarks.{name}", (tyro.conf.UseAppendAction,)
    options = tyro.cli(kind, prog=program, description=description, args=words, config=config)
    for option, value in vars(options).items():
        if value is not None and (reason := why_not(option, value)):
            report.refuse(program, f"--{option}: {reason}")
    if threads := getattr(options, "threads", None):
        torch.set_num_threads(threads)
    return options, ["-m", f"benchmarks.{name}", *words]


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

    def __call__(self, arguments: Sequence[str] | None = None) -> int:
        """Runs the command line; `arguments` are the words after the module's name.

        A case that fails ends alone. Returns 0, or 1 if a row is wrong or a case failed.
        """
        options, command = parse(self.options, self.name, self.description, arguments)
        view, device = report.view_of(self.name), devices.BY_NAME[options.device]()
        cases, rows = self.cases(options, device), self.kept(options)
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
                sentences = [*device.prepare(smoke=options.smoke), *self.missing(options)]
                machine.update(device.describe(command))
                about = [report.machine_line(machine), *report.busy(machine)]
                bar.write("\n".join([*about, *sentences, ""]))
                bar.update()
                for case in cases:
                    bar.set_description(str(case))
                    try:
                        measured = self.measure(case, options, device)
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
