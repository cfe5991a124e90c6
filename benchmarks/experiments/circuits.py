"""Records which tasks trained models solve, and how large the circuits are that do it.

    python -m benchmarks.experiments.circuits --out DIR --json FILE RUN...

Each RUN is a folder that `python -m sparse_transformer.train` left. Every model is asked every task
(`sparse_transformer.evaluate`), circuits are found for those that it solves
(`sparse_transformer.circuits --all`, with its own checks on held-out pairs and its control), and
the sizes are compared over the tasks that all models solve. A circuit that DIR has already is not
searched again: the same command continues an interrupted search. Options of
`sparse_transformer.circuits` may follow after `--`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks import devices, report
from benchmarks.report import Row
from sparse_transformer import UserError, keep_freed_memory
from sparse_transformer.circuits import __main__ as program
from sparse_transformer.circuits import compare
from sparse_transformer.evaluate import SOLVED_ACCURACY, evaluate_task
from sparse_transformer.run import load_run
from sparse_transformer.tasks import TASKS

PROGRAM = "python -m benchmarks.experiments.circuits"
# Of a circuit's summary, what the result file keeps.
_KEPT = ("accuracy", "sizes", "proof", "curve", "seconds", "model", "error")
_TRAINING = ("step", "tokens", "l0", "val_loss", "seconds")


@dataclass(frozen=True)
class Options:
    """Options of the command line."""

    runs: tyro.conf.Positional[list[Path]]
    """Folders of training runs."""
    out: Path
    """Folder of the circuits."""
    task: list[str] = field(default_factory=list)
    """Search circuits of this task only; may be repeated."""
    json: Path | None = None
    """The result file."""
    pairs: int = 256
    """Test pairs of each task's score."""
    threads: int | None = None
    """torch.set_num_threads."""


def scores(run: Path, pairs: int) -> dict[str, Any]:
    """Of each task that can be asked: accuracy and two-way loss on test pairs, with intervals."""
    model, tokenizer = load_run(run)
    found: dict[str, Any] = {}
    for name, task in TASKS.items():
        try:
            drawn = task.pairs(tokenizer, pairs, split="test", context=model.config.context)
            found[name] = dataclasses.asdict(evaluate_task(model, drawn))
        except UserError as error:
            found[name] = {"error": str(error)}
    return found


def row(run: Path, circuits: Mapping[str, Row], pairs: int) -> dict[str, Any]:
    """A model: its last validation, its scores, its circuits by task."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "val_loss" in line][-1]
    return {
        "run": run.resolve().name,
        "training": {name: last[name] for name in _TRAINING},
        "scores": scores(run, pairs),
        "circuits": {
            task: {name: found[name] for name in _KEPT if name in found}
            for task, found in circuits.items()
        },
    }


def text(content: Mapping[str, Any]) -> str:
    """A line for each run, the accuracies, then the sizes of the circuits task by task."""
    rows = content["rows"]
    scores = [row["scores"] for row in rows]
    values = [
        {task: score["accuracy"]["value"] for task, score in found.items() if "error" not in score}
        for found in scores
    ]
    runs = [
        [
            row["run"], f"{row['training']['l0']:,}", f"{row['training']['tokens']:,}",
            f"{row['training']['val_loss']:.3f}", f"{row['training']['seconds']:.0f}",
            sum(value >= SOLVED_ACCURACY for value in solved.values()),
        ]
        for row, solved in zip(rows, values, strict=True)
    ]  # fmt: skip
    headings = ("run", "L0", "tokens", "validation loss", "seconds", "tasks solved")
    accuracies = [
        [task, *(f"{found[task]:.1%}" if task in found else "-" for found in values)]
        for task in TASKS
    ]
    return "\n\n".join(
        (
            report.table(headings, runs),
            report.table(("accuracy", *(row["run"] for row in rows)), accuracies),
            compare.table({row["run"]: row["circuits"] for row in rows}),
        )
    )


def record(options: Options, machine: Row, rest: Sequence[str]) -> int:
    """Scores and circuits of all runs, into the result file; `rest` goes to the search."""
    first, *others = map(str, options.runs)
    against = ["--against", *others] if others else []
    which = ["--task", *options.task] if options.task else ["--all"]
    out = str(options.out)
    status = program.main(["--checkpoint", first, "--out", out, *which, *against, *rest])
    if status:
        return status
    found = json.loads((options.out / "comparison.json").read_text())
    rows = [row(run, found[run.resolve().name], options.pairs) for run in options.runs]
    if options.json is not None:
        report.write_json(options.json, machine, rows, complete=True)
    print("", text({"rows": rows}), sep="\n")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; `arguments` are the words after the module's name."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    cut = words.index("--") if "--" in words else len(words)
    config = (tyro.conf.UseAppendAction,)
    options = tyro.cli(Options, prog=PROGRAM, description=__doc__, args=words[:cut], config=config)
    if options.json is not None and (reason := report.why_not_writable(options.json)):
        report.refuse(PROGRAM, f"--json: {reason}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    keep_freed_memory()
    machine = devices.connect("cpu").describe(["-m", *PROGRAM.split()[2:], *words])
    print(report.machine_line(machine), flush=True)
    try:
        return record(options, machine, words[cut + 1 :])
    except UserError as error:
        report.refuse(PROGRAM, str(error))
    except KeyboardInterrupt:
        print("interrupted: the same command continues the search", file=sys.stderr)
        return report.INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
