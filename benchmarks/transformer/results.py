"""Tables, goals and the plot of benchmarks.training and benchmarks.inference, and their options."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import devices, report
from benchmarks.transformer.parts import PARTS
from sparse_kernels import cpu

Row = Mapping[str, Any]

# Columns that are empty where a row is not correct.
TIMED = (
    "step_ms", "tokens_per_s", "ordinary_ms", "rewiring_ms", "period", "spread_ms", "samples",
    "samples_ms", "parts_ms", "instrumented_ms", "state_mb", "bigram_mb", "patterns_mb", "loss",
)  # fmt: skip
# Densities of the goals of the default case: over masked dense as released, state memory.
_DEFAULT_GOALS = {64: (7.0, 20.0), 256: (9.0, 60.0)}
_BF16_GOAL = 4.0
_WIDTH_GOAL, _L0_GOAL = 2.2, 2.0
_DECODE_GOAL = 10.0
# Quartiles further apart than this share of the median: another process was in the way.
_DISTURBED = 0.2


# --- the command line --------------------------------------------------------------------------


def parser(module: str, description: str) -> argparse.ArgumentParser:
    """The options that both benchmarks have."""
    made = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--smoke", action="store_true", help="tiny, in seconds")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    made.add_argument("--threads", type=int, metavar="COUNT", help="torch.set_num_threads")
    made.add_argument("--device", default="cpu", metavar="cpu|cuda", help="where (default: cpu)")
    made.add_argument(
        "--from", dest="source", type=Path, metavar="FILE", help="show it, measure nothing"
    )
    made.add_argument(
        "--update-readme", type=Path, metavar="README.md", help="with --from: fill its table"
    )
    return made


def refuse(made: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the program with a sentence if the options cannot be followed; else sets the threads."""
    for name in ("threads", "tokens"):
        value = getattr(options, name, None)
        if value is not None and value < 1:
            made.error(f"--{name} must be at least 1, got {value}")
    if options.json is not None:
        reason = report.why_not_writable(options.json)
        if reason is not None:
            made.error(f"--json: {reason}")
    if getattr(options, "plot", None) is not None:
        reason = report.why_no_plot(options.plot)
        if reason is not None:
            made.error(f"--plot: {reason}")
    if options.update_readme is not None and options.source is None:
        made.error("--update-readme needs --from FILE: the table comes from a result file")
    if options.source is not None:
        reason = _why_no_results(options.source)
        if reason is not None:
            made.error(f"--from: {reason}")
        return
    reason = devices.why_not(options.device)
    if reason is not None:
        made.error(f"--device {options.device}: {reason}")
    if options.device == "cpu" and not cpu.isas():
        made.error("the C++ extension is missing: build it with `pip install .`")
    if options.threads is not None:
        torch.set_num_threads(options.threads)


def _why_no_results(path: Path) -> str | None:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        return f"cannot read {path}: {error}"
    if not isinstance(content, dict) or not {"machine", "rows"} <= content.keys():
        return f"{path} is not a result file: it needs machine and rows"
    if not all({"phase", "variant", "step_ms"} <= row.keys() for row in content["rows"]):
        return f"{path} is the result of another benchmark: its rows need phase, variant, step_ms"
    return None


def describe_machine(device: str, command: Sequence[str]) -> dict[str, Any]:
    """What a reader needs to judge or repeat the numbers."""
    return devices.connect(device).describe(command)


# --- the table ---------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> list[str]:
    """A line for each row: the step, its parts in milliseconds, its memory."""
    heading = (
        f"{'phase':<8}{'variant':<22}{'dtype':<10}{'d_model':>7} {'density':>8} {'tokens':>6} "
        f"{'ms':>9} {'+-iqr':>7} {'tokens/s':>9} {'rewiring':>9} "
        + " ".join(f"{name:>9}" for name in PARTS)
        + f" {'peak MB':>8} {'state MB':>9}"
    )
    return [heading, "-" * len(heading), *map(_line, rows)]


def _line(row: Row) -> str:
    start = (
        f"{row['phase']:<8}{row['variant']:<22}{row['dtype']:<10}{row['d_model']:>7} "
        f"{_density(row):>8} {row['tokens']:>6} "
    )
    if not row["correct"]:
        return f"{start}FAIL: {row['failure']}"
    parts = row["parts_ms"] or {}
    return (
        f"{start}{row['step_ms']:>9.2f} {row['spread_ms']:>7.2f} {row['tokens_per_s']:>9.0f} "
        f"{_number(row.get('rewiring_ms')):>9} "
        + " ".join(f"{_number(parts.get(name)):>9}" for name in PARTS)
        + f" {_number(row['peak_mb'], 0):>8} {_number(row['state_mb']):>9}"
    )


def _density(row: Row) -> str:
    return "1" if row["variant"] == "dense" else f"1/{1 / row['density']:.4g}"


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


# --- the goals ---------------------------------------------------------------------------------


