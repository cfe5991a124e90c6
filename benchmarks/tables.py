"""What rows of `benchmarks.matmul` say: the table, goals, sentences, documents and the plot."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import GOAL_TOKENS, GOALS, GPU_GOALS, GPU_TOKENS
from benchmarks.report import Row, geometric_mean, machine_line, milliseconds, percent, ratio, table

# README.md has one short table; docs/benchmarks.md has all cases.
SHORT_MARK, FULL_MARK = "measured", "measured-full"
SHORT_ROWS = 6


def speedup(row: Row, baseline: str) -> float | None:
    """How many times faster than `row[baseline]` it was; None if that was not measured."""
    if row.get(baseline) is None or row.get("time_ms") is None:
        return None
    return float(row[baseline] / row["time_ms"])


def fraction(row: Row) -> float | None:
    """The fraction of the roofline bound that was reached; None without a bound."""
    if row.get("bound_ms") is None or row.get("time_ms") is None:
        return None
    return float(row["bound_ms"] / row["time_ms"])


def best_sparse(row: Row) -> tuple[float | None, str]:
    """The speed-up over the best sparse peer, and its name. Old files know torch CSR alone."""
    if row.get("best_sparse_ms") is not None:
        return speedup(row, "best_sparse_ms"), row["best_sparse_kind"]
    return speedup(row, "torch_csr_ms"), "torch CSR"


def layer(row: Row) -> str:
    """`1024 -> 4096`."""
    return f"{row['K']} -> {row['N']}"


# --- tables ------------------------------------------------------------------------------------

_HEADINGS = (
    "layer", "fan_in", "block", "dtype", "M", "product", "ms", "iqr", "masked dense", "dense",
    "best dense", "which", "best sparse", "which", "bound", "error", "torch's",
)  # fmt: skip


def _cells(row: Row) -> list[str]:
    case = [layer(row), str(row["fan_in"]), row["block"], row["dtype"], str(row["M"])]
    errors = [f"{row['error']:.0e}", f"{row['torch_error']:.0e}"]
    if not row["correct"]:
        return [*case, row["product"], "FAIL", *["-"] * 8, *errors]
    peer, name = best_sparse(row)
    return [
        *case,
        row["product"],
        milliseconds(row["time_ms"]),
        milliseconds(row["spread_ms"]),
        ratio(speedup(row, "masked_dense_ms")),
        ratio(speedup(row, "dense_ms")),
        ratio(speedup(row, "best_dense_ms")),
        row["best_dense_kind"] or "-",
        ratio(peer),
        name if peer is not None else "-",
        percent(fraction(row)),
        *errors,
    ]


def case_line(rows: Sequence[Row]) -> str:
    """The step of a case in one line, as it is measured."""
    step = rows[-1]
    start = f"{layer(step):>12} fan_in {step['fan_in']:<4} {step['block']:<5} {step['dtype']:<8}"
    start += f" M={step['M']:<5}"
    if not step["correct"]:
        return f"{start} FAIL: error {step['error']:.1e}, torch's {step['torch_error']:.1e}"
    peer, name = best_sparse(step)
    line = (
        f"{start} step {milliseconds(step['time_ms']):>7} ms, over masked dense "
        f"{ratio(speedup(step, 'masked_dense_ms')):>5}, best dense "
        f"{ratio(speedup(step, 'best_dense_ms')):>5}"
    )
    return line if peer is None else f"{line}, best sparse {ratio(peer):>5} ({name})"


def text(content: Mapping[str, Any]) -> str:
    """All rows, the goals and the sentences, for the terminal."""
    rows = content["rows"]
    lines = [
        "ms: median of one call; step: the three products. Then: how many times faster than masked",
        "dense, torch's dense in the same dtype, the fastest dense and sparse of the process.",
        table(_HEADINGS, map(_cells, rows)),
    ]
    return "\n".join([*lines, *goal_lines(rows), "", *sentences(rows)])


def markdown(content: Mapping[str, Any]) -> dict[str, str]:
    """The short table of README.md and the full one of the docs, by their marks."""
    machine, rows = content["machine"], content["rows"]
    where = f"{machine_line(machine)}, {machine['date'][:10]}; `{machine['command']}`"
    chosen = sorted(_steps(rows, headline=True), key=lambda row: (row["M"] == 1, row["dtype"][0]))
    chosen = [row for row in chosen if row["dtype"] != "bfloat16"] or chosen
    short = [
        [
            layer(row), row["fan_in"], row["block"], row["dtype"], milliseconds(row["time_ms"]),
            ratio(speedup(row, "masked_dense_ms")), ratio(speedup(row, "best_dense_ms")),
            _with_name(*best_sparse(row)),
        ]
        for row in chosen if row["M"] != 1
    ][:SHORT_ROWS]  # fmt: skip
    headings = (
        "layer", "fan_in", "block", "dtype", "step, ms", "over masked dense", "over best dense",
        "over best sparse peer",
    )  # fmt: skip
    full = table(_HEADINGS, map(_cells, rows), "markdown")
    suffix = "-cuda" if rows and rows[0]["device"] == "cuda" else ""
    return {
        SHORT_MARK + suffix: f"{table(headings, short, 'markdown')}\n\n{where}",
        FULL_MARK + suffix: f"{where}\n\n{full}",
    }


def _with_name(value: float | None, name: str) -> str:
    return "-" if value is None else f"{ratio(value)} ({name})"


# --- goals -------------------------------------------------------------------------------------


def _steps(rows: Iterable[Row], **wanted: object) -> list[Row]:
    return [
        row
        for row in rows
        if row["product"] == "step"
        and row["correct"]
        and all(row[name] == value for name, value in wanted.items())
    ]


def goals(rows: Sequence[Row]) -> Iterator[tuple[str, float, float]]:
    """`(what, measured, goal)` of every goal that the rows decide."""
    for shape, (over_masked, over_best) in GOALS.items():
        where = {**dict(zip(("K", "N", "fan_in"), shape, strict=True)), "M": GOAL_TOKENS}
        name = "{} -> {} fan_in {}".format(*shape)
        fp32 = _steps(rows, **where, block="1x1", dtype="float32")
        bf16 = _steps(rows, **where, block="1x1", dtype="bfloat16")
        for row in fp32:
            for baseline, label, goal in (
                ("masked_dense_ms", "masked dense", over_masked),
                ("best_dense_ms", f"best dense ({row['best_dense_kind']})", over_best),
                ("best_fp32_dense_ms", "best fp32 dense", over_best),
            ):
                if (value := speedup(row, baseline)) is not None:
                    yield f"{name} fp32 over {label}", value, goal
        if fp32 and bf16:
            yield f"{name} bf16 over our fp32", fp32[0]["time_ms"] / bf16[0]["time_ms"], 1.3
    for shared in _steps(rows, M=GOAL_TOKENS, fan_in=128, block="16x1"):
        where = {name: shared[name] for name in ("K", "N", "fan_in", "M", "dtype")}
        for row in _steps(rows, **where, block="1x1"):
            name = f"{layer(row)} fan_in 128 {row['dtype']} 16x1 over 1x1"
            yield name, row["time_ms"] / shared["time_ms"], 1.8
    for row in rows:
        is_decode = (row["K"], row["N"], row["fan_in"], row["M"]) == (2048, 8192, 8, 1)
        value = speedup(row, "dense_ms")
        if is_decode and row["product"] == "forward" and row["correct"] and value is not None:
            yield f"{layer(row)} fan_in 8 {row['dtype']} M=1 forward over dense", value, 20.0
        if row["product"] == "step" and row["correct"] and row.get("one_thread_ms") is not None:
            name = f"{layer(row)} fan_in {row['fan_in']} {row['threads']} threads over 1"
            yield name, row["one_thread_ms"] / row["time_ms"], 0.85 * row["threads"]
        block_out, block_in = (int(side) for side in row["block"].split("x"))
        gpu = GPU_GOALS.get((row["K"], row["N"], row["fan_in"], (block_out, block_in)), {})
        wanted = gpu.get(row["product"])
        is_gpu = (row["device"], row["M"], row["dtype"]) == ("cuda", GPU_TOKENS, "bfloat16")
        if wanted is not None and is_gpu and row["correct"] and value is not None:
            name = f"{layer(row)} fan_in {row['fan_in']} {row['block']} {row['product']}"
            yield f"{name} over cuBLAS", value, wanted


def goal_lines(rows: Sequence[Row]) -> list[str]:
    """Each goal beside what was measured, and the fraction of the bound."""
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
        if max(fractions) > 1.05:
            lines.append(
                "A fraction above 100% means that another process disturbed the measurement of the "
                "machine's peaks: run again when it is idle."
            )
    if any(row.get("bf16_dense_note") for row in rows):
        lines.append("torch's bfloat16 dense takes seconds a call here: left out where it does.")
    return lines


# --- sentences ---------------------------------------------------------------------------------


def sentences(rows: Sequence[Row], count: int = 3) -> list[str]:
    """What a person can repeat: a step of the first cases with a goal, and where it does not pay.

    Each number is computed from the row of that step.
    """
    steps = _steps(rows)
    chosen = [r for r in steps if r["headline"] and r["block"] == "1x1" and r["M"] != 1]
    said = [_sentence(row) for row in chosen if speedup(row, "masked_dense_ms")][:count]
    return [*said, *_where_it_does_not_pay(steps)]


def _sentence(row: Row) -> str:
    peer, name = best_sparse(row)
    parts = [
        f"{ratio(speedup(row, 'masked_dense_ms'))[:-1]} times faster than masked dense",
        f"{ratio(speedup(row, 'best_dense_ms'))[:-1]} times faster than the best dense "
        f"({row['best_dense_kind']})",
    ]
    if peer is not None:
        parts.append(f"{ratio(peer)[:-1]} times faster than the best sparse peer ({name})")
    return (
        f"On this machine a training step of {row['K']}->{row['N']} with fan-in {row['fan_in']} "
        f"({row['dtype']}) is {', '.join(parts[:-1])} and {parts[-1]}."
    )


def _where_it_does_not_pay(steps: Sequence[Row]) -> list[str]:
    slower: list[tuple[float, str]] = []
    for row in steps:
        peer, name = best_sparse(row)
        value, what = min(
            (speedup(row, "best_dense_ms") or 1.0, row["best_dense_kind"]), (peer or 1.0, name)
        )
        if value < 1:
            case = f"{row['K']}->{row['N']} fan-in {row['fan_in']} {row['block']} {row['dtype']}"
            times = ratio(1 / value)[:-1]
            slower.append((value, f"{case} M={row['M']} ({what} is {times} times faster)"))
    if not steps:
        return []
    if slower:
        worst = "; ".join(said for _, said in sorted(slower)[:3])
        return [f"It does not pay in {len(slower)} of {len(steps)} cases: {worst}."]
    densest = max(row["density"] for row in steps)
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
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.8), sharex=True, layout="constrained")
    for axis, baseline in zip(axes, ("masked_dense_ms", "best_dense_ms"), strict=True):
        for color, block in enumerate(blocks):
            for dtype, style in (("float32", "-"), ("bfloat16", "--"), ("float16", ":")):
                points: dict[float, list[float]] = {}
                for row in _steps(steps, block=block, dtype=dtype):
                    if (value := speedup(row, baseline)) is not None:
                        points.setdefault(row["density"], []).append(value)
                if not points:
                    continue
                densities = sorted(points)
                means = [geometric_mean(points[density]) for density in densities]
                name = f"{block} {dtype}"
                axis.plot(densities, means, style, color=f"C{color}", marker="o", ms=4, label=name)
                dots = [(d, value) for d in densities for value in points[d] if len(points[d]) > 1]
                if dots:
                    axis.scatter(*zip(*dots, strict=True), s=9, color=f"C{color}", alpha=0.4)
        axis.axhline(1, color="gray", lw=1, ls=":")
        axis.set(xscale="log", yscale="log", xlabel="density (kept weights / all weights)")
        label = "masked dense" if baseline == "masked_dense_ms" else "the best dense"
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
