"""The command line of benchmarks.training and benchmarks.inference: one for both."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from benchmarks import devices, report
from benchmarks.transformer import results
from sparse_kernels import cpu
from sparse_transformer import keep_freed_memory


@dataclass(frozen=True)
class Options:
    """Attributes are the options."""

    smoke: bool = False
    """tiny, in seconds"""
    part: list[str] = field(default_factory=list)
    """measure only this part; may be repeated"""
    json: Path | None = None
    """write the rows to this file"""
    plot: Path | None = None
    """draw the sweeps over L0 and width into this PNG"""
    source: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """show a result file; measures nothing"""
    update: Path | None = None
    """with --from: replace the table between the marks of this Markdown file"""
    threads: int | None = None
    """threads of torch and of the kernels"""
    device: str = "cpu"
    """cpu or cuda"""


@dataclass(frozen=True)
class Benchmark:
    """What differs between the two.

    Args:
        name: the module is benchmarks.NAME, the marks are measured-NAME.
        description: the text of --help.
        parts: what --part may name, besides "all".
        default: the parts that are measured if none is named.
        measure: yields the rows of one group of variants after the other.
    """

    name: str
    description: str
    parts: tuple[str, ...]
    default: tuple[str, ...]
    measure: Callable[[Options, Sequence[str]], Iterator[list[dict[str, Any]]]]


def main(benchmark: Benchmark, arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; `arguments` are the words after the module's name."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = tyro.cli(
        Options,
        prog=f"python -m benchmarks.{benchmark.name}",
        description=benchmark.description,
        args=words,
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.UseAppendAction),
    )
    reason = why_not(benchmark, options)
    if reason is not None:
        report.refuse(f"python -m benchmarks.{benchmark.name}", reason)
    try:
        if options.source is not None:
            return show(options)
        return run(benchmark, options, words)
    except KeyboardInterrupt:
        print("interrupted: --json holds the groups that were complete", file=sys.stderr)
        return report.INTERRUPTED


def why_not(benchmark: Benchmark, options: Options) -> str | None:
    """A sentence if the options cannot be followed."""
    unknown = set(options.part) - {*benchmark.parts, "all"}
    if unknown:
        return f"--part must be one of {', '.join(benchmark.parts)}, all; got {min(unknown)}"
    if options.threads is not None and options.threads < 1:
        return f"--threads must be at least 1, got {options.threads}"
    if options.json is not None and (reason := report.why_not_writable(options.json)):
        return f"--json: {reason}"
    if options.plot is not None and (reason := report.why_no_plot(options.plot)):
        return f"--plot: {reason}"
    if options.update is not None and options.source is None:
        return "--update needs --from FILE: the table comes from a result file"
    if options.source is not None:
        reason = _why_no_results(options.source)
        return None if reason is None else f"--from: {reason}"
    if reason := devices.why_not(options.device):
        return f"--device {options.device}: {reason}"
    if options.device == "cpu" and not cpu.isas():
        return "the C++ extension is missing: build it with `pip install .`"
    return None


def _why_no_results(path: Path) -> str | None:
    try:
        rows = report.read_json(path)["rows"]
    except ValueError as error:
        return str(error)
    if not all({"phase", "variant", "step_ms"} <= row.keys() for row in rows):
        return f"{path} is the result of another benchmark: its rows need phase, variant, step_ms"
    return None


def run(benchmark: Benchmark, options: Options, words: Sequence[str]) -> int:
    """Measures, prints and writes."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    kept = keep_freed_memory()
    command = ["-m", f"benchmarks.{benchmark.name}", *words]
    machine = devices.connect(options.device).describe(command) | {"keeps_freed_memory": kept}
    print(report.machine_line(machine), flush=True)
    parts = benchmark.parts if "all" in options.part else options.part or benchmark.default
    rows: list[dict[str, Any]] = []
    for group in benchmark.measure(options, parts):
        rows += group
        print("", results.table(group), sep="\n", flush=True)
        if options.json is not None:
            report.write_json(options.json, machine, rows, complete=False)
    if options.json is not None:
        report.write_json(options.json, machine, rows, complete=True)
    print("", *results.sentences(rows), sep="\n", flush=True)
    if options.plot is not None:
        results.draw(rows, options.plot, report.machine_line(machine))
    return 0 if all(row["correct"] for row in rows) else 1


def show(options: Options) -> int:
    """The tables of a result file."""
    assert options.source is not None
    content = report.read_json(options.source)
    if options.plot is not None:
        results.draw(content["rows"], options.plot, report.machine_line(content["machine"]))
    if options.update is not None:
        for mark, table in results.markdown(content).items():
            try:
                report.replace_between(options.update, mark, table)
            except (OSError, ValueError) as error:
                report.refuse("--update", str(error))
    print(report.machine_line(content["machine"]), "", results.text(content), sep="\n")
    return 0