def goals(rows: Sequence[Row]) -> list[str]:
    """Each goal that these rows can answer beside what was measured."""
    good = [row for row in rows if row["correct"]]
    lines = [
        *_step_goals([row for row in good if row.get("part") == "default"]),
        *_width_goals([row for row in good if row.get("part") == "width"]),
        *_l0_goals([row for row in good if row.get("part") == "l0"]),
        *_decode_goals([row for row in good if row["phase"] == "decode"]),
    ]
    failed = len(rows) - len(good)
    ending = [f"  {failed} rows FAILED: nothing is said about them"] if failed else []
    disturbed = [r for r in good if r.get("spread_ms", 0) > _DISTURBED * r.get("step_ms", 0)]
    if disturbed:
        names = ", ".join(f"{r['variant']} {r['dtype']} {_density(r)}" for r in disturbed)
        ending.append(f"  (another process was in the way, run again when it is idle: {names})")
    return ["Goals", *lines, *ending] if lines or ending else ["No goal was measured"]


# What the goal over masked dense in bfloat16 may mean.
_BF16_RIVALS = {
    "masked_dense_abs_topk": "over masked dense in bf16 with our abs_topk",
    "masked_dense_kernel": "over that with the fastest projection as well",
}


def find(rows: Iterable[Row], **wanted: object) -> Row | None:
    """The first row with these values."""
    return next((row for row in rows if all(row[k] == v for k, v in wanted.items())), None)


def _at_least(name: str, got: float, goal: float) -> str:
    verdict = "reached" if got >= goal else "missed"
    return f"  {name:<76} {got:>6.2f}x   goal {goal:>5.1f}x   {verdict}"


def _at_most(name: str, got: float, goal: float) -> str:
    verdict = "reached" if got <= goal else "missed"
    return f"  {name:<76} {got:>6.2f}x   goal <={goal:>4.1f}x   {verdict}"


