"""Tables and the plot of benchmarks.experiments.frontier.

A circuit counts unless the whole interval of its held-out loss is above the target: then, and where
the model itself is, the target is "not reached". A task is in the mean of models that all reach it.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.report import Row
from sparse_transformer.evaluation import Interval

# The loss of a circuit on held-out prompts, binary cross-entropy in nats.
TARGET = 0.15
_RESAMPLES = 4000
# Kinds that the plot joins.
LINES = {
    "widths, same L0": ("d64", "d128", "d256"),
    "L0, same width": ("d128-half", "d128", "d128-double"),
    "dense": ("dense64", "dense128"),
}


def solved(row: Row) -> list[str]:
    return [task for task, score in row["scores"].items() if score["solved"]]


def why_not_reached(row: Row, task: str) -> str | None:
    """Why the model has no circuit of the task that counts; None if it has one."""
    found = row["circuits"].get(task, {"error": "it was not searched"})
    if "sizes" in found and "edges" not in found["sizes"]:
        return "no trial reached the loss that is searched for"
    if "sizes" in found and found["proof"]["circuit"]["mean"]["low"] > TARGET:
        return "its held-out loss is above the target"
    return found.get("error")


def common(rows: Sequence[Row]) -> list[str]:
    """The tasks for which all of these models have a circuit that counts."""
    asked = rows[0]["circuits"] if rows else ()
    return [task for task in asked if not any(why_not_reached(row, task) for row in rows)]


def mean_edges(
    rows: Sequence[Row], tasks: Sequence[str], over: Sequence[Row] = ()
) -> Interval | None:
    """Geometric mean of the edges over seeds and tasks, or its ratio to that of `over`.

    The interval draws tasks, the same ones for both sides, and seeds, with replacement. A circuit
    without edges counts as one. None: there is no task.
    """
    if not tasks:
        return None
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(tasks), (_RESAMPLES, len(tasks)), generator=generator)

    def logs(side: Sequence[Row]) -> Tensor:
        """The mean, then those of the resamples."""
        found = [[row["circuits"][task]["sizes"]["edges"][1] for task in tasks] for row in side]
        each = torch.tensor(found, dtype=torch.float64).clamp_min(1).log()  # (seeds, tasks)
        seeds = torch.randint(len(side), (_RESAMPLES, len(side)), generator=generator)
        return torch.cat([each.mean()[None], each[seeds].mean(1).gather(1, drawn).mean(1)])

    found = (logs(rows) - logs(over) if over else logs(rows)).exp()
    ends = found[1:].quantile(found.new_tensor([0.025, 0.975]))
    return Interval(float(found[0]), *ends.tolist())


def by_kind(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """By the kind's name, in the order of the file."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["kind"]["name"], []).append(row)
    return found


def text(rows: Sequence[Row], style: report.Style = "terminal") -> str:
    """A line for each kind; dense over sparse; every circuit; and which targets were missed."""
    kinds, tasks = by_kind(rows), common(rows)
    models = [
        {
            "model": found[0]["kind"]["label"],
            "edges": f"{found[0]['edges']:,}",
            "held-out loss": ", ".join(f"{row['loss']:.3f}" for row in found),
            "tasks solved": ", ".join(str(len(solved(row))) for row in found),
            "targets missed": ", ".join(
                str(sum(why_not_reached(row, task) is not None for task in row["circuits"]))
                for row in found
            ),
            f"edges of a circuit, mean of {len(tasks)}": _shown(mean_edges(found, tasks)),
        }
        for found in kinds.values()
    ]
    ratios = [
        {
            "edges": f"{dense[0]['kind']['label']} / {sparse[0]['kind']['label']}",
            "tasks of both": len(both := common([*dense, *sparse])),
            "ratio": _shown(mean_edges(dense, both, over=sparse)),
            "difference of the losses": f"{mean_loss(dense) - mean_loss(sparse):+.3f}",
        }
        for dense in kinds.values()
        for sparse in kinds.values()
        if dense[0]["kind"]["fan"] is None and sparse[0]["kind"]["fan"] is not None
    ]
    circuits = [
        {
            "model": row["run"],
            "task": task,
            "edges at held-out loss": circuit_text(row, task),
            "target missed": why_not_reached(row, task),
        }
        for row in rows
        for task in row["circuits"]
    ]
    return "\n\n".join(report.table(part, style) for part in (models, ratios, circuits) if part)


def circuit_text(row: Row, task: str) -> str | None:
    """Edges and held-out loss of a circuit; None: there is none."""
    found = row["circuits"][task]
    if "edges" not in found.get("sizes", ()):
        return None
    loss = found["proof"]["circuit"]["mean"]
    return f"{found['sizes']['edges'][1]} at {Interval(loss['loss'], loss['low'], loss['high'])}"


def _shown(found: Interval | None) -> str | None:
    return None if found is None else f"{found.value:.1f} [{found.low:.1f}, {found.high:.1f}]"


def mean_loss(rows: Sequence[Row]) -> float:
    return statistics.fmean(row["loss"] for row in rows)


def draw(rows: Sequence[Row], figure: Any) -> None:
    """Mean edges against held-out loss; horizontal bars are the range of the seeds.

    Raises:
        ValueError: no task is common to all models.
    """
    kinds, tasks = by_kind(rows), common(rows)
    figure.set_size_inches(9.4, 5)
    axes = figure.subplots()
    points = {}
    for name, found in kinds.items():
        if (mean := mean_edges(found, tasks)) is None:
            raise ValueError("all models together have no task in common: draw fewer of them")
        x, y = points[name] = mean_loss(found), mean.value
        ends = [x - min(row["loss"] for row in found)], [max(row["loss"] for row in found) - x]
        axes.errorbar(x, y, [[y - mean.low], [mean.high - y]], ends, c="0.6", lw=0.9, capsize=2)
        axes.annotate(
            found[0]["kind"]["label"], (x, y), (7, -12), textcoords="offset points", fontsize=8
        )
    for (label, names), color in zip(LINES.items(), ("C0", "C2", "0.3"), strict=True):
        if line := [points[name] for name in names if name in points]:
            axes.plot(*zip(*line, strict=True), "o-", color=color, label=label)
    axes.set(
        xlabel="loss on held-out files of the standard library, nats per token",
        ylabel="edges of the circuit",
        yscale="log",
        title=f"Geometric mean over {len(tasks)} tasks; 95% intervals over tasks and seeds",
    )
    axes.margins(0.12)
    axes.grid(which="both", alpha=0.2, lw=0.5)
    axes.legend(fontsize=8)
