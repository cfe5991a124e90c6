"""Turns measured rows into what people read: the table, the goals, the plot, the README's section.

    python -m benchmarks.report FILE.json [--markdown] [--update-readme README.md] [--plot FILE.png]

A row is a dict as it stands in the JSON file; every ratio is computed here from its times.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TextIO

import torch

from benchmarks.problems import GPU_TARGETS, GPU_TOKENS, TARGET_TOKENS, TARGETS, layer_name
from benchmarks.roofline import geometric_mean

Row = Mapping[str, Any]

# What decides how fast such kernels run.
_FLAGS = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16",
    "avx512_fp16", "amx_tile", "amx_bf16", "asimd", "sve", "bf16", "hypervisor",
)  # fmt: skip
# Settings outside the program that change what is measured.
_ENVIRONMENT = ("OMP_", "MKL_", "KMP_", "GOMP_", "ONEDNN_", "DNNL_", "MALLOC_", "GLIBC_", "SPARSE_")
# The README's marks around what was measured: products on a device, or the transformer.
MARKS = {
    "cpu": ("<!-- measured:begin -->", "<!-- measured:end -->"),
    "cuda": ("<!-- measured-cuda:begin -->", "<!-- measured-cuda:end -->"),
    "training": ("<!-- measured-training:begin -->", "<!-- measured-training:end -->"),
    "inference": ("<!-- measured-inference:begin -->", "<!-- measured-inference:end -->"),
}
# The least speed-ups of a step in float32, 1x1: over masked dense, over the best dense.
GOALS = {
    (1024, 1024, 64): (12.0, 2.5),
    (1024, 4096, 32): (25.0, 5.0),
    (4096, 1024, 128): (20.0, 4.0),
    (2048, 8192, 8): (100.0, 20.0),
}

# Over dense cuBLAS in bfloat16, 16384 tokens, on an H200.
GPU_GOALS = {
    (4096, 4096, 4, (1, 1)): {"forward": 6.0, "step": 4.0},
    (2048, 8192, 8, (1, 1)): {"forward": 3.0, "step": 2.0},
    (4096, 4096, 416, (32, 32)): {"forward": 3.0, "step": 2.5},
    (4096, 4096, 256, (64, 64)): {"forward": 6.0, "step": 5.0},
    (8192, 8192, 896, (128, 128)): {"forward": 5.0, "step": 5.0},
}


# --- the machine -------------------------------------------------------------------------------


def describe_machine(
    command: Sequence[str], *, isa: str | None, ceilings: Mapping[str, object] | None
) -> dict[str, Any]:
    """What a reader needs to judge or repeat the numbers; unknown things are None.

    Args:
        command: the words after `python`, as given.
        isa: the instruction set of our kernels.
        ceilings: the measured peaks, or None.
    """
    cpu = _cpu_info()
    return {
        "cpu": cpu.get("model name") or cpu.get("Model") or platform.processor() or None,
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "flags": sorted(set((cpu.get("flags") or cpu.get("Features") or "").split()) & set(_FLAGS)),
        "memory_gib": _memory_gib(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "isa": isa,
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(_ENVIRONMENT) or name == "LD_PRELOAD"
        },
        "commit": commit(),
        "command": shlex.join(["python", *command]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "ceilings": ceilings,
    }


def _cpu_info() -> dict[str, str]:
    """The first processor of /proc/cpuinfo, or the little that macOS says."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        found = output_of("sysctl", "-n", "machdep.cpu.brand_string")
        return {"model name": found} if found else {}
    pairs = (line.partition(":") for line in lines)
    return {name.strip(): value.strip() for name, _, value in pairs}


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def version_of(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def output_of(*command: str) -> str | None:
    """What a command prints, without the space around it; None if it fails or is not there."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=20, cwd=Path(__file__).parent
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> str | None:
    """The commit that these files are from, with "-dirty" if files differ.

    Outside git what BENCHMARK_COMMIT says, as for a copy on another machine; else None.
    """
    commit = output_of("git", "rev-parse", "--short=12", "HEAD")
    changes = output_of("git", "status", "--porcelain", "--untracked-files=no")
    if commit is None:
        return os.environ.get("BENCHMARK_COMMIT")
    return commit + ("-dirty" if changes else "")


def machine_line(machine: Mapping[str, Any]) -> str:
    """The machine in one line of prose."""
    gpu = machine.get("gpu")
    if gpu is not None:
        return (
            f"{gpu['name']} ({gpu['memory_gib']} GiB, {gpu['multiprocessors']} multiprocessors, "
            f"driver {gpu['driver']}), CUDA {gpu['cuda']}, torch {machine['torch']}, "
            f"Triton {gpu['triton']}, Python {machine['python']}, commit {machine['commit']}"
        )
    return (
        f"{machine['cpu'] or machine['architecture']}, {machine['threads']} of {machine['cores']} "
        f"cores, {machine['isa'] or 'no C++ extension'}, torch {machine['torch']}, "
        f"Python {machine['python']}, {machine['os']}, commit {machine['commit']}"
    )


# --- files -------------------------------------------------------------------------------------


def why_not_writable(path: Path) -> str | None:
    """None if a file can be written at `path`, else a sentence; found before anything is run."""
    if path.is_dir():
        return f"{path} is a directory"
    folder = path.parent
    if not folder.is_dir():
        return f"the folder {folder} does not exist"
    if not os.access(path if path.exists() else folder, os.W_OK):
        return f"{path} is not writable"
    return None


def why_no_plot(path: Path) -> str | None:
    """None if a plot can be drawn into `path`, else a sentence."""
    if path.suffix.lower() != ".png":
        return f"the plot is a PNG, and {path.name} does not end in .png"
    if importlib.util.find_spec("matplotlib") is None:
        return "it needs matplotlib, which is not installed: pip install matplotlib"
    return why_not_writable(path)


def write_json(
    path: Path, machine: Mapping[str, Any], rows: Sequence[Row], *, complete: bool, **extra: object
) -> None:
    """Writes the result file, with `extra` beside the rows; a reader never sees half of one."""
    content = {"complete": complete, "machine": machine, **extra, "rows": rows}
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    partial.replace(path)


# --- the progress line -------------------------------------------------------------------------


class Progress:
    """A bar on stderr while it is a terminal; one plain line for each step where it is not."""

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        self._total = total
        self._done = 0
        self._stream = sys.stderr if stream is None else stream
        self._is_terminal = self._stream.isatty()

    def show(self, text: str) -> None:
        """Says what is being done now."""
        if self._is_terminal:
            filled = 24 * self._done // max(1, self._total)
            bar = "#" * filled + "." * (24 - filled)
            self._stream.write(f"\r\x1b[K[{bar}] {self._done}/{self._total} {text}")
        else:
            self._stream.write(f"[{self._done + 1}/{self._total}] {text}\n")
        self._stream.flush()

    def advance(self) -> None:
        """One step is done."""
        self._done += 1

    def clear(self) -> None:
        """Takes the bar away, so that lines can be printed above it."""
        if self._is_terminal:
            self._stream.write("\r\x1b[K")
            self._stream.flush()


# --- the table ---------------------------------------------------------------------------------


def speedup(row: Row, baseline: str) -> float | None:
    """How many times faster than `row[baseline]` it was; None if that was not measured."""
    return row[baseline] / row["time_ms"] if row.get(baseline) is not None else None


def fraction(row: Row) -> float | None:
    """The fraction of the roofline bound that was reached; None without a bound."""
    return row["bound_ms"] / row["time_ms"] if row.get("bound_ms") is not None else None


def _times(ratio: float | None) -> str:
    if ratio is None:
        return "-"
    return (
        f"{ratio:.0f}x" if ratio >= 99.5 else f"{ratio:.1f}x" if ratio >= 9.95 else f"{ratio:.2f}x"
    )


def _milliseconds(value: float) -> str:
    return f"{value:.1f}" if value >= 99.95 else f"{value:.2f}" if value >= 1 else f"{value:.4f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}%"


@dataclass(frozen=True)
class _Column:
    """One column of the table; what it says of a row, which is empty where the row is wrong."""

    heading: str
    width: int
    align: str
    cell: Callable[[Row], str]


def _ratio(heading: str, baseline: str, width: int = 7) -> _Column:
    return _Column(heading, width, ">", lambda row: _times(speedup(row, baseline)))


_CASE = (
    _Column("dtype", 8, "<", lambda row: row["dtype"]),
    _Column("block", 7, "<", lambda row: row["block"]),
    _Column("fan_in", 6, ">", lambda row: str(row["fan_in"])),
    _Column("density", 7, ">", lambda row: f"{row['density']:.3%}"),
)
_PRODUCT = _Column("product", 11, "<", lambda row: row["product"])
_MEASURED = (
    _Column("ms", 8, ">", lambda row: _milliseconds(row["time_ms"])),
    _Column("+-iqr", 7, ">", lambda row: _milliseconds(row["spread_ms"])),
    _ratio("masked", "masked_dense_ms"),
)
_ERRORS = (
    _Column("error", 7, ">", lambda row: f"{row['error']:.0e}"),
    _Column("torch's", 7, ">", lambda row: f"{row['torch_error']:.0e}"),
)
_BOUND = _Column("bound", 5, ">", lambda row: _percent(fraction(row)))
_BEST = (
    _ratio("best", "best_dense_ms"),
    _Column("best dense", 14, "<", lambda row: row["best_dense_kind"]),
)
_SPEEDS = {
    "cpu": (
        *_MEASURED,
        _ratio("dense", "dense_ms"),
        *_BEST,
        _ratio("fp32", "best_fp32_dense_ms"),
        _ratio("CSR", "torch_csr_ms", 6),
        _BOUND,
    ),
    "cuda": (
        *_MEASURED,
        _ratio("compil.", "compiled_masked_ms"),
        _ratio("dense", "dense_ms"),
        *_BEST,
        _ratio("CSR", "torch_csr_ms", 6),
        _ratio("BSR", "torch_bsr_ms", 6),
        _BOUND,
    ),
}
_LEGENDS = {
    "cpu": (
        "  best   = the fastest dense of this process  fp32  = the fastest that multiplies in fp32",
        "  CSR    = torch's sparse CSR",
    ),
    "cuda": (
        "  compil. = masked dense, compiled and tuned  best  = the fastest dense in any precision",
        "  CSR, BSR = torch's sparse matrices; every call starts from a cold second-level cache",
    ),
}


def _line(columns: Iterable[_Column], cells: Iterable[str]) -> str:
    pairs = zip(cells, columns, strict=True)
    return " ".join(f"{cell:{column.align}{column.width}}" for cell, column in pairs).rstrip()


def table_header(device: str) -> list[str]:
    """What the columns mean, and their headings."""
    columns = (*_CASE, _PRODUCT, *_SPEEDS[device], *_ERRORS)
    heading = _line(columns, (column.heading for column in columns))
    return [
        "ms: median and interquartile range. Then how many times faster ours is than",
        "  masked = masked dense as users run it     dense = torch's dense in the same dtype",
        *_LEGENDS[device],
        "bound: fraction of the roofline bound that is reached. error: against float64, relative",
        "to the largest element, beside that of torch's own dense product in the same dtype.",
        "",
        heading,
        "-" * len(heading),
    ]


def group_line(row: Row) -> str:
    """The heading of the cases that share a shape."""
    name = layer_name(row["K"], row["N"])
    return f"M={row['M']} K={row['K']} N={row['N']}" + (f"  ({name})" if name else "")


def table_lines(rows: Sequence[Row]) -> list[str]:
    """The lines of one case: its three products and the step."""
    return [_row_line(row, is_first=position == 0) for position, row in enumerate(rows)]


def _row_line(row: Row, *, is_first: bool) -> str:
    speeds = _SPEEDS[row["device"]]
    cells = [column.cell(row) if is_first else "" for column in _CASE]
    cells.append(row["product"])
    if row["correct"]:
        cells += [column.cell(row) for column in speeds]
    else:
        cells += ["FAIL", *[""] * (len(speeds) - 1)]
    cells += [column.cell(row) for column in _ERRORS]
    return _line((*_CASE, _PRODUCT, *speeds, *_ERRORS), cells)


# --- the summary -------------------------------------------------------------------------------


def _steps(rows: Iterable[Row], **wanted: object) -> list[Row]:
    return [
        row
        for row in rows
        if row["product"] == "step"
        and row["correct"]
        and all(row[name] == value for name, value in wanted.items())
    ]


def _goal(name: str, got: float, goal: float) -> str:
    verdict = "reached" if got >= goal else "missed"
    return f"  {name:<72} {_times(got):>6}   goal {_times(goal):>6}   {verdict}"


def summary_lines(rows: Sequence[Row]) -> list[str]:
    """Fractions of the bound, and each goal beside what was measured."""
    lines = []
    if any(row.get("bf16_dense_note") for row in rows):
        lines = [
            "",
            "torch's bfloat16 dense product would take seconds here: not timed in those cases",
        ]
    lines += [
        "",
        "Fraction of the roofline bound, geometric mean over forward, grad_input, grad_weight",
    ]
    single = [
        r for r in rows if r["product"] != "step" and r["correct"] and fraction(r) is not None
    ]
    if any((fraction(row) or 0.0) > 1.05 for row in single):
        lines += [
            "  (over 100% somewhere: another process was in the way when the machine was measured.",
            "  The bounds are wrong; run again when it is idle.)",
        ]
    most = max((row["M"] for row in single), default=0)
    many = [row for row in single if row["M"] == most]
    for label, chosen in (
        (f"M = {most}", many),
        ("  of these 1x1 blocks", [row for row in many if row["block"] == "1x1"]),
        ("  of these larger blocks", [row for row in many if row["block"] != "1x1"]),
        ("all M", single),
    ):
        if chosen:
            mean = geometric_mean(fraction(row) or math.nan for row in chosen)
            lines.append(f"  {label:<30} {100 * mean:5.1f}%  ({len(chosen)} rows)")
    if not single:
        lines.append("  no row has a bound: the machine's peaks were not measured")
    goals = [*_dense_goals(rows), *_relative_goals(rows), *_thread_goals(rows), *_gpu_goals(rows)]
    if goals:
        lines += [
            "",
            f"Goals (a step is the three products; M = {most} unless it says otherwise)",
            *goals,
        ]
    return lines


def _gpu_goals(rows: Sequence[Row]) -> list[str]:
    lines = []
    for (*shape, block), goals in GPU_GOALS.items():
        sizes = dict(zip(("K", "N", "fan_in"), shape, strict=True))
        name = "K={} N={} fan_in={} bf16 ".format(*shape) + f"{block[0]}x{block[1]}"
        where = {"M": GPU_TOKENS, "dtype": "bfloat16", "device": "cuda", **sizes}
        for row in rows:
            goal = goals.get(row["product"])
            if goal is None or row["block"] != f"{block[0]}x{block[1]}" or not row["correct"]:
                continue
            ratio = speedup(row, "dense_ms")
            if ratio is not None and all(row[key] == value for key, value in where.items()):
                lines.append(_goal(f"{name} {row['product']} over cuBLAS", ratio, goal))
    return lines


def _dense_goals(rows: Sequence[Row]) -> list[str]:
    lines = []
    for shape, (over_masked, over_best) in GOALS.items():
        where = dict(zip(("K", "N", "fan_in"), shape, strict=True))
        name = "K={} N={} fan_in={} fp32".format(*shape)
        for row in _steps(rows, **where, M=TARGET_TOKENS, block="1x1", dtype="float32"):
            masked, best = speedup(row, "masked_dense_ms"), speedup(row, "best_dense_ms")
            fp32 = speedup(row, "best_fp32_dense_ms")
            if masked is not None:
                lines.append(_goal(f"{name} over masked dense", masked, over_masked))
            if best is not None:
                kind = row["best_dense_kind"]
                lines.append(_goal(f"{name} over the best dense ({kind})", best, over_best))
            if fp32 is not None and fp32 != best:
                kind = row["best_fp32_dense_kind"]
                lines.append(_goal(f"{name} over the best fp32 dense ({kind})", fp32, over_best))
    return lines


def _relative_goals(rows: Sequence[Row]) -> list[str]:
    """Goals that compare two cases of ours, and the one at a single token."""
    lines = []
    for shape in TARGETS:
        where = {**dict(zip(("K", "N", "fan_in"), shape, strict=True)), "M": TARGET_TOKENS}
        fp32 = _steps(rows, **where, block="1x1", dtype="float32")
        bf16 = _steps(rows, **where, block="1x1", dtype="bfloat16")
        if fp32 and bf16:
            name = "K={} N={} fan_in={} bf16 over our fp32".format(*shape)
            lines.append(_goal(name, fp32[0]["time_ms"] / bf16[0]["time_ms"], 1.3))
    for shared in _steps(rows, M=TARGET_TOKENS, fan_in=128, block="16x1"):
        where = {name: shared[name] for name in ("K", "N", "fan_in", "M", "dtype")}
        for alone in _steps(rows, **where, block="1x1"):
            name = (
                f"K={shared['K']} N={shared['N']} fan_in=128 {shared['dtype']} 16x1 blocks over 1x1"
            )
            lines.append(_goal(name, alone["time_ms"] / shared["time_ms"], 1.8))
    for row in rows:
        decodes = (row["K"], row["N"], row["fan_in"], row["M"]) == (2048, 8192, 8, 1)
        ratio = speedup(row, "dense_ms")
        if decodes and row["product"] == "forward" and row["correct"] and ratio is not None:
            name = f"M=1 K=2048 N=8192 fan_in=8 {row['dtype']} forward over dense"
            lines.append(_goal(name, ratio, 20.0))
    return lines


def _thread_goals(rows: Sequence[Row]) -> list[str]:
    return [
        _goal(
            f"K={row['K']} N={row['N']} fan_in={row['fan_in']} {row['dtype']} "
            f"{row['threads']} threads over 1",
            row["one_thread_ms"] / row["time_ms"],
            0.85 * row["threads"],
        )
        for row in _steps(rows)
        if row.get("one_thread_ms") is not None
    ]


# --- the plot ----------------------------------------------------------------------------------


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """Speed-up of a step against density, log-log, one line per block, into a PNG.

    Left over masked dense, right over the best dense in the process. A line joins the geometric
    means of the cases of one block and dtype at each density; dots are the cases. The largest M of
    the rows is drawn.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, NullFormatter

    steps = _steps(rows)
    tokens = max((row["M"] for row in steps), default=TARGET_TOKENS)
    steps = [row for row in steps if row["M"] == tokens]
    blocks = sorted({row["block"] for row in steps}, key=lambda b: [int(n) for n in b.split("x")])
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.8), sharex=True, layout="constrained")
    for axis, (baseline, label) in zip(
        axes,
        (("masked_dense_ms", "masked dense"), ("best_dense_ms", "the best dense in the process")),
        strict=True,
    ):
        for color, block in enumerate(blocks):
            for dtype, style in (("float32", "-"), ("bfloat16", "--"), ("float16", ":")):
                points: dict[float, list[float]] = {}
                for row in steps:
                    ratio = speedup(row, baseline)
                    if (row["block"], row["dtype"]) == (block, dtype) and ratio is not None:
                        points.setdefault(row["density"], []).append(ratio)
                if not points:
                    continue
                densities = sorted(points)
                means = [geometric_mean(points[density]) for density in densities]
                name = f"{block} {dtype}"
                axis.plot(densities, means, style, color=f"C{color}", marker="o", ms=4, label=name)
                dots = [(d, ratio) for d in densities for ratio in points[d] if len(points[d]) > 1]
                axis.scatter(
                    *zip(*dots, strict=True), s=9, color=f"C{color}", alpha=0.4
                ) if dots else None
        axis.axhline(1, color="gray", lw=1, ls=":")
        axis.set(xscale="log", yscale="log", xlabel="density (kept weights / all weights)")
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


