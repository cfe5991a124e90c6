"""What the rows of `benchmarks.matmul` and `benchmarks.activation` say: tables, goals, a plot."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.cases import GOALS
from benchmarks.report import Row, machine_line, ratio, table

# README.md has one short table; docs/benchmarks.md has all cases.
SHORT_MARK, FULL_MARK = "measured", "measured-full"
SHORT_ROWS = 6
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
    }
    found = {name: speedup(row, column) for column, name in names.items()}
    return {name: value for name, value in found.items() if value is not None}


def case_name(row: Row) -> str:
    """`1024->4096 fan-in 32 1x1 float32 M=2048`."""
    if "D" in row:
        return f"abs_topk D={row['D']} k={row['k']} {row['dtype']} M={row['M']}"
    layer = f"{row['K']}->{row['N']} fan-in {row['fan_in']} {row['block']}"
    return f"{layer} {row['dtype']} M={row['M']}"


def steps(rows: Sequence[Row]) -> list[Row]:
    """The steps that are right and timed."""
    return [r for r in rows if r["product"] == "step" and r["correct"] and "time_ms" in r]


def milliseconds(value: float | None) -> str:
    """A time with three or four digits, or `-` for None."""
    if value is None:
        return "-"
    return f"{value:.{1 if value >= 99.95 else 2 if value >= 1 else 4}f}"


# --- tables ------------------------------------------------------------------------------------


def _value(name: str) -> Callable[[Row], object]:
    return lambda row: row.get(name) if row.get(name) is not None else "-"


def _over(baseline: str) -> Callable[[Row], str]:
    return lambda row: ratio(speedup(row, baseline))


def _over_peer(row: Row) -> str:
    column, library = sparse_peer(row)
    value = speedup(row, column)
    return "-" if value is None else f"{ratio(value)} ({library})"


# Heading -> the cell of a row. A column that no row fills is left out.
COLUMNS: dict[str, Callable[[Row], object]] = {
    "layer": lambda row: f"{row['K']} -> {row['N']}" if "K" in row else "-",
    "fan_in": _value("fan_in"),
    "block": _value("block"),
    "D": _value("D"),
    "k": _value("k"),
    "dtype": _value("dtype"),
    "M": _value("M"),
    "product": _value("product"),
    "ms": lambda row: milliseconds(row.get("time_ms")) if row["correct"] else "FAIL",
    "iqr": lambda row: milliseconds(row.get("spread_ms")),
    "masked dense": _over("masked_dense"),
    "dense": _over("dense"),
    "best dense": _over("best_dense"),
    "which": _value("best_dense_kind"),
    "best sparse": _over_peer,
    "torch": _over("torch"),
    "bound": lambda row: f"{speedup(row, 'bound'):.0%}" if speedup(row, "bound") else "-",
    "error": lambda row: f"{row['error']:.0e}",
    "torch's": lambda row: f"{row['torch_error']:.0e}" if "torch_error" in row else "-",
}
SHORT_COLUMNS = {
    **{name: COLUMNS[name] for name in ("layer", "fan_in", "block", "dtype")},
    "step, ms": COLUMNS["ms"],
    "over masked dense": COLUMNS["masked dense"],
    "over best dense": COLUMNS["best dense"],
    "over best sparse peer": _over_peer,
}


def _table(columns: Mapping[str, Callable[[Row], object]], rows: Sequence[Row], style: Any) -> str:
    cells = {name: [cell(row) for row in rows] for name, cell in columns.items()}
    cells = {name: column for name, column in cells.items() if set(column) != {"-"}}
    return table(list(cells), zip(*cells.values(), strict=True), style)


def case_line(step: Row) -> str:
    """The step of a case in one line, as it is measured."""
    start = f"{case_name(step):<46}"
    if not step["correct"]:
        return f"{start} FAIL: error {step['error']:.1e}"
    if "time_ms" not in step:
        return f"{start} correct"
    over = [
        f"{ratio(value):>5} over {name.removeprefix('the ')}"
        for name, value in over_baselines(step).items()
    ]
    return f"{start} step {milliseconds(step['time_ms']):>7} ms, {', '.join(over)}"


def text(content: Mapping[str, Any]) -> str:
    """All rows, the goals and the sentences, for the terminal."""
    rows = content["rows"]
    lines = [
        "ms: median of one call; step: all products. Then: how many times faster than masked",
        "dense, torch's dense in the same dtype, the fastest dense and sparse of the process.",
        _table(COLUMNS, rows, "terminal"),
    ]
    return "\n".join([*lines, *closing_lines(rows)])


def markdown(content: Mapping[str, Any]) -> dict[str, str]:
    """The short table of README.md and the full one of the docs, by their marks."""
    machine, rows = content["machine"], content["rows"]
    where = f"{machine_line(machine)}, {machine['date'][:10]}; `{machine['command']}`"
    chosen = [row for row in steps(rows) if row.get("headline") and row["M"] != 1]
    short = ([row for row in chosen if row["dtype"] != "bfloat16"] or chosen)[:SHORT_ROWS]
    suffix = "-cuda" if rows and rows[0]["device"] == "cuda" else ""
    return {
        SHORT_MARK + suffix: f"{_table(SHORT_COLUMNS, short, 'markdown')}\n\n{where}",
        FULL_MARK + suffix: f"{where}\n\n{_table(COLUMNS, rows, 'markdown')}",
    }


# --- goals and sentences -----------------------------------------------------------------------


def goals(rows: Sequence[Row]) -> Iterator[tuple[str, float, float]]:
    """`(what, measured, goal)` of every goal that the rows decide."""
    for goal in GOALS:
        here, there = (
            {} if isinstance(case, str) else case.columns | {"product": goal.product}
            for case in (goal.case, goal.over)
        )
        timed = [row for row in rows if row["correct"] and row.get("time_ms") is not None]
        for row in (row for row in timed if here.items() <= row.items()):
            name = f"{case_name(row)} {goal.product} over"
            if isinstance(goal.over, str):
                if value := speedup(row, goal.over):
                    kind = row.get(f"{goal.over}_kind", "")
                    kind = f" ({kind})" if goal.over.startswith("best") else ""
                    yield f"{name} {goal.over.replace('_', ' ')}{kind}", value, goal.least
            else:
                changed = " ".join(str(there[k]) for k in here if here[k] != there[k])
                for other in (other for other in timed if there.items() <= other.items()):
                    yield f"{name} {changed}", other["time_ms"] / row["time_ms"], goal.least


def closing_lines(rows: Sequence[Row]) -> list[str]:
    """Each goal beside what was measured, the fraction of the bound, and the sentences."""
    found = [
        [name, ratio(value), ratio(goal), "reached" if value >= goal else "missed"]
        for name, value, goal in goals(rows)
    ]
    lines = ["", table(("goal", "measured", "goal", ""), found)] if found else []
    products = [row for row in rows if row["product"] != "step" and row["correct"]]
    if fractions := [value for row in products if (value := speedup(row, "bound"))]:
        mean = statistics.geometric_mean(fractions)
        lines += ["", f"fraction of the roofline bound, geometric mean: {mean:.0%}"]
        if max(fractions) > IMPOSSIBLE:
            lines.append(
                "A fraction above 100% means that another process disturbed the measurement of the "
                "machine's peaks: run again when it is idle."
            )
    if any(row.get("bf16_dense_note") for row in rows):
        lines.append("torch's bfloat16 dense takes seconds a call here: left out where it does.")
    return [*lines, "", *sentences(rows)]


def compare(times: float, what: str) -> str:
    """`1.3 times faster than what`, with two significant digits."""
    if 0.95 <= times < 1.05:
        return f"as fast as {what}"
    word = "faster" if times >= 1 else "slower"
    return f"{float(f'{max(times, 1 / times):.2g}'):g} times {word} than {what}"


def sentences(rows: Sequence[Row], count: int = 3) -> list[str]:
    """What a person can repeat: a step of the first cases with a goal, and where it does not pay.

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
            slower.append((value, f"{case_name(row)} ({compare(value, what)})"))
    if slower:
        worst = "; ".join(said for _, said in sorted(slower)[:3])
        return [f"It does not pay in {len(slower)} of {len(steps)} cases: {worst}."]
    if densities := [row["density"] for row in steps if "density" in row]:
        return [
            f"No measured case was slower than a baseline; the densest keeps {max(densities):.0%} "
            "of the weights. docs/break-even.md says from which density dense wins."
        ]
    return []


