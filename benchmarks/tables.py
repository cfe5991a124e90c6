"""What the rows of `benchmarks.matmul` and `benchmarks.activation` say: tables, goals, a plot."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import GOAL_TOKENS, GOALS, GPU_GOALS, GPU_TOKENS, TOPK_GOALS
from benchmarks.report import Row, geometric_mean, machine_line, milliseconds, percent, ratio, table

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


def fraction(row: Row) -> float | None:
    """The fraction of the roofline bound that was reached; None without a bound."""
    return speedup(row, "bound")


def sparse_peer(row: Row) -> str:
    """The best sparse peer's column. Old files know torch CSR alone."""
    return "best_sparse" if row.get("best_sparse_ms") is not None else "torch_csr"


def baselines(row: Row) -> dict[str, str]:
    """The columns that ours is compared with, and what a sentence calls each."""
    peer = row.get("best_sparse_kind") or "torch CSR"
    return {
        "masked_dense": "masked dense",
        "best_dense": f"the best dense ({row.get('best_dense_kind')})",
        sparse_peer(row): f"the best sparse peer ({peer})",
        "torch": f"torch.topk + scatter ({row.get('torch_kind')})",
    }


def case_name(row: Row) -> str:
    """`1024->4096 fan-in 32 1x1 float32 M=2048`."""
    if "D" in row:
        return f"abs_topk D={row['D']} k={row['k']} {row['dtype']} M={row['M']}"
    layer = f"{row['K']}->{row['N']} fan-in {row['fan_in']} {row['block']}"
    return f"{layer} {row['dtype']} M={row['M']}"


# --- tables ------------------------------------------------------------------------------------


def _value(name: str) -> Callable[[Row], object]:
    return lambda row: row.get(name) if row.get(name) is not None else "-"


def _over(baseline: str) -> Callable[[Row], str]:
    return lambda row: ratio(speedup(row, baseline))