# --- the README --------------------------------------------------------------------------------


def markdown(content: Mapping[str, Any]) -> str:
    """The README's measured table: a line for each case with a promised speed, a block or M = 1."""
    machine, rows = content["machine"], content["rows"]
    device = device_of(rows)
    columns = _README_COLUMNS[device]
    lines = [
        f"Measured on {machine_line(machine)}, {machine['date'][:10]}:",
        "",
        f"    {machine['command']}",
        "",
        *_markdown_table(
            columns,
            [
                [column.cell(products) for column in columns]
                for products in _cases(rows)
                if products["step"]["headline"] and products["step"]["correct"]
            ],
        ),
    ]
    return "\n".join(lines) + "\n"


def not_measured() -> str:
    """The GPU's table of the README while no GPU was to be had: the cases, and nothing measured."""
    wanted = ("M", "K, N, fan_in", "block", "dtype", "forward over cuBLAS", "step over cuBLAS")
    columns = [column for column in _README_COLUMNS["cuda"] if column.heading in wanted]
    lines = [
        [
            str(GPU_TOKENS),
            f"{in_features}, {out_features}, {fan_in}",
            f"{block[0]}x{block[1]}",
            "bfloat16",
            "not measured",
            "not measured",
        ]
        for in_features, out_features, fan_in, block in GPU_TARGETS
    ]
    return "\n".join(_markdown_table(columns, lines)) + "\n"


