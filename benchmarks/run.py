"""One command line for the benchmarks of operations, and one loop for all benchmarks.

A benchmark has cases, and each case has operations: calls that are checked, and then timed in turns
with their rivals. A row of the result is one operation of one case, or `step`, their sum.
Correctness comes first: a row that is wrong has no times. Ctrl-C ends the run and keeps the rows.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from benchmarks import devices, report, tables, timing
from benchmarks.baselines import Accuracy, Rivals
from benchmarks.cases import WITH_GOAL, AnyCase
from benchmarks.devices import Device
from benchmarks.roofline import Work
from benchmarks.timing import Candidate
from sparse_kernels import backends

# A rival that is this much slower than the fastest of its group cannot be the best one.
HOPELESS = 2.0


@dataclass(frozen=True)
class Operation:
    """One call that is measured, and what it is compared with."""

    product: str  # its name in the rows
    backend: str
    ours: Candidate
    check: Callable[[], Accuracy]  # compares the result with the truth
    work: Work  # for the bound
    rivals: Callable[[], tuple[Rivals, dict[str, str]]]  # and notes about what is missing


@dataclass(frozen=True)
class Benchmark:
    """What differs between benchmarks.

    Args:
        name: the module is benchmarks.NAME.
        description: the text of --help.
        cases: for a device and a size, "smoke", "default", "wide" or "full".
        operations: of a case, on a device and a backend (None: the one that sk chooses).
        seconds: of timing for each operation, by size, and a limit (see `timing.interleave`).
        missing: sentences about what is not compared.
    """

    name: str
    description: str
    cases: Callable[[str, str], Sequence[AnyCase]]
    operations: Callable[[Any, str, str | None], Iterable[Operation]]
    seconds: Mapping[str, tuple[float, float]]
    missing: Callable[[], list[str]] = list

    @property
    def program(self) -> str:
        return f"python -m benchmarks.{self.name}"


@dataclass(frozen=True)
class Options:
    """Options of the command line."""

    smoke: bool = False
    """Tiny shapes, in seconds."""
    full: bool = False
    """Every published shape; hours."""
    wide: bool = False
    """Every block, dtype and a range of densities; minutes."""
    case: Annotated[str, tyro.conf.arg(aliases=["--filter"])] = ""
    """Only cases whose name contains these words, such as "1024->4096 M=64"."""
    goals: bool = False
    """Only the cases with a goal."""
    check: bool = False
    """Only check the results: no times."""
    json: Path | None = None
    """Write the rows to this file."""
    plot: Path | None = None
    """Draw speed-up against density into this PNG."""
    threads: int | None = None
    """torch.set_num_threads."""
    repeats: int | None = None
    """Samples of each call, in place of a time budget."""
    device: str = "cpu"
    """cpu or cuda."""
    backend: str | None = None
    """Which backend is ours (default: the fastest that runs on the device)."""

    @property
    def size(self) -> str:
        return next((s for s in ("smoke", "full", "wide") if getattr(self, s)), "default")


def why_not(options: Options) -> str | None:
    """None if the options can be met, else a sentence."""
    if reason := devices.why_not(options.device):
        return f"--device {options.device}: {reason}"
    if options.smoke + options.full + options.wide > 1:
        return "--smoke, --full and --wide exclude each other; use one"
    if options.device == "cuda" and (options.full or options.wide):
        return "--full and --wide choose cases of the CPU; with --device cuda leave them out"
    for name in ("threads", "repeats"):
        if (value := getattr(options, name)) is not None and value < 1:
            return f"--{name} needs a positive whole number, got {value}"
    if options.json is not None and (reason := report.why_not_writable(options.json)):
        return f"--json: {reason}"
    if options.plot is not None and (reason := report.why_no_plot(options.plot)):
        return f"--plot: {reason}"
    if options.backend not in (None, *backends.NAMES):
        return f"--backend must be one of {', '.join(backends.NAMES)}, got {options.backend!r}"
    return None


def choose_cases(benchmark: Benchmark, options: Options, backend: str | None) -> list[AnyCase]:
    """The cases to run. Ends the program with a sentence if there are none."""
    every = benchmark.cases(options.device, options.size)
    words = options.case.replace("-", "->").replace("->>", "->").split()
    wanted = [
        case
        for case in every
        if all(word in str(case) for word in words) and (case in WITH_GOAL or not options.goals)
    ]
    if not wanted:
        known = "; ".join(map(str, every[:12])) + ("; ..." if len(every) > 12 else "")
        report.refuse(benchmark.program, f"no case matches the options; there are: {known}")
    cases, reason = [], None
    for case in wanted:
        problems = case.problems(options.device) if backend else []
        found = (backends.why_not(str(backend), problem) for problem in problems)
        if reason := next(filter(None, found), None):
            print(f"{case} is left out: {reason}")
        else:
            cases.append(case)
    if not cases:
        report.refuse(benchmark.program, f"the backend {backend} cannot run here: {reason}")
    return cases


def main(benchmark: Benchmark, arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; `arguments` are the words after the module's name."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    program, text = benchmark.program, benchmark.description
    options = tyro.cli(Options, prog=program, description=text, args=words)
    if reason := why_not(options):
        report.refuse(program, reason)
    if options.plot is not None and benchmark.name != "matmul":
        report.refuse(program, "--plot: only products of matrices are drawn")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = devices.connect(options.device)
    backend = options.backend or device.backend
    seconds = benchmark.seconds["full" if options.device == "cuda" else options.size]

    def measured(case: AnyCase) -> list[dict[str, Any]]:
        found = []
        for operation in benchmark.operations(case, device.name, backend):
            row = {"device": device.name, **case.columns, "product": operation.product}
            row |= {"backend": operation.backend, "threads": torch.get_num_threads()}
            row |= asdict(operation.check()) | {"headline": case in WITH_GOAL}
            if device.peaks is not None:
                terms = device.peaks.bound_ms(operation.work, case.dtype)
                limit = max(terms, key=lambda term: terms[term])
                row |= {"bound_ms": terms[limit], "bound_limit": limit}
            if row["correct"] and not options.check:
                row |= time_in_turns(operation, device, seconds, options.repeats)
            found.append(row)
        return [*found, sum_rows(found)]

    outcome = run(
        choose_cases(benchmark, options, backend),
        measured,
        lambda rows: tables.case_line(rows[-1]),
        device,
        command=["-m", f"benchmarks.{benchmark.name}", *words],
        smoke=options.smoke,
        json=options.json,
        missing=benchmark.missing,
    )
    if outcome.rows and not options.check:
        print("", *tables.closing_lines(outcome.rows), sep="\n")
        if options.plot is not None:
            tables.draw(outcome.rows, options.plot, report.machine_line(outcome.machine))
    return outcome.status


@dataclass(frozen=True)
class Outcome:
    """What a run brought: its rows, the machine they come from, and an exit status."""

    machine: dict[str, Any]
    rows: list[dict[str, Any]]
    status: int


def run(
    cases: Sequence[Any],
    measure: Callable[[Any], list[dict[str, Any]]],
    show: Callable[[list[dict[str, Any]]], str],
    device: Device,
    *,
    command: Sequence[str],
    smoke: bool,
    json: Path | None,
    missing: Callable[[], list[str]] = list,
) -> Outcome:
    """Measures all cases. Ctrl-C ends the run and keeps the rows; a case that fails ends alone.

    Args:
        cases: their str() names them.
        measure: returns the rows of one case.
        show: one line for the rows of one case, printed as soon as they are measured.
        device: measures the peaks first.
        command: the words after `python`, for the result file.
        smoke: measures the peaks only roughly.
        json: where the rows are written after each case, or None.
        missing: sentences about what is not compared.
    """
    rows: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    machine: dict[str, Any] = {}
    is_interrupted = False

    def save(*, complete: bool) -> None:
        if json is not None and machine:
            extra = {"failed": failed} if failed else {}
            report.write_json(json, machine, rows, complete=complete, **extra)

    with report.progress(total=len(cases) + 1) as bar:
        try:
            bar.set_description("peaks of this machine")
            sentences = [*device.prepare(smoke=smoke), *missing()]
            machine = device.describe(list(command))
            bar.write("\n".join([report.machine_line(machine), *sentences, ""]))
            bar.update()
            for case in cases:
                bar.set_description(str(case))
                try:
                    with torch.no_grad():
                        measured = measure(case)
                except RuntimeError as error:
                    # Out of memory, or a refused launch: the other cases may still run.
                    failed[str(case)] = str(error).splitlines()[0]
                    bar.write(f"{case}: FAIL, {failed[str(case)]}")
                else:
                    rows += measured
                    bar.write(show(measured))
                save(complete=False)
                bar.update()
        except KeyboardInterrupt:
            is_interrupted = True
    save(complete=not is_interrupted)
    wrong = sum(not row["correct"] for row in rows)
    if failed:
        print(f"{len(failed)} cases did not run: see FAIL above")
    if wrong:
        print(f"{wrong} of {len(rows)} rows are WRONG: see FAIL above")
    if is_interrupted:
        print(f"interrupted; the rows of the finished cases are kept ({len(rows)})")
        return Outcome(machine, rows, report.INTERRUPTED)
    return Outcome(machine, rows, 1 if wrong or failed else 0)


def time_in_turns(
    operation: Operation, device: Device, seconds: tuple[float, float], repeats: int | None
) -> dict[str, Any]:
    """The columns of a row that say how long ours and its rivals take."""
    rivals, row = operation.rivals()
    calls = {"ours": operation.ours, **{name: call for name, (call, _) in rivals.items()}}
    guesses = {name: timing.estimate_s(call, device.sample_s) for name, call in calls.items()}
    groups: dict[str, list[str]] = {}
    for name, (_, names) in rivals.items():
        for group in names:
            groups.setdefault(group, []).append(name)
    contenders = {"ours"}
    for names in groups.values():
        limit = HOPELESS * min(guesses[name] for name in names)
        contenders |= {name for name in names if guesses[name] <= limit}
    timings = timing.interleave(
        {name: call for name, call in calls.items() if name in contenders},
        estimates=guesses,
        budget_s=seconds[0],
        # One sample of the slowest may take longer than everything else: its estimate counts.
        limit_s=max(seconds[1], 2 * guesses["ours"]),
        repeats=repeats,
        sampler=device.sample_s,
    )
    columns = {
        name: {"time_ms": t.median_ms, "spread_ms": t.spread_ms, "samples": t.samples}
        for name, t in timings.items()
    }
    best = {
        group: min(contenders & set(names), key=lambda name: timings[name].median_ms)
        for group, names in groups.items()
    }
    times = {f"{group}_ms": timings[name].median_ms for group, name in best.items()}
    kinds = {f"{group}_kind": name for group, name in best.items()}
    ours = columns.pop("ours")
    return {**row, **ours, "timed": device.clock, **times, **kinds, "baselines": columns}


def sum_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The `step` row: times and bounds added up, spreads as independent, errors the largest.

    It has a column only where every operation has it.
    """
    step: dict[str, Any] = {}
    for name, first in rows[0].items():
        if not all(name in row for row in rows) or name == "baselines":
            continue
        values = [row[name] for row in rows]
        if name == "spread_ms":
            step[name] = math.hypot(*values)
        elif name.endswith("_ms"):
            step[name] = sum(values)
        elif name in ("error", "torch_error"):
            step[name] = max(values)
        elif name in ("samples", "correct"):
            step[name] = min(values)
        elif isinstance(first, str):
            step[name] = " + ".join(dict.fromkeys(values))
        else:
            step[name] = first
    return step | {"product": "step"}
