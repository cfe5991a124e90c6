"""What the rows of `benchmarks.matmul` and `benchmarks.activation` say: tables and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import product
from typing import Any

from benchmarks.cases import name_of
from benchmarks.report import Row, Style, compare, number, ratio, table

# A fraction of the bound above this is more than noise: the peaks were measured too low.
IMPOSSIBLE = 1.05


def speedup(row: Row, baseline: str) -> float | None:
    """How many times faster than `row[baseline_ms]` it was; None if that was not measured."""
    if row.get(f"{baseline}_ms") is None or row.get("time_ms") is None:
        return None
    return float(row[f"{baseline}_ms"] / row["time_ms"])


def sparse_peer(row: Row) -> tuple[str, str]:
    """The column and the name of the best sparse peer. Old files know torch CSR alone."""
    if row.get("best_sparse_ms") is not None:
        return "best_sparse", row["best_sparse_kind"]
    return "torch_csr", "torch CSR"


def over_baselines(row: Row) -> dict[str, float]:
    """How many times faster it was than each baseline that was measured, as sentences name it."""
    peer, library = sparse_peer(row)
    names = {
        "masked_dense": "masked dense",
        "best_dense": f"the best dense ({row.get('best_dense_kind')})",
        peer: f"the best sparse peer ({library})",
        "torch": f"torch.topk + scatter ({row.get('torch_kind')})",
        "plain": "products, mask and softmax",
        "without_sinks": "PyTorch's attention without sinks",
    }
    found = {name: speedup(row, column) for column, name in names.items()}
    return {name: value for name, value in found.items() if value is not None}


def steps(rows: Sequence[Row]) -> list[Row]:
    """The steps that are right and timed."""
    return [r for r in rows if r["product"] == "step" and r["correct"] and "time_ms" in r]


def _line(row: Row) -> dict[str, object]:
    column, library = sparse_peer(row)
    bound, peer = speedup(row, "bound"), speedup(row, column)
    return {
        "layer": f"{row['K']} -> {row['N']}" if "K" in row else None,
        **{name: row.get(name) for name in ("fan_in", "block", "D", "k", "dtype", "M", "product")},
        "ms": number(row.get("time_ms")) if row["correct"] else "FAIL",
        "iqr": number(row.get("spread_ms")),
        "over masked dense": ratio(speedup(row, "masked_dense")),
        "over dense": ratio(speedup(row, "dense")),
        "over best dense": ratio(speedup(row, "best_dense")),
        "which": row.get("best_dense_kind"),
        "over best sparse": f"{ratio(peer)} ({library})" if peer else None,
        "over torch": ratio(speedup(row, "torch")),
        "bound": f"{bound:.0%}" if bound else None,
        "error": f"{row['error']:.0e}",
        "torch's": f"{row['torch_error']:.0e}" if "torch_error" in row else None,
    }


def lines(rows: Sequence[Row]) -> str:
    """The step of a case, as it is measured."""
    step = rows[-1]
    if not step["correct"]:
        return f"{name_of(step)}: FAIL, error {step['error']:.1e}"
    if "time_ms" not in step:
        return f"{name_of(step)}: correct"
    time = f"{number(step['time_ms'])} ms"
    over = [compare(value, name) for name, value in over_baselines(step).items()]
    return f"{name_of(step)}: {', '.join([time, *over])}"


def text(rows: Sequence[Row], style: Style = "terminal") -> str:
    """All rows and the sentences."""
    said = [
        "ms: median of one call; step: all products. Then: how many times faster than masked",
        "dense, torch's dense in the same dtype, the fastest dense and sparse of the process.",
        "",
        table([_line(row) for row in rows], style),
        "",
    ]
    return "\n".join([*said, *closing(rows)])


def closing(rows: Sequence[Row]) -> list[str]:
    """The fraction of the bound, and the sentences."""
    lines = []
    products = [row for row in rows if row["product"] != "step" and row["correct"]]
    if fractions := [value for row in products if (value := speedup(row, "bound"))]:
        mean = statistics.geometric_mean(fractions)
        lines += [f"fraction of the roofline bound, geometric mean: {mean:.0%}"]
        if max(fractions) > IMPOSSIBLE:
            lines.append(
                "A fraction above 100% means that another process disturbed the measurement of the "
                "machine's peaks: run again when it is idle."
            )
    if any(row.get("bf16_dense_note") for row in rows):
        lines.append("torch's bfloat16 dense takes seconds a call here: left out where it does.")
    return [*lines, "", *sentences(rows)]


def sentences(rows: Sequence[Row], count: int = 3) -> list[str]:
    """What a person can repeat: a step of the first headlines, and where it does not pay.

    Each number is computed from the row of that step.
    """
    said = []
    for row in steps(rows):
        over = [compare(value, name) for name, value in over_baselines(row).items()]
        if row.get("headline") and row.get("block") == "1x1" and row["M"] != 1 and len(over) > 1:
            said.append(
                f"On this machine a training step of {row['K']}->{row['N']} with fan-in "
                f"{row['fan_in']} ({row['dtype']}) is {', '.join(over[:-1])} and {over[-1]}."
            )
    return [*said[:count], *_where_it_does_not_pay(steps(rows))]


def _where_it_does_not_pay(steps: Sequence[Row]) -> list[str]:
    slower = []
    for row in steps:
        found = [(value, name) for name, value in over_baselines(row).items()]
        value, what = min(found, default=(1.0, ""))
        if value < 0.95:
            slower.append((value, f"{name_of(row)} ({compare(value, what)})"))
    if slower:
        worst = [said for _, said in sorted(slower)[:3]]
        worst += [f"{len(slower) - 3} more"] * (len(slower) > 3)
        return [f"It does not pay in {len(slower)} of {len(steps)} cases: {'; '.join(worst)}."]
    if densities := [row["density"] for row in steps if "density" in row]:
        return [
            f"No measured case was slower than a baseline; the densest keeps {max(densities):.2%} "
            "of the weights. docs/break-even.md says from which density dense wins."
        ]
    return []


def draw(rows: Sequence[Row], figure: Any) -> None:
    """Speed-up of a step against density, log-log, one line per block.

    Left over masked dense, right over the best dense. A line joins the geometric means of the cases
    of one block and dtype at each density. Only the largest M is drawn.
    """
    layers = [row for row in steps(rows) if "block" in row]
    if not layers:
        raise ValueError("there is nothing to draw: no step of a layer was timed")
    tokens = max(row["M"] for row in layers)
    drawn = [row for row in layers if row["M"] == tokens]
    blocks = sorted({row["block"] for row in drawn}, key=lambda b: [int(n) for n in b.split("x")])
    styles = {"float32": "-", "bfloat16": "--", "float16": ":"}
    figure.set_size_inches(11, 4.8)
    axes = figure.subplots(1, 2, sharex=True)
    for axis, baseline in zip(axes, ("masked_dense", "best_dense"), strict=True):
        for block, dtype in product(blocks, styles):
            points: dict[float, list[float]] = {}
            for row in drawn:
                value = speedup(row, baseline)
                if value is not None and (row["block"], row["dtype"]) == (block, dtype):
                    points.setdefault(row["density"], []).append(value)
            if points:
                density = sorted(points)
                mean = [statistics.geometric_mean(points[d]) for d in density]
                look = {"color": f"C{blocks.index(block)}", "label": f"{block} {dtype}"}
                axis.plot(density, mean, styles[dtype], marker="o", ms=4, **look)
        axis.axhline(1, color="gray", lw=1, ls=":")
        axis.set(xscale="log", yscale="log", xlabel=f"density (kept / all weights), M={tokens}")
        axis.set_title(f"speed-up of a step over {baseline.replace('_', ' ')}", fontsize=10)
        axis.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        axis.grid(which="both", alpha=0.25, lw=0.5)
    # Baselines may be missing for a dtype: the axis that shows more explains both.
    max(axes, key=lambda axis: len(axis.get_legend_handles_labels()[1])).legend(fontsize=8)