def device_of(rows: Sequence[Row]) -> str:
    """The device that the rows were measured on; "cpu" if there are none."""
    return str(rows[0]["device"]) if rows else "cpu"


def _markdown_table(columns: Sequence[_ReadmeColumn], lines: Iterable[Sequence[str]]) -> list[str]:
    rows = [[column.heading for column in columns], ["---"] * len(columns), *lines]
    return ["| " + " | ".join(cells) + " |" for cells in rows]


def _cases(rows: Sequence[Row]) -> list[dict[str, Row]]:
    """The rows of each case, by product."""
    same = ("M", "K", "N", "fan_in", "block", "dtype")
    cases: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        cases.setdefault(tuple(row[name] for name in same), {})[row["product"]] = row
    return list(cases.values())


@dataclass(frozen=True)
class _ReadmeColumn:
    """One column of the README's table; what it says of the rows of a case, by product."""

    heading: str
    cell: Callable[[Mapping[str, Row]], str]


def _step_ratio(heading: str, baseline: str, product: str = "step") -> _ReadmeColumn:
    return _ReadmeColumn(heading, lambda rows: _times(speedup(rows[product], baseline)))


_README_START = (
    _ReadmeColumn("M", lambda rows: str(rows["step"]["M"])),
    _ReadmeColumn("K, N, fan_in", lambda rows: "{K}, {N}, {fan_in}".format(**rows["step"])),
    _ReadmeColumn("block", lambda rows: rows["step"]["block"]),
    _ReadmeColumn("dtype", lambda rows: rows["step"]["dtype"]),
    _ReadmeColumn("forward", lambda rows: _milliseconds(rows["forward"]["time_ms"])),
    _ReadmeColumn("grad_input", lambda rows: _milliseconds(rows["grad_input"]["time_ms"])),
    _ReadmeColumn("grad_weight", lambda rows: _milliseconds(rows["grad_weight"]["time_ms"])),
    _ReadmeColumn("step, ms", lambda rows: _milliseconds(rows["step"]["time_ms"])),
)
_OF_THE_BOUND = _ReadmeColumn("of the bound", lambda rows: _percent(fraction(rows["step"])))
_README_COLUMNS = {
    "cpu": (
        *_README_START,
        _step_ratio("over masked dense", "masked_dense_ms"),
        _step_ratio("over dense", "dense_ms"),
        _ReadmeColumn(
            "over the best dense",
            lambda rows: (
                _times(speedup(rows["step"], "best_dense_ms"))
                + f" ({rows['step']['best_dense_kind']})"
            ),
        ),
        _step_ratio("over the best fp32 dense", "best_fp32_dense_ms"),
        _step_ratio("over torch CSR", "torch_csr_ms"),
        _OF_THE_BOUND,
    ),
    "cuda": (
        *_README_START,
        _step_ratio("forward over cuBLAS", "dense_ms", "forward"),
        _step_ratio("step over cuBLAS", "dense_ms"),
        _step_ratio("over masked dense", "masked_dense_ms"),
        _step_ratio("over compiled masked dense", "compiled_masked_ms"),
        _step_ratio("over torch CSR", "torch_csr_ms"),
        _step_ratio("over torch BSR", "torch_bsr_ms"),
        _OF_THE_BOUND,
    ),
}


