"""Circuits of several models at the same tasks and target: sizes, geometric means, the plot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from sparse_transformer import program

# By model name, then by task: `sizes`, `curve` and `proof` of find.Found, or `error`.
Results = Mapping[str, Mapping[str, Mapping[str, Any]]]
STAGES = ("cut", "nodes", "edges")


def common_tasks(results: Results) -> list[str]:
    """Those of which every model has a circuit, in the order of the first."""
    first, *others = results.values()
    return [
        task
        for task, row in first.items()
        if "sizes" in row and all("sizes" in other.get(task, {}) for other in others)
    ]


def geometric_mean(values: Sequence[float]) -> float:
    """Of numbers above 0.

    Raises:
        ValueError: there are none, or one is not above 0.
    """
    if not values or min(values) <= 0:
        raise ValueError("a geometric mean needs numbers above 0")
    return math.exp(sum(map(math.log, values)) / len(values))


def geometric_means(results: Results, stage: str) -> dict[str, float]:
    """Of the edges of the common tasks' circuits, by model; {} if there is no such task.

    A circuit without an edge counts as one edge, as the mean must not vanish.
    """
    tasks = common_tasks(results)
    if not tasks:
        return {}
    return {
        model: geometric_mean([max(1, rows[task]["sizes"][stage][1]) for task in tasks])
        for model, rows in results.items()
        if all(stage in rows[task]["sizes"] for task in tasks)
    }


def curves(results: Results) -> dict[str, dict[float, float]]:
    """Geometric means of the edges by bisection over the common tasks, by model and target loss.

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
            target: geometric_mean(edges)
            for target, edges in sorted(points.items())
            if len(edges) == len(tasks)
        }
    return found


def table(results: Results) -> str:
    """For people: a line per task, the geometric means, and what could not be compared."""
    models = list(results)
    tasks = sorted({task for rows in results.values() for task in rows})
    lines = [["task", *(f"{model}: {stage}" for model in models for stage in STAGES)]]
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
    return "\n".join(
        [program.table(lines), "edges; cut: nodes by bisection; nodes: single nodes taken away "
         "too; edges: single edges too", "at a target loss: the geometric mean of what is cut from "
         "one mask", *reasons]
    )  # fmt: skip


def plot(results: Results, path: Path) -> None:
    """Geometric means of edges over the common tasks: against target loss, and against L0."""
    tasks = common_tasks(results)
    figure = Figure(figsize=(9, 4), layout="constrained")
    by_loss, by_l0 = figure.subplots(1, 2, sharey=True)
    by_target = curves(results)
    for model, rows in results.items():
        points = by_target[model]
        by_loss.plot(list(points), list(points.values()), "o-", label=model)
        size = geometric_means(results, "cut")[model]
        by_l0.plot(rows[tasks[0]]["model"]["l0"], size, "o", label=model)
    by_loss.set(xlabel="target loss (nats)", ylabel="edges, by bisection", yscale="log")
    by_l0.set(xlabel="L0 of the blocks", xscale="log")
    # Their labels would lie on each other.
    by_l0.xaxis.set_minor_formatter(NullFormatter())
    by_l0.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    by_l0.xaxis.set_major_formatter(EngFormatter(sep=""))
    for axes in (by_loss, by_l0):
        axes.grid(which="both", alpha=0.3)
    by_loss.legend()
    over = tasks[0] if len(tasks) == 1 else f"geometric mean of {len(tasks)} tasks"
    figure.suptitle(f"Circuit size, {over}")
    figure.savefig(path, dpi=110)
