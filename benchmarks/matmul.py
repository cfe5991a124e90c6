"""Times the three products of the sparse matmul against every dense way, CSR and the roofline.

    python -m benchmarks.matmul                      the cases that matter, in some minutes
    python -m benchmarks.matmul --smoke              everything once, on tiny shapes, in seconds
    python -m benchmarks.matmul --full               every layer of every published width; hours
    python -m benchmarks.matmul --filter 2048,8192   one matrix only

Each row is one product of one case, or `step`, the sum of the three. Correctness comes first: the
call is compared with float64, beside torch's own product in the same dtype, and a row that is wrong
prints FAIL instead of a speed and makes the exit status 1. Ctrl-C ends the run and keeps the rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import sparse_kernels as sk
from benchmarks import baselines, problems, report, roofline, timing
from benchmarks.baselines import Operands
from benchmarks.problems import PRODUCTS, Case
from benchmarks.timing import Candidate, Timing
from sparse_kernels import cpu

# Seconds of measuring for each product of a case, once everything is warm.
BUDGET_S = 0.6
SMOKE_BUDGET_S = 0.01
# A dense way that is this much slower than the fastest when it is warm cannot be the best one.
HOPELESS = 2.0
INTERRUPTED = 130


def measure_case(
    case: Case,
    backend: str,
    ceilings: roofline.Ceilings | None,
    *,
    budget_s: float,
    repeats: int | None,
) -> list[dict[str, Any]]:
    """The four rows of a case: forward, grad_input, grad_weight and step."""
    operands = Operands.draw(case)
    rows = [
        measure_product(operands, product, backend, ceilings, budget_s=budget_s, repeats=repeats)
        for product in PRODUCTS
    ]
    return [*rows, sum_rows(rows)]


def measure_product(
    operands: Operands,
    product: str,
    backend: str,
    ceilings: roofline.Ceilings | None,
    *,
    budget_s: float,
    repeats: int | None,
) -> dict[str, Any]:
    """Checks one product, then times it in turns with its baselines."""
    case = operands.case
    ours = baselines.ours(operands, product, backend)
    accuracy = baselines.check(operands, product, ours)
    row = describe_row(case, product, backend)
    row |= {
        "error": accuracy.error,
        "torch_error": accuracy.torch_error,
        "correct": accuracy.is_good,
        "checked": accuracy.checked,
    }
    if ceilings is not None:
        work = count_work(operands, product)
        bound = roofline.bound(work, ceilings, is_bf16=case.dtype == "bfloat16")
        row |= {"bound_ms": bound.ms, "bound_limit": bound.limit, "peak_bound_ms": bound.peak_ms}
    if not accuracy.is_good:
        return row
    why_no_bf16 = baselines.why_no_bf16_dense(operands, product)
    dense = baselines.dense_candidates(operands, product, bf16=why_no_bf16 is None)
    why_no_csr = baselines.why_no_csr(case)
    csr = baselines.csr_candidates(operands, product) if why_no_csr is None else {}
    is_bf16 = case.dtype == "bfloat16"
    masked = {"masked": baselines.masked_dense(operands, product)}
    if is_bf16 and why_no_bf16:
        masked = {}
    alone = {}
    if case.is_target and not is_bf16 and torch.get_num_threads() > 1:
        alone = {"one thread": baselines.on_one_thread(ours)}
    # Not next to ours, which would find its operands in the caches.
    everything = {"ours": ours, **masked, **alone, **dense, **csr}
    estimates = timing.estimate_s(everything)
    same_dtype = "torch bf16" if is_bf16 else "torch fp32"
    kept = {
        "ours",
        "masked",
        "one thread",
        same_dtype,
        *_contenders(dense, estimates),
        *_fastest(csr, estimates),
    }
    timings = timing.interleave(
        {name: call for name, call in everything.items() if name in kept},
        budget_s=budget_s,
        repeats=repeats,
        estimates=estimates,
    )
    row |= _best("best_dense", {name: timings[name] for name in dense if name in kept})
    fp32 = {name: timings[name] for name in dense if name in kept and name.endswith(" fp32")}
    row |= _best("best_fp32_dense", fp32)
    row |= {
        "time_ms": timings["ours"].median_ms,
        "spread_ms": timings["ours"].spread_ms,
        "samples": timings["ours"].samples,
        "one_thread_ms": timings["one thread"].median_ms if alone else None,
        "masked_dense_ms": timings["masked"].median_ms if masked else None,
        "dense_ms": timings[same_dtype].median_ms if same_dtype in timings else None,
        "bf16_dense_note": why_no_bf16,
        "torch_csr_ms": next((timings[name].median_ms for name in csr if name in kept), None),
        "torch_csr_note": why_no_csr,
        "baselines": {
            name: {"time_ms": t.median_ms, "spread_ms": t.spread_ms, "samples": t.samples}
            for name, t in timings.items()
            if name not in ("ours", "one thread")
        },
    }
    return row


def _contenders(dense: Mapping[str, Candidate], estimates: Mapping[str, float]) -> set[str]:
    """The dense ways that may turn out the best, or the best of those in fp32."""
    fastest = min(estimates[name] for name in dense)
    fastest_fp32 = min(estimates[name] for name in dense if name.endswith(" fp32"))
    return {
        name
        for name in dense
        if estimates[name] <= HOPELESS * fastest
        or (name.endswith(" fp32") and estimates[name] <= HOPELESS * fastest_fp32)
    }


def _fastest(candidates: Mapping[str, Candidate], estimates: Mapping[str, float]) -> set[str]:
    return {min(candidates, key=lambda name: estimates[name])} if candidates else set()


def _best(prefix: str, timings: Mapping[str, Timing]) -> dict[str, Any]:
    name = min(timings, key=lambda name: timings[name].median_ms)
    return {f"{prefix}_ms": timings[name].median_ms, f"{prefix}_kind": name}


def describe_row(case: Case, product: str, backend: str) -> dict[str, Any]:
    """A row with nothing measured yet."""
    is_decode = case.tokens == 1 and (case.in_features, case.out_features) == (2048, 8192)
    measured = (
        "time_ms", "spread_ms", "samples", "masked_dense_ms", "dense_ms", "best_dense_ms",
        "best_dense_kind", "best_fp32_dense_ms", "best_fp32_dense_kind", "torch_csr_ms",
        "torch_csr_note", "bf16_dense_note", "bound_ms", "bound_limit", "peak_bound_ms",
        "one_thread_ms", "error", "torch_error",
    )  # fmt: skip
    return {
        "device": "cpu",
        "dtype": case.dtype,
        "M": case.tokens,
        "K": case.in_features,
        "N": case.out_features,
        "fan_in": case.fan_in,
        "block": case.block_name,
        "density": case.density,
        "product": product,
        "backend": backend,
        **dict.fromkeys(measured),
        "threads": torch.get_num_threads(),
        "headline": case.is_target or is_decode or case.fan_in == 128,
    }


def count_work(operands: Operands, product: str) -> roofline.Work:
    """The work of one product of a case."""
    case = operands.case
    return roofline.count_work(
        product,
        tokens=case.tokens,
        in_features=case.in_features,
        out_features=case.out_features,
        fan_in=case.fan_in,
        block=case.block,
        element_bytes=operands.x.element_size(),
        used_in_features=operands.used_in_features,
    )


def sum_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The `step` row: times and bounds added up, spreads as independent, errors the largest."""
    step = dict(rows[0])
    step["product"] = "step"
    for name in (
        "time_ms", "masked_dense_ms", "dense_ms", "best_dense_ms", "best_fp32_dense_ms",
        "torch_csr_ms", "bound_ms", "peak_bound_ms", "one_thread_ms",
    ):  # fmt: skip
        parts = [row[name] for row in rows]
        step[name] = None if None in parts else sum(parts)
    spreads = [row["spread_ms"] for row in rows]
    step["spread_ms"] = None if None in spreads else sum(s * s for s in spreads) ** 0.5
    for name in ("best_dense_kind", "best_fp32_dense_kind", "bound_limit"):
        kinds = list(dict.fromkeys(row[name] for row in rows))
        step[name] = None if None in kinds else kinds[0] if len(kinds) == 1 else "mixed"
    step["error"] = max(row["error"] for row in rows)
    step["torch_error"] = max(row["torch_error"] for row in rows)
    step["correct"] = all(row["correct"] for row in rows)
    step["samples"] = None if None in spreads else min(row["samples"] for row in rows)
    step["checked"] = "; ".join(dict.fromkeys(row["checked"] for row in rows))
    step.pop("baselines", None)
    return step