def _over_peer(row: Row) -> str:
    value = speedup(row, sparse_peer(row))
    return "-" if value is None else f"{ratio(value)} ({row.get('best_sparse_kind', 'torch CSR')})"


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
    "bound": lambda row: percent(fraction(row)),
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
    over = [
        f"{ratio(value):>5} over {name.removeprefix('the ')}"
        for column, name in baselines(step).items()
        if (value := speedup(step, column)) is not None
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
    chosen = [row for row in _steps(rows, headline=True) if row["M"] != 1]
    short = ([row for row in chosen if row["dtype"] != "bfloat16"] or chosen)[:SHORT_ROWS]
    suffix = "-cuda" if rows and rows[0]["device"] == "cuda" else ""
    return {
        SHORT_MARK + suffix: f"{_table(SHORT_COLUMNS, short, 'markdown')}\n\n{where}",
        FULL_MARK + suffix: f"{where}\n\n{_table(COLUMNS, rows, 'markdown')}",
    }


# --- goals -------------------------------------------------------------------------------------


def _matching(rows: Iterable[Row], wanted: Mapping[str, object]) -> list[Row]:
    return [row for row in rows if row["correct"] and wanted.items() <= row.items()]


def _steps(rows: Iterable[Row], **wanted: object) -> list[Row]:
    return _matching((r for r in rows if "time_ms" in r), {"product": "step", **wanted})


def _goals() -> Iterator[tuple[dict[str, object], str | dict[str, object], float]]:
    """Which rows, over which column or over the row with which other values, the least ratio."""
    for shape, (over_masked, over_best) in GOALS.items():
        where = _columns("K N fan_in M block product", *shape, GOAL_TOKENS, "1x1", "step")
        yield where | {"dtype": "float32"}, "masked_dense", over_masked
        yield where | {"dtype": "float32"}, "best_dense", over_best
        yield where | {"dtype": "float32"}, "best_fp32_dense", over_best
        yield where | {"dtype": "bfloat16"}, {"dtype": "float32"}, 1.3
    shared = _columns("M fan_in block product", GOAL_TOKENS, 128, "16x1", "step")
    yield shared, {"block": "1x1"}, 1.8
    yield _columns("K N fan_in M product", 2048, 8192, 8, 1, "forward"), "dense", 20.0
    yield {"product": "step"}, "one_thread", 0.85
    for (*sizes, block), products in GPU_GOALS.items():
        where = _columns("K N fan_in M device", *sizes, GPU_TOKENS, "cuda")
        where |= {"block": f"{block[0]}x{block[1]}", "dtype": "bfloat16"}
        for product, least in products.items():
            yield where | {"product": product}, "dense", least
    for key, least in TOPK_GOALS.items():
        yield _columns("M D k dtype product", *key, "abs_topk forward"), "torch", least


def _columns(names: str, *values: object) -> dict[str, object]:
    return dict(zip(names.split(), values, strict=True))


def goals(rows: Sequence[Row]) -> Iterator[tuple[str, float, float]]:
    """`(what, measured, goal)` of every goal that the rows decide."""
    for where, over, least in _goals():
        for row in _matching(rows, where):
            name = f"{case_name(row)} {row['product']} over"
            if isinstance(over, dict):
                case = {n: row[n] for n in ("K", "N", "fan_in", "block", "dtype", "M", "product")}
                for other in _matching(rows, case | over):
                    words = " ".join(map(str, over.values()))
                    yield f"{name} {words}", other["time_ms"] / row["time_ms"], least
            elif (value := speedup(row, over)) is not None:
                goal = least * row["threads"] if over == "one_thread" else least
                words, kind = over.replace("_", " "), row.get(f"{over}_kind", over)
                label = f"{words} ({kind})" if over.startswith("best") else words
                yield f"{name} {label}", value, goal


def closing_lines(rows: Sequence[Row]) -> list[str]:
    """Each goal beside what was measured, the fraction of the bound, and the sentences."""
    found = [
        [name, ratio(value), ratio(goal), "reached" if value >= goal else "missed"]
        for name, value, goal in goals(rows)
    ]
    lines = ["", table(("goal", "measured", "goal", ""), found)] if found else []
    products = [row for row in rows if row["product"] != "step" and row["correct"]]
    fractions = [value for row in products if (value := fraction(row)) is not None]
    if fractions:
        mean = geometric_mean(fractions)
        lines += ["", f"fraction of the roofline bound, geometric mean: {100 * mean:.0f}%"]
        if max(fractions) > IMPOSSIBLE:
            lines.append(
                "A fraction above 100% means that another process disturbed the measurement of the "
                "machine's peaks: run again when it is idle."
            )
    if any(row.get("bf16_dense_note") for row in rows):
        lines.append("torch's bfloat16 dense takes seconds a call here: left out where it does.")
    return [*lines, "", *sentences(rows)]


# --- sentences ---------------------------------------------------------------------------------


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
    steps = _steps(rows)
    chosen = [r for r in steps if r.get("headline") and r["block"] == "1x1" and r["M"] != 1]
    said = [_sentence(row) for row in chosen if speedup(row, "masked_dense")][:count]
    return [*said, *_where_it_does_not_pay(steps)]


def _sentence(row: Row) -> str:
    *first, last = (
        compare(value, name)
        for column, name in baselines(row).items()
        if (value := speedup(row, column)) is not None
    )
    return (
        f"On this machine a training step of {row['K']}->{row['N']} with fan-in {row['fan_in']} "
        f"({row['dtype']}) is {' and '.join(filter(None, (', '.join(first), last)))}."
    )


def _where_it_does_not_pay(steps: Sequence[Row]) -> list[str]:
    slower: list[tuple[float, str]] = []
    for row in steps:
        value, what = min(
            (speedup(row, column) or 1.0, name) for column, name in baselines(row).items()
        )
        if value < 0.95:
            slower.append((value, f"{case_name(row)} ({compare(value, what)})"))
    if slower:
        worst = "; ".join(said for _, said in sorted(slower)[:3])
        return [f"It does not pay in {len(slower)} of {len(steps)} cases: {worst}."]
    densest = max((row["density"] for row in steps if "density" in row), default=None)
    if densest is None:
        return []
    return [
        f"No measured case was slower than a baseline; the densest keeps {densest:.0%} of the "
        "weights. docs/break-even.md says from which density dense wins."
    ]


# --- the plot ----------------------------------------------------------------------------------


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """Speed-up of a step against density, log-log, one line per block, into a PNG.

    Left over masked dense, right over the best dense. A line joins the geometric means of the cases
    of one block and dtype at each density; dots are the cases. Only the largest M is drawn.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, NullFormatter

    steps = _steps(rows)
    tokens = max((row["M"] for row in steps), default=GOAL_TOKENS)
    steps = [row for row in steps if row["M"] == tokens]
    blocks = sorted({row["block"] for row in steps}, key=lambda b: [int(n) for n in b.split("x")])
    styles = {"float32": "-", "bfloat16": "--", "float16": ":"}
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.8), sharex=True, layout="constrained")
    for axis, baseline in zip(axes, ("masked_dense", "best_dense"), strict=True):
        for color, block in enumerate(blocks):
            for dtype, style in styles.items():
                points: dict[float, list[float]] = {}
                for row in _steps(steps, block=block, dtype=dtype):
                    if (value := speedup(row, baseline)) is not None:
                        points.setdefault(row["density"], []).append(value)
                means = {density: geometric_mean(points[density]) for density in sorted(points)}
                if not means:
                    continue
                look = {"color": f"C{color}", "label": f"{block} {dtype}"}
                axis.plot(means.keys(), means.values(), style, marker="o", ms=4, **look)
                dots = [(d, value) for d in means for value in points[d]]
                axis.scatter(*zip(*dots, strict=True), s=9, color=f"C{color}", alpha=0.4)
        axis.axhline(1, color="gray", lw=1, ls=":")
        axis.set(xscale="log", yscale="log", xlabel="density (kept weights / all weights)")
        label = "masked dense" if baseline == "masked_dense" else "the best dense"
        axis.set_title(f"speed-up of a step over {label}", fontsize=10)
        for side in (axis.xaxis, axis.yaxis):
            side.set_minor_formatter(NullFormatter())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
        axis.grid(which="both", alpha=0.25, lw=0.5)
    if steps:  # baselines may be missing for a dtype: the axis that shows more explains both
        max(axes, key=lambda axis: len(axis.get_legend_handles_labels()[1])).legend(fontsize=8)
    figure.suptitle(f"{title}, M={tokens}", fontsize=9)
    figure.savefig(path, dpi=130, format="png")
    pyplot.close(figure)