def update_readme(path: Path, table: str, device: str) -> None:
    """Replaces what stands between two marks in the file; `device` is a key of MARKS.

    Raises:
        ValueError: the file does not have each mark once, in order.
    """
    begin, end = MARKS[device]
    text = path.read_text()
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end or begin in rest:
        raise ValueError(f"{path} must have one {begin} and, after it, one {end}")
    path.write_text(f"{before}{begin}\n{table}{end}{after}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads a result file and prints it, or writes what the options name."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("file", type=Path, help="a file that benchmarks.matmul --json wrote")
    parser.add_argument("--markdown", action="store_true", help="print the README's table")
    parser.add_argument("--update-readme", "--readme", type=Path, metavar="README.md")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    options = parser.parse_args(arguments)
    try:
        content = json.loads(options.file.read_text())
    except (OSError, ValueError) as error:
        parser.error(f"cannot read {options.file}: {error}")
    if not isinstance(content, dict) or not {"machine", "rows"} <= content.keys():
        parser.error(f"{options.file} is not a result file: it needs machine and rows")
    if options.plot is not None:
        reason = why_no_plot(options.plot)
        if reason is not None:
            parser.error(f"--plot: {reason}")
        draw(content["rows"], options.plot, machine_line(content["machine"]))
    if options.update_readme is not None:
        try:
            update_readme(options.update_readme, markdown(content), device_of(content["rows"]))
        except (OSError, ValueError) as error:
            parser.error(f"--update-readme: {error}")
    if options.markdown:
        print(markdown(content), end="")
    elif options.plot is None and options.update_readme is None:
        print("\n".join([machine_line(content["machine"]), "", *full_table(content["rows"])]))
    return 0


def full_table(rows: Sequence[Row]) -> list[str]:
    """The whole table with its headings, and the summary."""
    lines = table_header(rows[0]["device"]) if rows else []
    group = ""
    for start in range(0, len(rows), 4):
        case = rows[start : start + 4]
        if group_line(case[0]) != group:
            group = group_line(case[0])
            lines += ["", group]
        lines += table_lines(case)
    return [*lines, *summary_lines(rows)]


if __name__ == "__main__":
    sys.exit(main())
