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

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from benchmarks import devices, report, run
from sparse_transformer import UserError, keep_freed_memory
from sparse_transformer.circuits import __main__ as search
from sparse_transformer.circuits import compare
from sparse_transformer.cli import evaluate

PROGRAM = "python -m benchmarks.experiments.circuits"


@dataclass(frozen=True)
class Options:
    runs: tyro.conf.Positional[list[Path]]
    """Folders of training runs."""
    out: Path
    """Folder of the circuits."""
    task: list[str] = field(default_factory=list)
    """Search circuits of this task only; may be repeated."""
    json: Path | None = None
    """Write the rows to this file."""
    pairs: int = 256
    """Test pairs of each task's score."""
    threads: int | None = None
    """Number of CPU threads; by default those of PyTorch."""


def record(folder: Path, found: Mapping[str, Any], pairs: int) -> dict[str, Any]:
    """The row of a model: its last validation, its scores and its circuits by task."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "val_loss" in line][-1]
    with tempfile.TemporaryDirectory() as scratch:
        scores = Path(scratch) / "scores.json"
        evaluate.run(evaluate.EvaluateConfig(folder, pairs=pairs, json=scores), sys.stdout)
        tasks = json.loads(scores.read_text())["tasks"]
    kept = ("accuracy", "sizes", "proof", "curve", "seconds", "model", "error")
    return {
        "run": folder.resolve().name,
        "training": {name: last[name] for name in ("step", "tokens", "l0", "val_loss", "seconds")},
        "scores": tasks,
        "circuits": {t: {k: v for k, v in row.items() if k in kept} for t, row in found.items()},
    }


def text(rows: Sequence[report.Row], style: report.Style = "terminal") -> str:
    """A line for each run, then the sizes of the circuits task by task."""
    lines = []
    for row in rows:
        trained = row["training"]
        scores = [
            score["accuracy"]["value"]
            for task, score in row["scores"].items()
            if "loss" in score and task not in compare.SHORTCUTS
        ]
        lines.append(
            {
                "run": row["run"],
                **{name: f"{trained[name]:,.0f}" for name in ("l0", "tokens", "seconds")},
                "validation loss": f"{trained['val_loss']:.3f}",
                "tasks solved": sum(value >= evaluate.SOLVED_ACCURACY for value in scores),
            }
        )
    circuits = {row["run"]: row["circuits"] for row in rows}
    return f"{report.table(lines, style)}\n\n{compare.table(circuits)}"


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    cut = words.index("--") if "--" in words else len(words)
    options, command = run.parse(Options, "experiments.circuits", __doc__, words[:cut])
    if not options.runs:
        report.refuse(PROGRAM, "name a run: a folder that sparse_transformer.train wrote")
    for path in options.runs:
        if not (path / "metrics.jsonl").is_file():
            report.refuse(PROGRAM, f"{path} is no folder of a run: it has no metrics.jsonl")
    keep_freed_memory()
    machine = devices.Device().describe([*command, *words[cut:]])
    print(report.machine_line(machine), flush=True)
    first, *others = map(str, options.runs)
    which = ["--task", *options.task] if options.task else ["--all"]
    which += ["--against", *others] if others else []
    out = str(options.out)
    if status := search.main(["--checkpoint", first, "--out", out, *which, *words[cut + 1 :]]):
        return status
    found = json.loads((options.out / "comparison.json").read_text())
    try:
        rows = [record(path, found[path.resolve().name], options.pairs) for path in options.runs]
    except UserError as error:
        report.refuse(PROGRAM, str(error))
    if options.json is not None:
        report.write_json(options.json, machine, rows, complete=True)
    print("", text(rows), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
