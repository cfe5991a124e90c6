"""Finds the density at which a sparse step takes as long as a dense one.

    python -m benchmarks.break_even                  every block and dtype, in some minutes
    python -m benchmarks.break_even --smoke          everything once, on tiny shapes, in seconds
    python -m benchmarks.break_even --device cuda    on the GPU

A step is forward, grad_input and grad_weight, each of which takes turns with torch's dense product
in the same dtype: what `to_dense()` would give. Correctness comes first, as in benchmarks.matmul. A
density is measured again if its dense products show that the machine was busy.
The results belong in the table of sparse_kernels/break_even.py.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import baselines, devices, problems, report
from benchmarks.baselines import Operands
from benchmarks.machine import Machine
from benchmarks.problems import PRODUCTS, Case
from sparse_kernels import backends, break_even

BLOCKS = {
    "cpu": ((1, 1), (4, 1), (16, 1), (16, 16), (32, 32)),
    "cuda": ((1, 1), (4, 1), (16, 1), (16, 16), (32, 32), (64, 64), (128, 128)),
}
# K = N and M. A GPU is not full with less.
SIZES = {"cpu": (1024, 2048), "cuda": (4096, 16384)}
DTYPES = {"cpu": problems.CPU_DTYPES, "cuda": tuple(problems.DTYPES)}
SMOKE_FEATURES, SMOKE_TOKENS = 64, 33
# Densities from 1/64 to 1, so many times as large each time.
LOWEST_INVERSE = 64
FACTOR, SMOKE_FACTOR = math.sqrt(2), 4.0
# Seconds of measuring for each product at each density, once everything is warm.
BUDGET_S = 0.5
SMOKE_BUDGET_S = 0.005
# The dense products are the same at each density. Where they took this much longer than usual the
# machine was busy, and the density is measured again, so many times in all.
DISTURBED = 1.2
ATTEMPTS = 4
INTERRUPTED = 130


def fan_ins(in_features: int, block_in: int, factor: float) -> list[int]:
    """The fan-ins to measure, ascending: multiples of `block_in` near the wanted densities."""
    steps = round(math.log(LOWEST_INVERSE, factor))
    wanted = (in_features * factor**-step for step in range(steps + 1))
    return sorted({max(1, round(fan_in / block_in)) * block_in for fan_in in wanted})


def find(points: Sequence[tuple[float, float]]) -> tuple[float | None, str]:
    """The break-even density, and how it was found.

    Args:
        points: `(density, sparse time / dense time)`, ascending in density.

    Returns:
        Where the line between two neighbouring points, in logarithms, crosses 1, and "crossed".
        Where it does so several times the last counts: dense was as fast at each density measured
        above. Else None with "never" if sparse is faster at the highest density, or "at once" if
        dense is as fast at every one.
    """
    if points[-1][1] < 1:
        return None, "never"
    above = len(points) - 1
    while above > 0 and points[above - 1][1] >= 1:
        above -= 1
    if above == 0:
        return None, "at once"
    (d0, r0), (d1, r1) = ((math.log(d), math.log(r)) for d, r in points[above - 1 : above + 1])
    return math.exp(d0 + (d1 - d0) * -r0 / (r1 - r0)), "crossed"


def summarize(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A result for each block and dtype whose rows are all correct; `density` to three digits."""
    groups: dict[tuple[str, str, str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        key = (row["device"], row["family"], row["dtype"], row["block"])
        groups.setdefault(key, []).append(row)
    results = []
    for (device, family, dtype, block), group in groups.items():
        if not all(row["correct"] for row in group):
            continue
        points = [(row["density"], row["time_ms"] / row["dense_ms"]) for row in group]
        density, found = find(points)
        results.append(
            {
                "device": device,
                "family": family,
                "dtype": dtype,
                "block": block,
                "density": None if density is None else float(f"{density:.3g}"),
                "found": found,
                "lowest": points[0][0],
                "highest": points[-1][0],
            }
        )
    return results


def disturbed(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """Which rows to measure again: their dense products took longer than those of the others."""
    times: dict[str, list[float]] = {}
    for row in rows:
        if row["correct"]:
            times.setdefault(row["dtype"], []).append(row["dense_ms"])
    usual = {dtype: statistics.median(several) for dtype, several in times.items()}
    return [
        number
        for number, row in enumerate(rows)
        if row["correct"] and row["dense_ms"] > DISTURBED * usual[row["dtype"]]
    ]


def measure_point(
    case: Case, machine: Machine, *, budget_s: float, repeats: int | None
) -> dict[str, Any]:
    """Checks the three products of a case, then times each in turns with the dense one."""
    operands = Operands.draw(case, device=machine.name)
    layout = operands.problem.layout
    backend = backends.choose(backends.problem_of(operands.x, layout, "forward"))
    row: dict[str, Any] = {
        "device": machine.name,
        "family": break_even.family(operands.x.device),
        "dtype": case.dtype,
        "M": case.tokens,
        "K": case.in_features,
        "N": case.out_features,
        "fan_in": case.fan_in,
        "block": case.block_name,
        "density": case.density,
        "product": "step",
        "backend": backend,
    }
    ours = {product: baselines.ours(operands, product, backend) for product in PRODUCTS}
    accuracies = [baselines.check(operands, product, call) for product, call in ours.items()]
    row["error"] = max(accuracy.error for accuracy in accuracies)
    row["torch_error"] = max(accuracy.torch_error for accuracy in accuracies)
    row["correct"] = all(accuracy.is_good for accuracy in accuracies)
    if not row["correct"]:
        return row
    products: dict[str, dict[str, Any]] = {}
    for product, call in ours.items():
        dense = baselines.dense(operands, product, case.torch_dtype)
        timings, timed = machine.interleave(
            {"sparse": call, "dense": dense}, budget_s=budget_s, repeats=repeats
        )
        sparse, other = timings["sparse"], timings["dense"]
        products[product] = {
            "time_ms": sparse.median_ms,
            "spread_ms": sparse.spread_ms,
            "samples": sparse.samples,
            "dense_ms": other.median_ms,
            "dense_spread_ms": other.spread_ms,
            "dense_samples": other.samples,
            "timed": timed,
        }
    for name in ("time_ms", "dense_ms"):
        row[name] = sum(times[name] for times in products.values())
    for name in ("spread_ms", "dense_spread_ms"):
        row[name] = math.hypot(*(times[name] for times in products.values()))
    return row | {"products": products}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.break_even",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [f"{block_out}x{block_in}" for block_out, block_in in BLOCKS["cuda"]]
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, in seconds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows and results there")
    parser.add_argument("--device", default="cpu", metavar="cpu|cuda", help="where (default: cpu)")
    parser.add_argument("--block", choices=names, help="one block only")
    parser.add_argument("--dtype", choices=sorted(problems.DTYPES), help="one dtype only")
    parser.add_argument("--threads", type=parse_positive, help="torch.set_num_threads")
    parser.add_argument(
        "--repeats",
        type=parse_positive,
        metavar="COUNT",
        help="samples of each call (default: what fits a time budget)",
    )
    return parser


def parse_positive(text: str) -> int:
    """A positive int."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"needs a positive whole number, got {text!r}")
    return int(text)


def build_cases(options: argparse.Namespace) -> list[Case]:
    """Every density of every block and dtype that the options leave."""
    (features, tokens), factor = SIZES[options.device], FACTOR
    if options.smoke:
        features, tokens, factor = SMOKE_FEATURES, SMOKE_TOKENS, SMOKE_FACTOR
    cases = [
        Case(tokens, features, features, fan_in, block, dtype)
        for dtype in DTYPES[options.device]
        for block in BLOCKS[options.device]
        if max(block) <= features
        for fan_in in fan_ins(features, block[1], factor)
    ]
    return [
        case
        for case in cases
        if options.block in (None, case.block_name) and options.dtype in (None, case.dtype)
    ]


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[Case]:
    """The cases to run. Ends the program with a message if an option cannot be met."""
    if options.json is not None:
        reason = report.why_not_writable(options.json)
        if reason is not None:
            parser.error(f"--json: {reason}")
    reason = devices.why_not(options.device)
    if reason is not None:
        parser.error(f"--device {options.device}: {reason}")
    cases = build_cases(options)
    if not cases:
        parser.error(f"no case is left: on {options.device} --block and --dtype exclude all")
    for case in cases:
        geometry = (case.out_features, case.in_features, case.fan_in, case.block)
        problem = backends.Problem(options.device, case.torch_dtype, "forward", *geometry)
        try:
            backends.choose(problem)
        except RuntimeError as error:
            parser.error(str(error))
    return cases


def table_line(row: Mapping[str, Any]) -> str:
    """A measured point for people to read."""
    start = f"{row['dtype']:9} {row['block']:6} {row['fan_in']:6} {row['density']:8.4f}"
    if not row["correct"]:
        return f"{start}  FAIL: error {row['error']:.1e}, torch's {row['torch_error']:.1e}"
    ratio = row["time_ms"] / row["dense_ms"]
    return f"{start} {row['time_ms']:9.3f} {row['dense_ms']:9.3f} {ratio:8.3f}"


def result_line(result: Mapping[str, Any]) -> str:
    """A result for people to read."""
    density, lowest = result["density"], result["lowest"]
    said = {
        "crossed": f"{density}",
        "never": f"none: sparse is faster up to density {result['highest']:g}",
        "at once": f"none: dense is as fast from density {lowest:g}, the lowest measured",
    }
    return f"{result['dtype']:9} {result['block']:6} {said[result['found']]}"


def run(options: argparse.Namespace, cases: Sequence[Case], command: Sequence[str]) -> int:
    """Measures the cases, prints as it goes, and returns the exit status."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    machine = devices.connect(options.device)
    machine.prepare(smoke=options.smoke)
    description = machine.describe(command)
    rows: list[dict[str, Any]] = []

    def save(*, complete: bool) -> None:
        if options.json is not None:
            results = summarize(rows) if complete else []
            report.write_json(options.json, description, rows, complete=complete, results=results)

    def measure(progress: report.Progress, case: Case) -> dict[str, Any]:
        progress.show(str(case))
        budget_s = SMOKE_BUDGET_S if options.smoke else BUDGET_S
        with torch.no_grad():
            row = measure_point(case, machine, budget_s=budget_s, repeats=options.repeats)
        progress.advance()
        progress.clear()
        print(table_line(row), flush=True)
        return row

    heading = f"{'dtype':9} {'block':6} fan_in  density sparse ms  dense ms    ratio"
    print(report.machine_line(description), "", heading, sep="\n", flush=True)
    progress = report.Progress(len(cases))
    try:
        for case in cases:
            rows.append({**measure(progress, case), "attempts": 1})
            save(complete=False)
        for attempt in range(2, ATTEMPTS + 1):
            again = disturbed(rows)
            if not again:
                break
            print(f"\nthe machine was busy: {len(again)} densities again", flush=True)
            progress = report.Progress(len(again))
            for number in again:
                row = measure(progress, cases[number])
                # The quieter of the two, told by the dense products alone.
                if not row["correct"] or row["dense_ms"] < rows[number]["dense_ms"]:
                    rows[number] = row
                rows[number]["attempts"] = attempt
    except KeyboardInterrupt:
        progress.clear()
        save(complete=False)
        print(f"\ninterrupted after {len(rows)} of {len(cases)} densities", flush=True)
        return INTERRUPTED
    save(complete=True)
    print("\nbreak-even density", *map(result_line, summarize(rows)), sep="\n", flush=True)
    busy = len(disturbed(rows))
    if busy:
        print(f"\nthe machine was busy at {busy} of {len(rows)} densities, {ATTEMPTS} times each")
    wrong = sum(not row["correct"] for row in rows)
    if wrong:
        print(f"\n{wrong} of {len(rows)} rows are WRONG: see FAIL above", flush=True)
    return 1 if wrong else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; `arguments` are the words after the module's name."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = build_parser()
    options = parser.parse_args(words)
    cases = check_options(parser, options)
    return run(options, cases, ["-m", "benchmarks.break_even", *words])


if __name__ == "__main__":
    sys.exit(main())