def parse_block(text: str) -> tuple[int, int]:
    """`16x1` -> (16, 1)."""
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"a block looks like 16x1, got {text!r}")
    return int(parts[0]), int(parts[1])


def parse_shape(text: str) -> tuple[int, ...]:
    """`K,N` or `K,N,fan_in`."""
    parts = text.split(",")
    if len(parts) not in (2, 3) or not all(part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"a shape looks like K,N or K,N,fan_in, got {text!r}")
    return tuple(int(part) for part in parts)


def parse_positive(text: str) -> int:
    """A positive int."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"needs a positive whole number, got {text!r}")
    return int(text)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.matmul",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--smoke", action="store_true", help="tiny shapes, in seconds")
    size.add_argument("--full", action="store_true", help="every published shape; hours")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="speed-up against density")
    parser.add_argument("--filter", type=parse_shape, metavar="K,N[,fan_in]", help="one shape only")
    parser.add_argument("--tokens", type=parse_positive, metavar="M", help="one M only")
    parser.add_argument("--block", type=parse_block, metavar="OUTxIN", help="one block only")
    parser.add_argument("--dtype", choices=sorted(problems.DTYPES), help="one dtype only")
    parser.add_argument("--threads", type=parse_positive, help="torch.set_num_threads")
    parser.add_argument(
        "--repeats",
        type=parse_positive,
        metavar="COUNT",
        help="samples of each call (default: what fits a time budget, at least 5, or 3 if slow)",
    )
    parser.add_argument("--device", default="cpu", help="only cpu in this release")
    parser.add_argument("--backend", default="cpu", help="which backend is ours (default: cpu)")
    return parser


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[Case]:
    """The cases to run. Ends the program with a message if an option cannot be met."""
    if options.device != "cpu":
        parser.error(f"--device must be cpu, got {options.device!r}: this release has CPU kernels")
    if options.json is not None:
        reason = report.why_not_writable(options.json)
        if reason is not None:
            parser.error(f"--json: {reason}")
    if options.plot is not None:
        reason = report.why_no_plot(options.plot)
        if reason is not None:
            parser.error(f"--plot: {reason}")
    layout = sk.FanInLayout.random(1, 1, 1)
    backends = dict(sk.available_backends(torch.empty(1, 1), layout))
    if options.backend not in backends:
        parser.error(f"--backend must be one of {', '.join(backends)}, got {options.backend!r}")
    reason = backends[options.backend]
    if reason is not None:
        parser.error(f"the backend {options.backend} cannot run here: {reason}")
    build: Callable[[], list[Case]] = problems.default_cases
    if options.smoke:
        build = problems.smoke_cases
    elif options.full:
        build = problems.full_cases
    cases = problems.select(
        build(),
        shape=options.filter,
        tokens=options.tokens,
        block=options.block,
        dtype=options.dtype,
    )
    if not cases:
        parser.error("no case is left: --filter, --tokens, --block and --dtype exclude all of them")
    return cases


def run(options: argparse.Namespace, cases: Sequence[Case], command: Sequence[str]) -> int:
    """Measures the cases, prints as it goes, and returns the exit status."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    isa = cpu.isa() if options.backend == "cpu" else None
    progress = report.Progress(len(cases))
    rows: list[dict[str, Any]] = []
    machine = report.describe_machine(command, isa=isa, ceilings=None)
    # For every candidate alike: otherwise each large result starts with page faults, which can take
    # longer than the product.
    machine["keeps_freed_memory"] = cpu.keep_freed_memory()

    def save(*, complete: bool) -> None:
        if options.json is not None:
            report.write_json(options.json, machine, rows, complete=complete)

    interrupted = False
    group = ""
    print(report.machine_line(machine), "", *report.table_header(), sep="\n", flush=True)
    try:
        progress.show("measuring what the machine can do")
        ceilings = None
        if isa is not None:
            sizes = roofline.SMOKE_SIZES if options.smoke else roofline.SIZES
            ceilings = roofline.measure(isa, torch.get_num_threads(), sizes)
            machine["ceilings"] = None if ceilings is None else ceilings.as_dict()
        for case in cases:
            progress.show(str(case))
            with torch.no_grad():
                case_rows = measure_case(
                    case,
                    options.backend,
                    ceilings,
                    budget_s=SMOKE_BUDGET_S if options.smoke else BUDGET_S,
                    repeats=options.repeats,
                )
            rows += case_rows
            progress.advance()
            progress.clear()
            if report.group_line(case_rows[0]) != group:
                group = report.group_line(case_rows[0])
                print("", group, sep="\n")
            print(*report.table_lines(case_rows), sep="\n", flush=True)
            save(complete=False)
    except KeyboardInterrupt:
        interrupted = True
    progress.clear()
    save(complete=not interrupted)
    print(*report.summary_lines(rows), sep="\n", flush=True)
    if options.plot is not None and rows:
        report.draw(rows, options.plot, report.machine_line(machine))
    wrong = [row for row in rows if not row["correct"]]
    if wrong:
        print(f"\n{len(wrong)} of {len(rows)} rows are WRONG: see FAIL above", flush=True)
    if interrupted:
        print(f"\ninterrupted after {len(rows) // 4} of {len(cases)} cases", flush=True)
        return INTERRUPTED
    return 1 if wrong else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; `arguments` are the words after the module's name."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = build_parser()
    options = parser.parse_args(words)
    cases = check_options(parser, options)
    return run(options, cases, ["-m", "benchmarks.matmul", *words])


if __name__ == "__main__":
    sys.exit(main())
