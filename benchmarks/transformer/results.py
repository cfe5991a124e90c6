"""Tables, closing sentences and the plot of benchmarks.training and benchmarks.inference."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from benchmarks import report
from benchmarks.transformer.parts import PARTS

Row = Mapping[str, Any]

# Columns that are empty where a row is not correct.
TIMED = (
    "step_ms", "tokens_per_s", "ordinary_ms", "rewiring_ms", "period", "spread_ms", "samples",
    "samples_ms", "parts_ms", "instrumented_ms", "state_mb", "bigram_mb", "patterns_mb", "loss",
)  # fmt: skip
# Quartiles further apart than this share of the median: another process was in the way.
_DISTURBED = 0.2
_NAMES = {
    "masked_dense": "the published masked-dense recipe",
    "masked_dense_abs_topk": "masked dense with our AbsTopK",
    "dense": "dense",
}
_HEADINGS = (
    "phase", "variant", "dtype", "d_model", "density", "tokens", "ms", "iqr", "tokens/s",
    "sparse is faster by", "rewiring", *PARTS, "peak MB", "state MB",
)  # fmt: skip


def find(rows: Iterable[Row], **wanted: object) -> Row | None:
    """The first row with these values."""
    return next((row for row in rows if all(row.get(k) == v for k, v in wanted.items())), None)


def text(content: Mapping[str, Any]) -> str:
    """The tables of all parts, and the closing sentences."""
    rows = content["rows"]
    parts = dict.fromkeys(row.get("part") for row in rows)
    tables = [table([row for row in rows if row.get("part") == part]) for part in parts]
    return "\n\n".join([*tables, "\n".join(sentences(rows))])


def table(rows: Sequence[Row], style: Literal["terminal", "markdown"] = "terminal") -> str:
    """A line for each row: the step, its parts in milliseconds, its memory."""
    return report.table(_HEADINGS, [_cells(row, rows) for row in rows], style)


def _cells(row: Row, rows: Sequence[Row]) -> list[str]:
    start = [
        row["phase"], row["variant"], row["dtype"], str(row["d_model"]), density(row),
        str(row["tokens"]),
    ]  # fmt: skip
    if not row["correct"]:
        return [*start, f"FAIL: {row['failure']}", *[""] * (len(_HEADINGS) - len(start) - 1)]
    parts = row["parts_ms"] or {}
    ours = sparse_of(row, rows)
    return [
        *start,
        _number(row["step_ms"]),
        _number(row["spread_ms"]),
        f"{row['tokens_per_s']:.0f}",
        "" if ours is None else report.ratio(row["step_ms"] / ours["step_ms"]),
        _number(row.get("rewiring_ms")),
        *(_number(parts.get(part)) for part in PARTS),
        "-" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}",
        f"{row['state_mb']:.1f} + {row['bigram_mb']:.0f}",
    ]


def sparse_of(row: Row, rows: Sequence[Row]) -> Row | None:
    """The correct sparse row that a row of another variant is compared with."""
    same = ("phase", "part", "d_model", "density", "tokens", "dtype")
    wanted = {name: row.get(name) for name in same}
    return (
        None if row["variant"] == "sparse" else find(rows, variant="sparse", correct=True, **wanted)
    )


def density(row: Row) -> str:
    """As 1/64; of a dense model 1."""
    return "1" if row["variant"] == "dense" else f"1/{1 / row['density']:.4g}"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.2f}"


# --- the sentences -----------------------------------------------------------------------------


def sentences(rows: Sequence[Row]) -> list[str]:
    """What a person can repeat, and what to beware of."""
    good = [row for row in rows if row["correct"]]
    lines = []
    for row in good:
        is_told = row["phase"] == "train" or row["dtype"] == "float32"
        if is_told and row["variant"] == "sparse" and row.get("part", "default") == "default":
            lines.append(_sentence(row, good))
    lines += _growth([r for r in good if r.get("part") == "l0"], "l0", "nonzero weights")
    lines += _growth([r for r in good if r.get("part") == "width"], "d_model", "d_model")
    if len(good) < len(rows):
        lines.append(f"{len(rows) - len(good)} rows FAILED: nothing is said about them.")
    disturbed = [r for r in good if r["spread_ms"] > _DISTURBED * r["step_ms"]]
    if disturbed:
        each = (f"{r['phase']} {r['variant']} {r['dtype']} {density(r)}" for r in disturbed)
        names = ", ".join(dict.fromkeys(each))
        lines.append(f"Another process disturbed these, run again when it is idle: {names}.")
    return lines


def _sentence(row: Row, rows: Sequence[Row]) -> str:
    same = {name: row.get(name) for name in ("phase", "part", "d_model", "tokens", "dtype")}
    masked = find(rows, variant="masked_dense", density=row["density"], **same) or find(
        rows, variant="masked_dense_abs_topk", density=row["density"], **same
    )
    # Dense takes as long at any density, so it is measured at one.
    others = [other for other in (masked, find(rows, variant="dense", **same)) if other is not None]
    what = {
        "train": "A training step",
        "prefill": f"A prompt of {row['tokens']} tokens",
        "decode": f"One more token for each of a batch of {row['tokens']}",
    }[row["phase"]]
    names = _NAMES if row["phase"] == "train" else _NAMES | {"masked_dense": "masked dense"}
    faster = " and ".join(
        f"{_faster(other['step_ms'] / row['step_ms'])} than {names[other['variant']]}"
        for other in others
    )
    return (
        f"{what} of a {row['n_layer']}-layer d_model {row['d_model']} model at density "
        f"{density(row)} in {row['dtype']} takes {_number(row['step_ms'])} ms"
        + (f": {faster}." if faster else ".")
    )


def _faster(times: float) -> str:
    if times >= 1:
        return f"{times:.3g} times faster"
    return f"{1 / times:.3g} times slower"


def _growth(rows: Sequence[Row], key: str, name: str) -> list[str]:
    """How the time of a sparse step grows with `key`, from each row to the next."""
    ours = sorted((r for r in rows if r["variant"] == "sparse"), key=lambda row: row[key])
    return [
        f"From {less[key]:,} to {more[key]:,} {name}, a sparse step takes "
        f"{more['step_ms'] / less['step_ms']:.2f} times as long, its linears "
        f"{more['parts_ms']['linears'] / less['parts_ms']['linears']:.2f} times."
        for less, more in itertools.pairwise(ours)
    ]


def markdown(content: Mapping[str, Any]) -> dict[str, str]:
    """By its mark, the table of the default part of a training, or of all of an inference."""
    machine = content["machine"]
    rows = [r for r in content["rows"] if r["correct"] and r.get("part", "default") == "default"]
    name = "training" if any(row["phase"] == "train" for row in rows) else "inference"
    body = (
        f"Measured on {report.machine_line(machine)}, {machine['date'][:10]}:\n\n"
        f"    {machine['command']}\n\n{table(rows, 'markdown')}\n"
    )
    return {f"measured-{name}": body}


# --- the plot ----------------------------------------------------------------------------------


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """A step against L0 and against the width, log-log, into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 5.2), layout="constrained")
    for axis, part, key in ((axes[0], "l0", "l0"), (axes[1], "width", "d_model")):
        chosen = [row for row in rows if row.get("part") == part and row["correct"]]
        ours = sorted((r for r in chosen if r["variant"] == "sparse"), key=lambda row: row[key])
        masked = sorted((r for r in chosen if r["variant"] != "sparse"), key=lambda row: row[key])
        if not ours:
            continue
        x = [row[key] for row in ours]
        axis.plot(x, [row["step_ms"] for row in ours], "o-", color="C0", label="sparse, a step")
        for color, name in enumerate(PARTS[:5], 2):
            times = [row["parts_ms"][name] for row in ours]
            axis.plot(x, times, ".--", lw=0.9, color=f"C{color}", label=f"  its {name}")
        if key == "l0" and masked:
            # It takes as long at any density.
            axis.axhline(masked[0]["step_ms"], color="C1", label="masked dense as released")
        elif masked:
            points = [row["step_ms"] for row in masked]
            widths = [row[key] for row in masked]
            axis.plot(widths, points, "s-", color="C1", label="masked dense as released")
        axis.set(xscale="log", yscale="log", ylabel="ms")
        for side in (axis.xaxis, axis.yaxis):
            side.set_minor_formatter(NullFormatter())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.grid(which="both", alpha=0.25, lw=0.5)
        axis.set_xticks(x, [f"{row[key]:.3g}\n{density(row)}" for row in ours], fontsize=8)
        axis.set_xlabel(f"{'nonzero weights' if key == 'l0' else key} (density of the blocks)")
        fixed = f"d_model {ours[0]['d_model']}" if key == "l0" else f"L0 {ours[0]['l0']:,}"
        axis.set_title(f"as {key} grows at {fixed}", fontsize=10)
        axis.legend(fontsize=7)
    figure.suptitle(title, fontsize=8)
    figure.savefig(path, dpi=130, format="png")
    pyplot.close(figure)
