"""Tables, closing sentences and the plot of benchmarks.training and benchmarks.inference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from benchmarks import report

Row = Mapping[str, Any]

PARTS = ("linears", "abs_topk", "attention", "rest", "optimizer", "topology")
# Columns that are empty where a row is not correct.
TIMED = (
    "step_ms", "tokens_per_s", "ordinary_ms", "rewiring_ms", "period", "spread_ms", "samples",
    "parts_ms", "state_mb", "bigram_mb", "loss",
)  # fmt: skip
_HEADINGS = (
    "phase", "variant", "dtype", "d_model", "density", "tokens", "ms", "iqr", "tokens/s",
    "sparse is faster by", "rewiring", *PARTS, "peak MB", "state MB",
)  # fmt: skip
# What grows in the other parts than the default one.
_SWEEPS = {"l0": ("l0", "nonzero weights"), "width": ("d_model", "d_model")}
_CALLS = {
    "train": "A training step",
    "prefill": "A prompt of {tokens} tokens",
    "decode": "One more token for each of a batch of {tokens}",
}
# Quartiles further apart than this share of the median: another process was in the way.
_DISTURBED = 0.2


def table(rows: Sequence[Row], style: Literal["terminal", "markdown"] = "terminal") -> str:
    """A line for each row: the step, its parts in milliseconds, its memory."""
    return report.table(_HEADINGS, [_cells(row, rows) for row in rows], style)


def _cells(row: Row, rows: Sequence[Row]) -> list[str]:
    names = ("phase", "variant", "dtype", "d_model")
    start = [*(str(row[name]) for name in names), density(row), str(row["tokens"])]
    if not row["correct"]:
        return [*start, f"FAIL: {row['failure']}", *[""] * (len(_HEADINGS) - len(start) - 1)]
    ours = [other for other in _alike(row, rows) if other["variant"] == "sparse"]
    faster = row["step_ms"] / ours[0]["step_ms"] if ours and row is not ours[0] else None
    return [
        *start,
        _number(row["step_ms"]),
        _number(row["spread_ms"]),
        f"{row['tokens_per_s']:.0f}",
        report.ratio(faster),
        _number(row["rewiring_ms"]),
        *(_number(row["parts_ms"].get(part)) for part in PARTS),
        _number(row["peak_mb"]),
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
    mark = "training" if any(row["phase"] == "train" for row in rows) else "inference"
    where = f"Measured on {report.machine_line(machine)}, {machine['date'][:10]}:"
    return {f"measured-{mark}": f"{where}\n\n    {machine['command']}\n\n{table(rows, 'markdown')}"}


def sentences(rows: Sequence[Row]) -> list[str]:
    """What a person can repeat, and what to beware of."""
    good = [row for row in rows if row["correct"]]
    lines = []
    for row in good:
        if row["variant"] == "sparse" and row.get("part") not in _SWEEPS:
            line = (
                f"{_CALLS[row['phase']].format(**row)} of a {row['n_layer']}-layer d_model "
                f"{row['d_model']} model at density {density(row)} in {row['dtype']} takes "
                f"{_number(row['step_ms'])} ms"
            )
            for other in _alike(row, good):
                times = other["step_ms"] / row["step_ms"]
                faster = (
                    f"{times:.3g} times faster" if times >= 1 else f"{1 / times:.3g} times slower"
                )
                line += f", {faster} than {other['variant']}" if other is not row else ""
            lines.append(f"{line}.")
    for part, (key, name) in _SWEEPS.items():
        if swept := [row for row in _sweep(good, part) if row["variant"] == "sparse"]:
            least, most = swept[0], swept[-1]
            times = most["step_ms"] / least["step_ms"]
            lines.append(
                f"From {least[key]:,} to {most[key]:,} {name}, the time of a sparse step grows "
                f"{times:.3g} times."
            )
    if len(good) < len(rows):
        lines.append(f"{len(rows) - len(good)} rows FAILED: nothing is said about them.")
    disturbed = [row for row in good if row["spread_ms"] > _DISTURBED * row["step_ms"]]
    if disturbed:
        names = (f"{r['phase']} {r['variant']} {r['dtype']} {density(r)}" for r in disturbed)
        which = ", ".join(dict.fromkeys(names))
        lines.append(f"Another process disturbed these, run again when it is idle: {which}.")
    return lines


def _sweep(rows: Sequence[Row], part: str) -> list[Row]:
    key = _SWEEPS[part][0]
    return sorted((row for row in rows if row.get("part") == part), key=lambda row: row[key])


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """A step against L0 and against the width, log-log, into a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.2), layout="constrained")
    good = [row for row in rows if row["correct"]]
    for axis, (part, (key, name)) in zip(figure.subplots(1, 2), _SWEEPS.items(), strict=True):
        swept = _sweep(good, part)
        ours = [row for row in swept if row["variant"] == "sparse"]
        masked = [row for row in swept if row["variant"] != "sparse"]
        x = [row[key] for row in ours]
        axis.plot(x, [row["step_ms"] for row in ours], "o-", label="sparse, a step")
        if part == "l0":
            # Masked dense takes as long at any density, so it is measured at one.
            masked = [{**masked[0]} | {key: value} for value in x if masked]
        points = [[row[name] for row in masked] for name in (key, "step_ms")]
        axis.plot(*points, "s-", label="masked dense as released")
        for piece in PARTS[:5]:
            times = [row["parts_ms"][piece] for row in ours]
            axis.plot(x, times, ".--", lw=0.9, label=f"  {piece} of sparse")
        axis.set(xscale="log", yscale="log", ylabel="ms", xlabel=f"{name} (density of the blocks)")
        axis.set_xticks(x, [f"{row[key]:,}\n{density(row)}" for row in ours], fontsize=7)
        axis.set_xticks([], minor=True)
        axis.grid(which="both", alpha=0.25, lw=0.5)
        axis.legend(fontsize=7)
    figure.suptitle(title, fontsize=8)
    figure.savefig(path, dpi=130, format="png")
