"""Tables, closing sentences and the plot of benchmarks.training and benchmarks.inference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from benchmarks import report
from benchmarks.report import Row

PARTS = ("linears", "abs_topk", "attention", "rest", "optimizer", "topology")

# Columns that are empty where a row is not correct.
TIMED = (
    "step_ms", "tokens_per_s", "ordinary_ms", "rewiring_ms", "period", "spread_ms", "samples",
    "parts_ms", "state_mb", "bigram_mb", "loss",
)  # fmt: skip
# Quartiles further apart than this share of the median: another process was in the way.
_DISTURBED = 0.2
_SWEEPS = {"l0": ("l0", "nonzero weights"), "width": ("d_model", "d_model")}
_HEADINGS = (
    "phase", "variant", "dtype", "d_model", "density", "tokens", "ms", "iqr", "tokens/s",
    "sparse is faster by", "rewiring", *PARTS, "peak MB", "state MB",
)  # fmt: skip


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
    ours = [other for other in _alike(row, rows) if other["variant"] == "sparse"]
    is_ours = row["variant"] == "sparse" or not ours
    return [
        *start,
        _number(row["step_ms"]),
        _number(row["spread_ms"]),
        f"{row['tokens_per_s']:.0f}",
        "" if is_ours else report.ratio(row["step_ms"] / ours[0]["step_ms"]),
        _number(row["rewiring_ms"]),
        *(_number(row["parts_ms"].get(part)) for part in PARTS),
        "-" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}",
        f"{row['state_mb']:.1f} + {row['bigram_mb']:.0f}",
    ]


def _alike(row: Row, rows: Sequence[Row]) -> list[Row]:
    """The correct rows that may be compared; dense takes as long at any density."""
    same = ("phase", "part", "d_model", "tokens", "dtype")
    return [
        other
        for other in rows
        if other["correct"]
        and all(other.get(name) == row.get(name) for name in same)
        and (other["density"] == row["density"] or other["variant"] == "dense")
    ]


def density(row: Row) -> str:
    """As 1/64; of a dense model 1."""
    return "1" if row["variant"] == "dense" else f"1/{1 / row['density']:.4g}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}" if value < 1000 else f"{value:.0f}"


def text(content: Mapping[str, Any]) -> str:
    """The tables of all parts, and the closing sentences."""
    rows = content["rows"]
    parts = dict.fromkeys(row.get("part") for row in rows)
    tables = [table([row for row in rows if row.get("part") == part]) for part in parts]
    return "\n\n".join([*tables, "\n".join(sentences(rows))])


def markdown(content: Mapping[str, Any]) -> dict[str, str]:
    """By its mark, the table of the default part of a training, or of all of an inference."""
    machine = content["machine"]
    rows = [row for row in content["rows"] if row["correct"] and row.get("part") not in _SWEEPS]
    name = "training" if any(row["phase"] == "train" for row in rows) else "inference"
    body = (
        f"Measured on {report.machine_line(machine)}, {machine['date'][:10]}:\n\n"
        f"    {machine['command']}\n\n{table(rows, 'markdown')}\n"
    )
    return {f"measured-{name}": body}


def sentences(rows: Sequence[Row]) -> list[str]:
    """What a person can repeat, and what to beware of."""
    good = [row for row in rows if row["correct"]]
    ours = [row for row in good if row["variant"] == "sparse" and row.get("part") not in _SWEEPS]
    lines = [_sentence(row, _alike(row, good)) for row in ours]
    for part, (key, name) in _SWEEPS.items():
        if swept := _sweep(good, part)[0]:
            less, more = swept[0], swept[-1]
            times = more["step_ms"] / less["step_ms"]
            lines.append(
                f"From {less[key]:,} to {more[key]:,} {name}, a sparse step takes {times:.3g} "
                "times as long."
            )
    if len(good) < len(rows):
        lines.append(f"{len(rows) - len(good)} rows FAILED: nothing is said about them.")
    disturbed = [row for row in good if row["spread_ms"] > _DISTURBED * row["step_ms"]]
    if disturbed:
        each = (f"{r['phase']} {r['variant']} {r['dtype']} {density(r)}" for r in disturbed)
        names = ", ".join(dict.fromkeys(each))
        lines.append(f"Another process disturbed these, run again when it is idle: {names}.")
    return lines


def _sentence(row: Row, alike: Sequence[Row]) -> str:
    what = {
        "train": "A training step",
        "prefill": f"A prompt of {row['tokens']} tokens",
        "decode": f"One more token for each of a batch of {row['tokens']}",
    }[row["phase"]]
    text = (
        f"{what} of a {row['n_layer']}-layer d_model {row['d_model']} model at density "
        f"{density(row)} in {row['dtype']} takes {_number(row['step_ms'])} ms"
    )
    for other in alike:
        times = other["step_ms"] / row["step_ms"]
        speed = f"{times:.3g} times faster" if times >= 1 else f"{1 / times:.3g} times slower"
        text += f", {speed} than {other['variant']}" if other["variant"] != "sparse" else ""
    return f"{text}."


def _sweep(rows: Sequence[Row], part: str) -> tuple[list[Row], list[Row]]:
    """The sparse and the masked dense rows of a sweep, in its order."""
    key = _SWEEPS[part][0]
    chosen = sorted((r for r in rows if r.get("part") == part), key=lambda row: row[key])
    return (
        [row for row in chosen if row["variant"] == "sparse"],
        [row for row in chosen if row["variant"] != "sparse"],
    )


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """A step against L0 and against the width, log-log, into a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure = Figure(figsize=(11, 5.2), layout="constrained")
    good = [row for row in rows if row["correct"]]
    for axis, (part, (key, name)) in zip(figure.subplots(1, 2), _SWEEPS.items(), strict=True):
        ours, masked = _sweep(good, part)
        if not ours:
            continue
        x = [row[key] for row in ours]
        axis.plot(x, [row["step_ms"] for row in ours], "o-", color="C0", label="sparse, a step")
        for color, piece in enumerate(PARTS[:5], 2):
            times = [row["parts_ms"][piece] for row in ours]
            axis.plot(x, times, ".--", lw=0.9, color=f"C{color}", label=f"  its {piece}")
        # Masked dense takes as long at any density, so L0 has it once.
        theirs = masked if part == "width" else masked[:1] * len(ours)
        if theirs:
            times = [row["step_ms"] for row in theirs]
            axis.plot(x[: len(times)], times, "s-", color="C1", label="masked dense as released")
        axis.set(xscale="log", yscale="log", ylabel="ms", xlabel=f"{name} (density of the blocks)")
        for side in (axis.xaxis, axis.yaxis):
            side.set_minor_formatter(NullFormatter())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.grid(which="both", alpha=0.25, lw=0.5)
        axis.set_xticks(x, [f"{row[key]:.3g}\n{density(row)}" for row in ours], fontsize=8)
        fixed = f"d_model {ours[0]['d_model']}" if part == "l0" else f"L0 {ours[0]['l0']:,}"
        axis.set_title(f"as {key} grows at {fixed}", fontsize=10)
        axis.legend(fontsize=7)
    figure.suptitle(title, fontsize=8)
    figure.savefig(path, dpi=130, format="png")
