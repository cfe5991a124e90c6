"""Tables and closing sentences of benchmarks.training and benchmarks.inference."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import report
from benchmarks.report import Row, compare, number

_CALLS = {
    "train": "A training step",
    "prefill": "A prompt of {tokens} tokens",
    "decode": "One more token for each of a batch of {tokens}",
}
# Quartiles further apart than this share of the median: another process was in the way.
_DISTURBED = 0.2


def lines(rows: Sequence[Row], style: report.Style = "terminal") -> str:
    """A line for each row: the step and its memory."""
    made = []
    for row in rows:
        line = {name: row[name] for name in ("phase", "variant", "dtype", "d_model")}
        line |= {"density": density(row), "tokens": row["tokens"], "ms": f"FAIL: {row['failure']}"}
        if row["correct"]:
            ours = next((r for r in _alike(row, rows) if r["variant"] == "sparse"), row)
            faster = None if ours is row else row["step_ms"] / ours["step_ms"]
            line |= {"ms": number(row["step_ms"]), "iqr": number(row["spread_ms"])}
            line |= {"tokens/s": f"{row['tokens_per_s']:.0f}"}
            line |= {"sparse is faster by": report.ratio(faster)}
            line |= {"rewiring": number(row["rewiring_ms"])}
            line |= {"peak MB": number(row["peak_mb"])}
            line |= {"state MB": f"{row['state_mb']:.1f} + {row['bigram_mb']:.0f}"}
        made.append(line)
    return report.table(made, style)


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


def text(rows: Sequence[Row], style: report.Style = "terminal") -> str:
    """The tables of all parts, and the closing sentences."""
    parts = dict.fromkeys(row.get("part") for row in rows)
    tables = [lines([row for row in rows if row.get("part") == part], style) for part in parts]
    return "\n\n".join([*tables, "\n".join(closing(rows))])


def closing(rows: Sequence[Row]) -> list[str]:
    """What a person can repeat, and what to beware of."""
    good = [row for row in rows if row["correct"]]
    said = []
    for row in good:
        if row["variant"] == "sparse" and row.get("part") not in ("l0", "width"):
            model = f"{row['n_layer']}-layer d_model {row['d_model']} model"
            others = [
                f", {compare(other['step_ms'] / row['step_ms'], other['variant'])}"
                for other in _alike(row, good)
                if other is not row
            ]
            said.append(
                f"{_CALLS[row['phase']].format(**row)} of a {model} at density {density(row)} in "
                f"{row['dtype']} takes {number(row['step_ms'])} ms{''.join(others)}."
            )
    if len(good) < len(rows):
        said.append(f"{len(rows) - len(good)} rows FAILED: nothing is said about them.")
    if disturbed := [row for row in good if row["spread_ms"] > _DISTURBED * row["step_ms"]]:
        names = (f"{r['phase']} {r['variant']} {r['dtype']} {density(r)}" for r in disturbed)
        which = ", ".join(dict.fromkeys(names))
        said.append(f"Another process disturbed these, run again when it is idle: {which}.")
    return said