def _step_goals(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in rows:
        if (row["variant"], row["dtype"]) != ("sparse", "float32"):
            continue
        inverse = round(1 / row["density"])
        same = {name: row[name] for name in ("density", "d_model", "tokens")}
        released = find(rows, variant="masked_dense", dtype="float32", **same)
        where = f"d_model {row['d_model']}, 1/{inverse}"
        over_released, smaller = _DEFAULT_GOALS.get(inverse, (None, None))
        if released is not None and over_released is not None and smaller is not None:
            ratio = released["step_ms"] / row["step_ms"]
            lines.append(
                _at_least(f"{where}: step over masked dense as released", ratio, over_released)
            )
            ratio = released["state_mb"] / row["state_mb"]
            lines.append(_at_least(f"{where}: state of masked dense over ours", ratio, smaller))
        if inverse == 64:
            half = find(rows, variant="sparse", dtype="bfloat16", **same)
            for variant, name in _BF16_RIVALS.items():
                rival = find(rows, variant=variant, dtype="bfloat16", **same)
                for dtype, ours in (("fp32", row), ("bf16", half)):
                    if rival is not None and ours is not None:
                        ratio = rival["step_ms"] / ours["step_ms"]
                        lines.append(_at_least(f"{where}: {dtype} step {name}", ratio, _BF16_GOAL))
    return lines


def _width_goals(rows: Sequence[Row]) -> list[str]:
    chosen = sorted((r for r in rows if r["variant"] == "sparse"), key=lambda row: row["d_model"])
    return [
        _at_most(
            f"step, d_model {wide['d_model']} over {narrow['d_model']} at L0 {wide['l0']:,}",
            wide["step_ms"] / narrow["step_ms"],
            _WIDTH_GOAL,
        )
        for narrow, wide in itertools.pairwise(chosen)
        if wide["d_model"] == 2 * narrow["d_model"]
    ]


def _l0_goals(rows: Sequence[Row]) -> list[str]:
    chosen = sorted((r for r in rows if r["variant"] == "sparse"), key=lambda row: row["density"])
    return [
        _at_most(
            f"linears, density 1/{1 / more['density']:.4g} over 1/{1 / less['density']:.4g}",
            more["parts_ms"]["linears"] / less["parts_ms"]["linears"],
            _L0_GOAL,
        )
        for less, more in itertools.pairwise(chosen)
        if more["density"] == 2 * less["density"]
    ]


def _decode_goals(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in rows:
        if row["variant"] != "sparse" or row["tokens"] != 1:
            continue
        masked = find(rows, variant="masked_dense", dtype=row["dtype"], tokens=1)
        if masked is not None:
            name = (
                f"decode, batch 1, d_model {row['d_model']}, {row['dtype']}: tokens/s over masked"
            )
            ratio = row["tokens_per_s"] / masked["tokens_per_s"]
            lines.append(_at_least(name, ratio, _DECODE_GOAL))
    return lines


# --- the README --------------------------------------------------------------------------------


def markdown(content: Mapping[str, Any]) -> str:
    """The README's table: the default case of a training, or every row of an inference."""
    machine = content["machine"]
    rows = [r for r in content["rows"] if r["correct"] and r.get("part", "default") == "default"]
    lines = [
        f"Measured on {report.machine_line(machine)}, {machine['date'][:10]}:",
        "",
        f"    {machine['command']}",
        "",
    ]
    lines += _training_table(rows) if rows and rows[0]["phase"] == "train" else _table(rows)
    return "\n".join(lines) + "\n"


def _training_table(rows: Sequence[Row]) -> list[str]:
    columns = (
        "density", "variant", "dtype", "step, ms", "tokens/s", "sparse is faster by", "linears",
        "abs_topk", "attention", "the rest", "optimizer", "topology", "peak MB", "state MB",
    )  # fmt: skip
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        ours = find(rows, variant="sparse", dtype=row["dtype"], density=row["density"])
        parts = row["parts_ms"] or {}
        cells = [
            _density(row),
            row["variant"],
            row["dtype"],
            f"{row['step_ms']:.0f}",
            f"{row['tokens_per_s']:.0f}",
            "" if ours is None or ours is row else f"{row['step_ms'] / ours['step_ms']:.1f}x",
            *(_number(parts.get(name), 0) for name in PARTS),
            _number(row["peak_mb"], 0),
            f"{row['state_mb']:.0f} + {row['bigram_mb']:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _table(rows: Sequence[Row]) -> list[str]:
    columns = (
        "phase", "tokens a call", "variant", "dtype", "ms", "tokens/s", "sparse is faster by",
        "linears", "abs_topk", "attention", "the rest", "peak MB", "weights MB",
    )  # fmt: skip
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        same = {name: row[name] for name in ("phase", "tokens", "dtype")}
        ours = find(rows, variant="sparse", **same)
        parts = row["parts_ms"] or {}
        cells = [
            row["phase"],
            str(row["tokens"]),
            row["variant"],
            row["dtype"],
            f"{row['step_ms']:.2f}",
            f"{row['tokens_per_s']:.0f}",
            "" if ours is None or ours is row else f"{row['step_ms'] / ours['step_ms']:.1f}x",
            *(_number(parts.get(name)) for name in PARTS[:4]),
            _number(row["peak_mb"], 0),
            f"{row['state_mb']:.1f} + {row['bigram_mb']:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


# --- the plot ----------------------------------------------------------------------------------


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """A step against L0 and against the width, log-log, into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 5.2), layout="constrained")
    l0 = [row for row in rows if row.get("part") == "l0" and row["correct"]]
    width = [row for row in rows if row.get("part") == "width" and row["correct"]]
    for axis, chosen, key in ((axes[0], l0, "l0"), (axes[1], width, "d_model")):
        ours = sorted((r for r in chosen if r["variant"] == "sparse"), key=lambda row: row[key])
        masked = sorted((r for r in chosen if r["variant"] != "sparse"), key=lambda row: row[key])
        if not ours:
            continue
        x = [row[key] for row in ours]
        axis.plot(x, [row["step_ms"] for row in ours], "o-", color="C0", label="sparse, a step")
        for color, name in enumerate(("linears", "abs_topk", "attention", "rest", "optimizer"), 2):
            times = [row["parts_ms"][name] for row in ours]
            label = "the rest" if name == "rest" else name
            axis.plot(x, times, ".--", lw=0.9, color=f"C{color}", label=f"  of it {label}")
        label = "masked dense as released"
        if key == "l0" and masked:
            # It takes as long at any density.
            axis.axhline(masked[0]["step_ms"], color="C1", label=label)
        elif masked:
            points = [row["step_ms"] for row in masked]
            axis.plot([row[key] for row in masked], points, "s-", color="C1", label=label)
        axis.set(xscale="log", yscale="log", ylabel="ms")
        for side in (axis.xaxis, axis.yaxis):
            side.set_minor_formatter(NullFormatter())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.grid(which="both", alpha=0.25, lw=0.5)
        axis.set_xticks(x, [_tick(row, key) for row in ours], fontsize=8)
    if l0:
        axes[0].set_title(f"as L0 grows, d_model {l0[0]['d_model']}", fontsize=10)
        axes[0].set_xlabel("nonzero weights (density of the blocks)")
    if width:
        axes[1].set_title(f"as the width grows, L0 {_millions(width[0]['l0'])}", fontsize=10)
        axes[1].set_xlabel("d_model (density of the blocks)")
    drawn = [axis for axis, chosen in zip(axes, (l0, width), strict=True) if chosen]
    if drawn:
        handles, labels = drawn[-1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(title, fontsize=8)
    figure.savefig(path, dpi=130, format="png")
    pyplot.close(figure)


def _tick(row: Row, key: str) -> str:
    name = _millions(row["l0"]) if key == "l0" else str(row["d_model"])
    return f"{name}\n{_density(row)}"


def _millions(count: int) -> str:
    return f"{count / 1e6:.3g}M" if count >= 1e5 else f"{count / 1e3:.3g}k"
