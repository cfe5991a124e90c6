"""Records which tasks trained models solve, and how large the circuits are that do it.

    python -m benchmarks.circuits --out DIR --json FILE RUN...    scores and circuits of each run
    python -m benchmarks.circuits --from FILE                     the tables of a result file again

Each RUN is a folder that `python -m sparse_transformer.train` left. Every task is asked of every
model (`sparse_transformer.evaluate`), circuits are found for those that it solves
(`sparse_transformer.circuits --all`, with its own checks on held-out pairs and its control), and
the sizes are compared over the tasks that all models solve. A circuit that DIR has already is not
searched again, so that the same command goes on where it stopped. Options of
`sparse_transformer.circuits` may follow after `--`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from sparse_kernels import cpu
from sparse_transformer import UserError, keep_freed_memory
from sparse_transformer.circuits import __main__ as program
from sparse_transformer.circuits import compare
from sparse_transformer.evaluate import SOLVED_ACCURACY, evaluate_task
from sparse_transformer.run import load_run
from sparse_transformer.tasks import TASKS

INTERRUPTED = 130
# Of a circuit's summary, what the result file keeps.
_KEPT = ("accuracy", "sizes", "proof", "curve", "seconds", "model", "error")


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


def record(options: argparse.Namespace, words: Sequence[str]) -> int:
    """Scores and circuits of all runs, into the result file."""
    machine = report.describe_machine(
        ["-m", "benchmarks.circuits", *words], isa=cpu.isa() if cpu.isas() else None, ceilings=None
    )
    print(report.machine_line(machine), flush=True)
    first, *others = map(str, options.runs)
    against = ["--against", *others] if others else []
    which = ["--task", *options.task] if options.task else ["--all"]
    status = program.main(
        ["--checkpoint", first, "--out", str(options.out), *which, *against, *options.rest]
    )
    if status:
        return status
    results = json.loads((options.out / "comparison.json").read_text())
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
    print("\n" + "\n".join(tables(rows)))
    return 0


def tables(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each run, then the accuracies and the sizes task by task, as Markdown."""
    lines = ["| run | L0 | tokens | validation loss | seconds | tasks solved |", "|---" * 6 + "|"]
    for row in rows:
        trained = row["training"]
        solved = sum(
            score["accuracy"]["value"] >= SOLVED_ACCURACY
            for score in row["scores"].values()
            if "error" not in score
        )
        lines.append(
            f"| {row['run']} | {trained['l0']:,} | {trained['tokens']:,} | "
            f"{trained['val_loss']:.3f} | {trained['seconds']:.0f} | {solved} |"
        )
    names = [row["run"] for row in rows]
    heads = [f"{name}: {what}" for name in names for what in ("accuracy", "edges", "by nodes")]
    lines += ["", f"| task | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for task in TASKS:
        cells = [cell for row in rows for cell in _cells(row, task)]
        lines.append(f"| {task} | {' | '.join(cells)} |")
    results = {row["run"]: row["circuits"] for row in rows}
    common = compare.common_tasks(results)
    edges, cut = (compare.geometric_means(results, stage) for stage in ("edges", "cut"))
    means = [f" | {_number(edges.get(name))} | {_number(cut.get(name))}" for name in names]
    lines.append(f"| geometric mean of {len(common)} |{' |'.join(means)} |")
    return [*lines, "", *_by_target(results)]


def _by_target(results: compare.Results) -> list[str]:
    """The geometric means at each target loss, as Markdown."""
    curves = compare.curves(results)
    lines = [f"| target loss | {' | '.join(f'{name}: by nodes' for name in curves)} |"]
    lines.append("|---" * (1 + len(curves)) + "|")
    for target in sorted({target for points in curves.values() for target in points}):
        cells = " | ".join(_number(points.get(target)) for points in curves.values())
        lines.append(f"| {target:g} | {cells} |")
    return lines


def _cells(row: Mapping[str, Any], task: str) -> list[str]:
    score, circuit = row["scores"][task], row["circuits"].get(task, {})
    accuracy = "-" if "error" in score else f"{score['accuracy']['value']:.1%}"
    sizes = circuit.get("sizes", {})
    return [
        accuracy, *(str(sizes[stage][1]) if stage in sizes else "-" for stage in ("edges", "cut"))
    ]  # fmt: skip


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.circuits",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folders of trainings")
    made.add_argument("--out", type=Path, metavar="DIR", help="where circuits go")
    made.add_argument(
        "--task",
        action="append",
        metavar="NAME",
        help="circuits of this task only; may be repeated",
    )
    made.add_argument("--json", type=Path, metavar="FILE", help="the result file")
    made.add_argument("--pairs", type=int, default=256, help="test pairs of each task's score")
    made.add_argument("--threads", type=int, metavar="COUNT", help="torch.set_num_threads")
    made.add_argument("--from", dest="source", type=Path, metavar="FILE", help="show it")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; `arguments` are the words after the module's name."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    cut = words.index("--") if "--" in words else len(words)
    parser = _parser()
    options = parser.parse_args(words[:cut])
    options.rest = words[cut + 1 :]
    if options.source is not None:
        if not options.source.is_file():
            parser.error(f"--from: there is no file {options.source}")
        content = json.loads(options.source.read_text())
        print(report.machine_line(content["machine"]), "", *tables(content["rows"]), sep="\n")
        return 0
    if not options.runs or options.out is None:
        parser.error("name the folders of trainings, and --out")
    if options.json is not None and (reason := report.why_not_writable(options.json)):
        parser.error(f"--json: {reason}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    keep_freed_memory()
    try:
        return record(options, words)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
