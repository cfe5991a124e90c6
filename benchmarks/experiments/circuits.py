"""Records which tasks trained models solve, and how large the circuits are that do it.

    python -m benchmarks.experiments.circuits --out DIR --json FILE RUN...
    python -m benchmarks.experiments.circuits --from FILE     the tables of a result file

Each RUN is a folder that `python -m sparse_transformer.train` left. Every task is asked of every
model (`sparse_transformer.evaluate`), circuits are found for those that it solves
(`sparse_transformer.circuits --all`, with its own checks on held-out pairs and its control), and
the sizes are compared over the tasks that all models solve. A circuit that DIR has already is not
searched again, so that the same command goes on where it stopped. Options of
`sparse_transformer.circuits` may follow after `--`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from benchmarks import report
from sparse_kernels import cpu
from sparse_transformer import UserError, keep_freed_memory
from sparse_transformer.circuits import __main__ as program
from sparse_transformer.circuits import compare
from sparse_transformer.evaluate import SOLVED_ACCURACY, evaluate_task
from sparse_transformer.run import load_run
from sparse_transformer.tasks import TASKS

MODULE = "benchmarks.experiments.circuits"
PROGRAM = f"python -m {MODULE}"
# Of a circuit's summary, what the result file keeps.
_KEPT = ("accuracy", "sizes", "proof", "curve", "seconds", "model", "error")


@dataclass(frozen=True)
class Options:
    """Attributes are the options."""

    runs: tyro.conf.Positional[list[Path]] = field(default_factory=list)
    """folders of training runs"""
    out: Path | None = None
    """folder of the circuits"""
    task: list[str] = field(default_factory=list)
    """search circuits of this task only; may be repeated"""
    json: Path | None = None
    """the result file"""
    pairs: int = 256
    """test pairs of each task's score"""
    threads: int | None = None
    """threads of torch and of the kernels"""
    source: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """show a result file; searches nothing"""


def scores(run: Path, pairs: int) -> dict[str, Any]:
    """Of each task that can be asked: accuracy and two-way loss on test pairs, with intervals."""
    model, tokenizer = load_run(run)
    found: dict[str, Any] = {}
    for name, task in TASKS.items():
        try:
            drawn = task.pairs(tokenizer, pairs, split="test", context=model.config.context)
        except UserError as error:
            found[name] = {"error": str(error)}
            continue
        found[name] = dataclasses.asdict(evaluate_task(model, drawn))
    return found


def training(run: Path) -> dict[str, Any]:
    """The last validation of a run, and what it took."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "val_loss" in line][-1]
    return {name: last[name] for name in ("step", "tokens", "l0", "val_loss", "seconds")}


def record(options: Options, out: Path, words: Sequence[str], rest: Sequence[str]) -> int:
    """Scores and circuits of all runs, into the result file; `rest` goes to the search."""
    isa = cpu.isa() if cpu.isas() else None
    machine = report.describe_machine(["-m", MODULE, *words], isa=isa, peaks=None)
    print(report.machine_line(machine), flush=True)
    first, *others = map(str, options.runs)
    against = ["--against", *others] if others else []
    which = ["--task", *options.task] if options.task else ["--all"]
    status = program.main(["--checkpoint", first, "--out", str(out), *which, *against, *rest])
    if status:
        return status
    results = json.loads((out / "comparison.json").read_text())
    rows = []
    for run in options.runs:
        name = run.resolve().name
        circuits = {
            task: {key: row[key] for key in _KEPT if key in row}
            for task, row in results[name].items()
        }
        rows.append(
            {
                "run": name,
                "training": training(run),
                "scores": scores(run, options.pairs),
                "circuits": circuits,
            }
        )
    if options.json is not None:
        report.write_json(options.json, machine, rows, complete=True)
    print("", tables(rows), sep="\n")
    return 0


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each run, then the accuracies and the sizes task by task, as Markdown."""
    results = {row["run"]: row["circuits"] for row in rows}
    headings = ("run", "L0", "tokens", "validation loss", "seconds", "tasks solved")
    runs = report.table(headings, map(_run_cells, rows), "markdown")
    heads = [f"{name}: {what}" for name in results for what in ("accuracy", "edges", "by nodes")]
    lines = [[task, *(cell for row in rows for cell in _cells(row, task))] for task in TASKS]
    edges, cut = (compare.geometric_means(results, stage) for stage in ("edges", "cut"))
    means = [c for name in results for c in ("", _number(edges.get(name)), _number(cut.get(name)))]
    lines.append([f"geometric mean of {len(compare.common_tasks(results))}", *means])
    tasks = report.table(["task", *heads], lines, "markdown")
    curves = compare.curves(results)
    targets = sorted({target for points in curves.values() for target in points})
    by_target = report.table(
        ["target loss", *(f"{name}: by nodes" for name in curves)],
        [[f"{t:g}", *(_number(points.get(t)) for points in curves.values())] for t in targets],
        "markdown",
    )
    return "\n\n".join((runs, tasks, by_target))


def _run_cells(row: Mapping[str, Any]) -> list[str]:
    trained = row["training"]
    solved = sum(
        score["accuracy"]["value"] >= SOLVED_ACCURACY
        for score in row["scores"].values()
        if "error" not in score
    )
    return [
        row["run"],
        f"{trained['l0']:,}",
        f"{trained['tokens']:,}",
        f"{trained['val_loss']:.3f}",
        f"{trained['seconds']:.0f}",
        str(solved),
    ]


def _cells(row: Mapping[str, Any], task: str) -> list[str]:
    score, circuit = row["scores"][task], row["circuits"].get(task, {})
    accuracy = "-" if "error" in score else f"{score['accuracy']['value']:.1%}"
    sizes = circuit.get("sizes", {})
    edges = (str(sizes[stage][1]) if stage in sizes else "-" for stage in ("edges", "cut"))
    return [accuracy, *edges]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; `arguments` are the words after the module's name."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    cut = words.index("--") if "--" in words else len(words)
    options = tyro.cli(
        Options,
        prog=PROGRAM,
        description=__doc__,
        args=words[:cut],
        config=(tyro.conf.UseAppendAction,),
    )
    if options.source is not None:
        try:
            content = report.read_json(options.source)
        except ValueError as error:
            report.refuse(PROGRAM, f"--from: {error}")
        print(report.machine_line(content["machine"]), "", tables(content["rows"]), sep="\n")
        return 0
    if not options.runs or options.out is None:
        report.refuse(PROGRAM, "name the folders of training runs, and --out")
    if options.json is not None and (reason := report.why_not_writable(options.json)):
        report.refuse(PROGRAM, f"--json: {reason}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    keep_freed_memory()
    try:
        return record(options, options.out, words, words[cut + 1 :])
    except UserError as error:
        report.refuse(PROGRAM, str(error))
    except KeyboardInterrupt:
        print("interrupted: the same command continues the search", file=sys.stderr)
        return report.INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
