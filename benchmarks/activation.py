"""Times abs_topk, forward and backward, against torch.topk + scatter and the memory bound.

    python -m benchmarks.activation                  in about two minutes
    python -m benchmarks.activation --smoke          tiny shapes, in seconds
    python -m benchmarks.activation --device cuda    on a GPU, from a cold second-level cache

The baseline keeps the entries as users do: the indices of `x.abs().topk(k)`, gather, scatter into
zeros; with and without `sorted`, and the faster one counts. Its backward is autograd's. Correctness
comes first: a row whose call differs from the specification in one element, or from its gradient,
prints FAIL instead of a speed, and the exit status is 1.

The bound is the time to read and write each operand once at the bandwidth measured for that size.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import devices, report, roofline
from benchmarks.machine import Machine
from benchmarks.problems import CPU_DTYPES, DTYPES
from sparse_kernels import backends, cpu, reference
from sparse_kernels.activation import abs_topk
from sparse_kernels.layout import Problem

BUDGET_S = 1.5
SMOKE_BUDGET_S = 0.01
WIDTHS = (1024, 2048, 4096, 8192, 16384)
TOKENS = 2048
GPU_TOKENS = 16384


@dataclass(frozen=True)
class Goal:
    """The speed-up that the forward must reach at `(tokens, width)`, k = width / share."""

    tokens: int
    width: int
    share: int
    dtype: str
    speedup: float


GOALS = {
    "cpu": Goal(TOKENS, 8192, 4, "float32", 12.0),
    "cuda": Goal(GPU_TOKENS, 8192, 4, "bfloat16", 20.0),
}


@dataclass(frozen=True)
class Case:
    """`M` rows of `D` entries, of which `D / share` are kept."""

    tokens: int
    width: int
    share: int
    dtype: str

    @property
    def k(self) -> int:
        return self.width // self.share


def list_cases(*, smoke: bool, device: str = "cpu") -> list[Case]:
    """The cases to run."""
    many = TOKENS if device == "cpu" else GPU_TOKENS
    tokens, widths = (33, (64, 300)) if smoke else (many, WIDTHS)
    return [
        Case(tokens, width, share, dtype)
        for dtype in (CPU_DTYPES if device == "cpu" else DTYPES)
        for share in (4, 16)
        for width in widths
    ]


def torch_abs_topk(x: Tensor, k: int, *, is_sorted: bool) -> Tensor:
    """What users run in PyTorch."""
    index = x.abs().topk(k, sorted=is_sorted).indices
    return torch.zeros_like(x).scatter_(-1, index, x.gather(-1, index))


def measure_case(
    case: Case, machine: Machine, budget_s: float, repeats: int | None
) -> list[dict[str, Any]]:
    """The rows of a case: forward and backward."""
    generator = torch.Generator().manual_seed(case.width + case.share)
    shape = (case.tokens, case.width)
    x, grad = (
        torch.randn(shape, generator=generator).to(machine.name, DTYPES[case.dtype])
        for _ in range(2)
    )
    k = case.k
    leaf = x.clone().requires_grad_()
    ours = abs_topk(leaf, k)
    theirs = {
        name: torch_abs_topk(leaf, k, is_sorted=name == "sorted") for name in ("sorted", "unsorted")
    }
    want = reference.abs_topk(x, k)
    backend = backends.choose(Problem(machine.name, x.dtype, "abs_topk"))

    def gradient(y: Tensor) -> Tensor:
        return torch.autograd.grad(y, leaf, grad, retain_graph=True)[0]

    calls = {
        "forward": {
            "ours": lambda: abs_topk(x, k),
            "sorted": lambda: torch_abs_topk(x, k, is_sorted=True),
            "unsorted": lambda: torch_abs_topk(x, k, is_sorted=False),
        },
        "backward": {
            "ours": lambda: gradient(ours),
            "sorted": lambda: gradient(theirs["sorted"]),
            "unsorted": lambda: gradient(theirs["unsorted"]),
        },
    }
    rows = []
    for product, candidates in calls.items():
        truth = want if product == "forward" else reference.abs_topk_backward(grad, want)
        row = describe_row(case, product, machine.name, backend)
        row["error"] = int((candidates["ours"]() != truth).sum())
        row["correct"] = row["error"] == 0
        bound = machine.bound(count_work(case, product, x.element_size()), case.dtype)
        row["bound_ms"] = None if bound is None else bound.ms
        if row["correct"]:
            timings, row["timed"] = machine.interleave(
                candidates, budget_s=budget_s, repeats=repeats
            )
            best = min(("sorted", "unsorted"), key=lambda name: timings[name].median_ms)
            row |= {
                "time_ms": timings["ours"].median_ms,
                "spread_ms": timings["ours"].spread_ms,
                "samples": timings["ours"].samples,
                "torch_ms": timings[best].median_ms,
                "torch_kind": best,
                "torch_spread_ms": timings[best].spread_ms,
            }
        rows.append(row)
    return rows


def describe_row(case: Case, product: str, device: str, backend: str) -> dict[str, Any]:
    """A row with nothing measured yet; `error` counts the elements that differ."""
    measured = (
        "error", "time_ms", "spread_ms", "samples", "torch_ms", "torch_kind", "torch_spread_ms",
        "bound_ms", "timed",
    )  # fmt: skip
    return {
        "device": device,
        "dtype": case.dtype,
        "M": case.tokens,
        "D": case.width,
        "k": case.k,
        "product": f"abs_topk {product}",
        "backend": backend,
        "threads": torch.get_num_threads(),
        **dict.fromkeys(measured),
    }


def count_work(case: Case, product: str, element_bytes: int) -> roofline.Work:
    """Forward reads x and writes y; backward reads dY and Y and writes dX."""
    size = case.tokens * case.width * element_bytes
    return roofline.Work(
        flops=0,
        operand_bytes=0,
        read_bytes=size if product == "forward" else 2 * size,
        write_bytes=size,
    )


HEADER = (
    f"{'M':>5} {'D':>6} {'k':>5} {'dtype':<9} {'product':<18} {'differ':>7} {'ms':>9} {'spread':>8}"
    f" {'torch ms':>9} {'torch':<9} {'speed-up':>8} {'bound ms':>9} {'of bound':>8}"
)


def row_line(row: dict[str, Any]) -> str:
    """One line of the table."""
    start = (
        f"{row['M']:>5} {row['D']:>6} {row['k']:>5} {row['dtype']:<9} {row['product']:<18} "
        f"{row['error']:>7}"
    )
    if not row["correct"]:
        return start + "  FAIL"
    bound = row["bound_ms"]
    tail = "" if bound is None else f" {bound:>9.3f} {bound / row['time_ms']:>8.0%}"
    return (
        f"{start} {row['time_ms']:>9.3f} {row['spread_ms']:>8.3f} {row['torch_ms']:>9.2f} "
        f"{row['torch_kind']:<9} {row['torch_ms'] / row['time_ms']:>7.1f}x{tail}"
    )


def summary_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Whether the goal is met."""
    lines = []
    for row in rows:
        goal = GOALS[row["device"]]
        where = (row["M"], row["D"], row["k"], row["dtype"], row["product"])
        wanted = (goal.tokens, goal.width, goal.width // goal.share, goal.dtype, "abs_topk forward")
        if where == wanted and row["time_ms"] is not None:
            ratio = row["torch_ms"] / row["time_ms"]
            verdict = "met" if ratio >= goal.speedup else "MISSED"
            lines.append(
                f"goal: ({goal.tokens}, {goal.width}), k = D/{goal.share}, {goal.dtype}: "
                f"{ratio:.1f}x over torch.topk + scatter, wanted {goal.speedup:.0f}x: {verdict}"
            )
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; `arguments` are the words after the module's name."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.activation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, in seconds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--threads", type=int, help="torch.set_num_threads")
    parser.add_argument("--repeats", type=int, metavar="COUNT", help="samples of each call")
    parser.add_argument("--device", default="cpu", metavar="cpu|cuda", help="where (default: cpu)")
    options = parser.parse_args(words)
    for name in ("threads", "repeats"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    if options.json is not None:
        reason = report.why_not_writable(options.json)
        if reason is not None:
            parser.error(f"--json: {reason}")
    reason = devices.why_not(options.device)
    if reason is not None:
        parser.error(f"--device {options.device}: {reason}")
    if options.device == "cpu" and not cpu.isas():
        parser.error("the C++ extension is missing: build it with `pip install .`")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    machine = devices.connect(options.device)
    machine.prepare(smoke=options.smoke)
    description = machine.describe(["-m", "benchmarks.activation", *words])
    print(report.machine_line(description), "", HEADER, sep="\n", flush=True)
    rows: list[dict[str, Any]] = []
    for case in list_cases(smoke=options.smoke, device=options.device):
        budget_s = SMOKE_BUDGET_S if options.smoke else BUDGET_S
        case_rows = measure_case(case, machine, budget_s, options.repeats)
        rows += case_rows
        print(*map(row_line, case_rows), sep="\n", flush=True)
        if options.json is not None:
            report.write_json(options.json, description, rows, complete=False)
    if options.json is not None:
        report.write_json(options.json, description, rows, complete=True)
    print("", *summary_lines(rows), sep="\n", flush=True)
    return 0 if all(row["correct"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
