"""Times abs_topk, forward and backward, against torch.topk + scatter and the memory bound.

    python -m benchmarks.activation                  in about two minutes
    python -m benchmarks.activation --smoke          tiny shapes, in seconds
    python -m benchmarks.activation --device cuda    on a GPU, from a cold second-level cache

The baseline is what users write: the indices of `x.abs().topk(k)`, gather, scatter into zeros; with
and without `sorted`, and the faster one counts. Its backward is autograd's. A row whose call
differs from the specification in one element, or from its gradient, prints FAIL instead of a speed.

The bound is the time to read and write each operand once at the bandwidth measured for that size.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from benchmarks import devices, report, roofline
from benchmarks import run as runner
from benchmarks.cases import CPU_DTYPES, DTYPES
from benchmarks.devices import Device
from benchmarks.timing import Budget
from sparse_kernels import abs_topk, backends, cpu, reference
from sparse_kernels.layout import Problem

PROGRAM = "python -m benchmarks.activation"
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

    def __str__(self) -> str:
        return f"M={self.tokens} D={self.width} k={self.k} {self.dtype}"


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
    """The usual way in PyTorch."""
    index = x.abs().topk(k, sorted=is_sorted).indices
    return torch.zeros_like(x).scatter_(-1, index, x.gather(-1, index))


def measure_case(case: Case, device: Device, budget: Budget) -> list[dict[str, Any]]:
    """The rows of a case: forward and backward."""
    generator = torch.Generator().manual_seed(case.width + case.share)
    shape = (case.tokens, case.width)
    x, grad = (
        torch.randn(shape, generator=generator).to(device.name, DTYPES[case.dtype])
        for _ in range(2)
    )
    k = case.k
    leaf = x.clone().requires_grad_()
    ours = abs_topk(leaf, k)
    theirs = {
        name: torch_abs_topk(leaf, k, is_sorted=name == "sorted") for name in ("sorted", "unsorted")
    }
    want = reference.abs_topk(x, k)
    backend = backends.choose(Problem(device.name, x.dtype, "abs_topk"))

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
        row = describe_row(case, product, device.name, backend)
        row["error"] = int((candidates["ours"]() != truth).sum())
        row["correct"] = row["error"] == 0
        bound = device.bound(count_work(case, product, x.element_size()), case.dtype)
        row["bound_ms"] = None if bound is None else bound.ms
        if row["correct"]:
            timings, row["timed"] = device.interleave(candidates, budget)
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


def case_line(rows: Sequence[report.Row]) -> str:
    """The rows of a case in one line, as they are measured."""
    said = [f"M={rows[0]['M']} D={rows[0]['D']} k={rows[0]['k']} {rows[0]['dtype']}"]
    for row in rows:
        if not row["correct"]:
            said.append(f"{row['product']} FAIL: {row['error']} elements differ")
            continue
        bound = row["bound_ms"]
        said.append(
            f"{row['product']} {report.milliseconds(row['time_ms'])} ms, "
            f"{report.ratio(row['torch_ms'] / row['time_ms'])} over torch ({row['torch_kind']}), "
            f"{report.percent(None if bound is None else bound / row['time_ms'])} of the bound"
        )
    return "  ".join(said)


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


@dataclass(frozen=True)
class Options:
    """Options of the command line."""

    smoke: bool = False
    """Tiny shapes, in seconds."""
    json: Path | None = None
    """Write the rows to this file."""
    threads: int | None = None
    """torch.set_num_threads."""
    repeats: int | None = None
    """Samples of each call, in place of a time budget."""
    device: str = "cpu"
    """cpu or cuda."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; `arguments` are the words after the module's name."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = tyro.cli(Options, prog=PROGRAM, description=__doc__, args=words)
    for name in ("threads", "repeats"):
        value = getattr(options, name)
        if value is not None and value < 1:
            report.refuse(PROGRAM, f"--{name} needs a positive whole number, got {value}")
    if options.json is not None and (reason := report.why_not_writable(options.json)):
        report.refuse(PROGRAM, f"--json: {reason}")
    if reason := devices.why_not(options.device):
        report.refuse(PROGRAM, f"--device {options.device}: {reason}")
    if options.device == "cpu" and not cpu.isas():
        report.refuse(PROGRAM, "the C++ extension is missing: build it with `pip install .`")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = devices.connect(options.device)
    budget = Budget(SMOKE_BUDGET_S if options.smoke else BUDGET_S, options.repeats)

    def measure(case: Case) -> list[dict[str, Any]]:
        # The backward needs the graph that the runner's no_grad would not record.
        with torch.enable_grad():
            return measure_case(case, device, budget)

    outcome = runner.run(
        list_cases(smoke=options.smoke, device=options.device),
        measure,
        case_line,
        device,
        command=["-m", "benchmarks.activation", *words],
        smoke=options.smoke,
        json=options.json,
    )
    print("", *summary_lines(outcome.rows), sep="\n")
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
