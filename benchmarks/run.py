"""One command line and one runner for every benchmark of operations.

A benchmark has cases, and each case has operations: calls that are checked, and then timed in turns
with their rivals. A row of the result is one operation of one case, or `step`, their sum.
Correctness comes first: a row that is wrong has no times. Ctrl-C ends the run and keeps the rows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from benchmarks import devices, report, tables
from benchmarks.baselines import Accuracy, Rivals
from benchmarks.cases import Case, TopkCase
from benchmarks.devices import Device
from benchmarks.roofline import Work
from benchmarks.timing import Budget, Candidate
from sparse_kernels import backends

AnyCase = Case | TopkCase
# A rival that is this much slower than the fastest of its group cannot be the best one.
HOPELESS = 2.0
# Groups of which the fastest alone counts.
ONLY_FASTEST = ("torch_csr", "torch_bsr")


@dataclass(frozen=True)
class Operation:
    """One call that is measured.

    Args:
        product: its name in the rows.
        backend: what runs it.
        ours: the call.
        check: compares the result of the call with the truth.
        work: for the bound.
        rivals: the other ways to compute it, and a column -> a sentence that says why some are
            missing. Asked for only if ours is right.
    """

    product: str
    backend: str
    ours: Candidate
    check: Callable[[], Accuracy]
    work: Work
    rivals: Callable[[], tuple[Rivals, dict[str, str]]]


@dataclass(frozen=True)
class Benchmark:
    """What differs between benchmarks.

    Args:
        name: the module is benchmarks.NAME.
        description: the text of --help.
        cases: for a device and a size, "smoke", "default", "wide" or "full".
        operations: of a case, on a device and a backend (None: the one that sk chooses).
        budgets: how long each operation is timed, by size.
        missing: sentences about what is not compared.
    """

    name: str
    description: str
    cases: Callable[[str, str], Sequence[AnyCase]]
    operations: Callable[[Any, str, str | None], Iterable[Operation]]
    budgets: Mapping[str, Budget]
    missing: Callable[[], list[str]]

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
    others: bool = False
    """Only the cases without a goal."""
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


def parse(benchmark: Benchmark, words: Sequence[str]) -> Options:
    """The options that the words of a command line ask for."""
    return tyro.cli(Options, prog=benchmark.program, description=benchmark.description, args=words)


def why_not(options: Options) -> str | None:
    """None if the options can be met, else a sentence."""
    if reason := devices.why_not(options.device):
        return f"--device {options.device}: {reason}"
    if options.smoke + options.full + options.wide > 1:
        return "--smoke, --full and --wide exclude each other; use one"
    if options.device == "cuda" and (options.full or options.wide):
        return "--full and --wide choose cases of the CPU; with --device cuda leave them out"
    for name in ("threads", "repeats"):
        value = getattr(options, name)
        if value is not None and value < 1:
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

    def is_wanted(case: AnyCase) -> bool:
        names = str(case)
        if isinstance(case, Case):
            sizes = (case.in_features, case.out_features)
            names += f" {sizes[0]}-{sizes[1]} {sizes[0]},{sizes[1]},{case.fan_in}"
        return (
            all(word in names for word in options.case.split())
            and (case.has_goal or not options.goals)
            and not (case.has_goal and options.others)
        )

    every = benchmark.cases(options.device, options.size)
    cases = list(filter(is_wanted, every))
    if not cases:
        known = "; ".join(map(str, every[:12])) + ("; ..." if len(every) > 12 else "")
        report.refuse(benchmark.program, f"no case matches the options; there are: {known}")
    if backend is None:
        return cases
    reasons = {}
    for case in cases:
        found = (backends.why_not(backend, problem) for problem in case.problems(options.device))
        if reason := next(filter(None, found), None):
            reasons[case] = reason
    if len(reasons) == len(cases):
        reason = next(iter(reasons.values()))
        report.refuse(benchmark.program, f"the backend {backend} cannot run here: {reason}")
    for case, reason in reasons.items():
        print(f"{case} is left out: {reason}")
    return [case for case in cases if case not in reasons]


def main(benchmark: Benchmark, arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; `arguments` are the words after the module's name."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(benchmark, words)
    if reason := why_not(options):
        report.refuse(benchmark.program, reason)
    if options.plot is not None and benchmark.name != "matmul":
        report.refuse(benchmark.program, "--plot: only products of matrices are drawn")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = devices.connect(options.device)
    backend = options.backend or device.backend
    cases = choose_cases(benchmark, options, backend)
    budget = benchmark.budgets["full" if options.device == "cuda" else options.size]
    if options.repeats is not None:
        budget = Budget(repeats=options.repeats)

    def measured(case: AnyCase) -> list[dict[str, Any]]:
        operations = benchmark.operations(case, device.name, backend)
        found = [measure(operation, case, device, budget) for operation in operations]
        return [*found, sum_rows(found)]

    outcome = run(
        cases,
        measured,
        lambda rows: tables.case_line(rows[-1]),
        device,
        command=["-m", f"benchmarks.{benchmark.name}", *words],
        smoke=options.smoke,
        json=options.json,
        missing=benchmark.missing,
    )
    if outcome.rows:
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


def measure(operation: Operation, case: AnyCase, device: Device, budget: Budget) -> dict[str, Any]:
    """Checks one operation, then times it in turns with its rivals."""
    row = {"device": device.name, **case.columns, "product": operation.product}
    row |= {"backend": operation.backend, "threads": torch.get_num_threads()}
    accuracy = operation.check()
    row |= asdict(accuracy)
    bound = device.bound(operation.work, case.dtype)
    if bound is not None:
        row |= {"bound_ms": bound.ms, "bound_limit": bound.limit, "peak_bound_ms": bound.peak_ms}
    if not accuracy.correct:
        return row
    rivals, notes = operation.rivals()
    calls = {"ours": operation.ours, **{name: rival.call for name, rival in rivals.items()}}
    estimates = device.estimate_s(calls)
    if budget.limit_s is not None:
        # One sample of the slowest may take longer than everything else: its estimate counts.
        budget = replace(budget, limit_s=max(budget.limit_s, 2 * estimates["ours"]))
    groups: dict[str, list[str]] = {}
    for name, rival in rivals.items():
        for group in rival.groups:
            groups.setdefault(group, []).append(name)
    contenders = {"ours"}
    for group, names in groups.items():
        limit = min(map(estimates.__getitem__, names)) * (1 if group in ONLY_FASTEST else HOPELESS)
        contenders |= {name for name in names if estimates[name] <= limit}
    timings, row["timed"] = device.interleave(
        {name: call for name, call in calls.items() if name in contenders}, budget, estimates
    )
    ours = timings.pop("ours")
    row |= {"time_ms": ours.median_ms, "spread_ms": ours.spread_ms, "samples": ours.samples}
    for group, names in groups.items():
        best = min((n for n in names if n in timings), key=lambda name: timings[name].median_ms)
        row |= {f"{group}_ms": timings[best].median_ms, f"{group}_kind": best}
    every = {
        name: {"time_ms": t.median_ms, "spread_ms": t.spread_ms, "samples": t.samples}
        for name, t in timings.items()
    }
    return row | notes | {"baselines": every}


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
            step[name] = sum(value**2 for value in values) ** 0.5
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
