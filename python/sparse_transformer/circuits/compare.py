"""Circuits of several models on the same tasks and target: sizes, geometric means, the plot."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from sparse_transformer import program
from sparse_transformer.tasks import TASKS

# By name of a task that the last tokens decide: why.
SHORTCUTS = {name: task.shortcut for name, task in TASKS.items() if task.shortcut}
# By model name, then by task: what `summary.json` has of a circuit, or `error`.
Results = Mapping[str, Mapping[str, Mapping[str, Any]]]
# The sizes of `pipeline.FoundCircuit` in the words of the table.
STAGES = {"cut": "node mask", "nodes": "nodes pruned", "edges": "edges pruned"}


def common_tasks(results: Results) -> list[str]:
    """The tasks for which every model has a circuit, in the order of the first model.

    Tasks with a shortcut are left out, as of every mean.
    """
    first, *others = results.values()
    return [
        task
        for task, row in first.items()
        if "sizes" in row
        and task not in SHORTCUTS
        and all("sizes" in other.get(task, {}) for other in others)
    ]


def geometric_means(results: Results, stage: str) -> dict[str, float]:
    """Geometric means of the edges over the common tasks, by model; {} if there is no such task.

    A circuit without edges counts as one edge, so that the mean does not vanish.
    """
    tasks = common_tasks(results)
    if not tasks:
        return {}
    return {
        model: statistics.geometric_mean([max(1, rows[task]["sizes"][stage][1]) for task in tasks])
        for model, rows in results.items()
        if all(stage in rows[task]["sizes"] for task in tasks)
    }


def curves(results: Results) -> dict[str, dict[float, float]]:
    """Geometric means of the edges by node mask over the common tasks, by model and target loss.

    A target is left out for a model that does not reach it in one of these tasks.
    """
    tasks = common_tasks(results)
    found = {}
    for model, rows in results.items():
        points: dict[float, list[float]] = {}
        for task in tasks:
            for point in rows[task]["curve"]:
                if point is not None:
                    points.setdefault(point[0], []).append(max(1.0, point[2]))
        found[model] = {
            target: statistics.geometric_mean(edges)
            for target, edges in sorted(points.items())
            if len(edges) == len(tasks)
        }
    return found


def table(results: Results) -> str:
    """A line per task, the geometric means, and what could not be compared."""
    models = list(results)
    tasks = sorted({task for rows in results.values() for task in rows})
    lines = [["task", *(f"{model}: {words}" for model in models for words in STAGES.values())]]
    for task in tasks:
        cells = [task]
        for model in models:
            row = results[model].get(task, {})
            sizes = row.get("sizes", {})
            cells += [str(sizes[stage][1]) if stage in sizes else "-" for stage in STAGES]
        lines.append(cells)
    means = {stage: geometric_means(results, stage) for stage in STAGES}
    count = len(common_tasks(results))
    lines.append(
        [
            f"geometric mean of {count}",
            *(
                f"{means[stage][model]:.1f}" if model in means[stage] else "-"
                for model in models
                for stage in STAGES
            ),
        ]
    )
    by_target = curves(results)
    for target in sorted({target for points in by_target.values() for target in points}):
        cells = [f"at {target:g}"]
        for model in models:
            found = by_target[model].get(target)
            cells += ["-" if found is None else f"{found:.1f}", *["-"] * (len(STAGES) - 1)]
        lines.append(cells)
    reasons = [
        f"{model}, {task}: {row['error']}"
        for model, rows in results.items()
        for task, row in rows.items()
        if "error" in row
    ]
    notes = [
        "Numbers of edges. Node mask: all edges between the nodes of the thresholded mask; nodes "
        "pruned: after removing single nodes; edges pruned: after removing single edges.",
        "At a target loss: geometric mean over the same tasks, by node mask.",
        *(f"{task} is in no mean: {SHORTCUTS[task]}." for task in tasks if task in SHORTCUTS),
    ]
    return "\n".join([program.table(lines), *notes, *reasons])


def model_edges(row: Mapping[str, Any]) -> int:
    """Nonzero weights of the model's blocks; files of earlier releases call them `l0`."""
    model = row["model"]
    edges: int = model.get("edges", model["l0"])
    return edges


def plot(results: Results, path: Path) -> None:
    """Geometric means of edges over the common tasks, against target loss and model size."""
    tasks = common_tasks(results)
    figure = Figure(figsize=(9, 4), layout="constrained")
    by_loss, by_model = figure.subplots(1, 2, sharey=True)
    by_target = curves(results)
    for model, rows in results.items():
        points = by_target[model]
        by_loss.plot(list(points), list(points.values()), "o-", label=model)
        size = geometric_means(results, "cut")[model]
        by_model.plot(model_edges(rows[tasks[0]]), size, "o", label=model)
    by_loss.set(xlabel="target loss (nats)", ylabel="edges of the circuit", yscale="log")
    by_model.set(xlabel="edges of the model: nonzero weights of its blocks", xscale="log")
    # The labels would overlap.
    by_model.xaxis.set_minor_formatter(NullFormatter())
    by_model.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    by_model.xaxis.set_major_formatter(EngFormatter(sep=""))
    for axes in (by_loss, by_model):
        axes.grid(which="both", alpha=0.3)
    by_loss.legend()
    over = tasks[0] if len(tasks) == 1 else f"geometric mean of {len(tasks)} tasks"
    figure.suptitle(f"Circuit size, {over}")
    figure.savefig(path, dpi=110)