# --- the plot ----------------------------------------------------------------------------------


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """Speed-up of a step against density, log-log, one line per block, into a PNG.

    Left over masked dense, right over the best dense. A line joins the geometric means of the cases
    of one block and dtype at each density. Only the largest M is drawn.
    """
    from matplotlib.figure import Figure

    tokens = max((row["M"] for row in steps(rows)), default=0)
    drawn = [row for row in steps(rows) if row["M"] == tokens]
    blocks = sorted({row["block"] for row in drawn}, key=lambda b: [int(n) for n in b.split("x")])
    styles = {"float32": "-", "bfloat16": "--", "float16": ":"}
    figure = Figure(figsize=(11, 4.8), layout="constrained")
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
        axis.set(xscale="log", yscale="log", xlabel="density (kept weights / all weights)")
        axis.set_title(f"speed-up of a step over {baseline.replace('_', ' ')}", fontsize=10)
        axis.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        axis.grid(which="both", alpha=0.25, lw=0.5)
    if drawn:  # baselines may be missing for a dtype: the axis that shows more explains both
        max(axes, key=lambda axis: len(axis.get_legend_handles_labels()[1])).legend(fontsize=8)
    figure.suptitle(f"{title}, M={tokens}", fontsize=9)
    figure.savefig(path, dpi=130, format="png")
