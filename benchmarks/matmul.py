"""Times the three products of the sparse matmul against every dense way, CSR and the roofline.

    python -m benchmarks.matmul                      the cases that matter, in some minutes
    python -m benchmarks.matmul --smoke              everything once, on tiny shapes, in seconds
    python -m benchmarks.matmul --full               every layer of every published width; hours
    python -m benchmarks.matmul --filter 2048,8192   one matrix only
    python -m benchmarks.matmul --device cuda        the cases of a GPU, against cuBLAS, compiled
                                                     masked dense and torch's CSR and BSR

Each row is one product of one case, or `step`, the sum of the three. Correctness comes first: the
call is compared with float64, beside torch's own product in the same dtype, and a row that is wrong
prints FAIL instead of a speed and makes the exit status 1. Ctrl-C ends the run and keeps the rows.
On a GPU every call starts from a cold second-level cache and is timed by the GPU's own clock; short
ones are replayed from CUDA graphs. Each row says so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import baselines, devices, problems, report, roofline
from benchmarks.baselines import Operands
from benchmarks.machine import Machine
from benchmarks.problems import PRODUCTS, Case
from benchmarks.timing import Candidate, Timing
from sparse_kernels import backends
from sparse_kernels.layout import Problem

# Seconds of measuring for each product of a case, once everything is warm.
BUDGET_S = 0.6
SMOKE_BUDGET_S = 0.01
# A dense way that is this much slower than the fastest when it is warm cannot be the best one.
HOPELESS = 2.0
INTERRUPTED = 130


def measure_case(
    case: Case,
    backend: str | None,
    machine: Machine,
    *,
    budget_s: float,
    repeats: int | None,
) -> list[dict[str, Any]]:
    """The four rows of a case: forward, grad_input, grad_weight and step."""
    operands = Operands.draw(case, device=machine.name)
    rows = [
        measure_product(operands, product, backend, machine, budget_s=budget_s, repeats=repeats)
        for product in PRODUCTS
    ]
    return [*rows, sum_rows(rows)]


def measure_product(
    operands: Operands,
    product: str,
    backend: str | None,
    machine: Machine,
    *,
    budget_s: float,
    repeats: int | None,
) -> dict[str, Any]:
    """Checks one product, then times it in turns with its rivals."""
    case = operands.case
    backend = backends.choose(
        backends.problem_of(operands.x, operands.problem.layout, product), backend
    )
    ours = baselines.ours(operands, product, backend)
    accuracy = baselines.check(operands, product, ours)
    row = describe_row(case, product, backend, machine.name)
    row |= {
        "error": accuracy.error,
        "torch_error": accuracy.torch_error,
        "correct": accuracy.is_good,
        "checked": accuracy.checked,
    }
    bound = machine.bound(count_work(operands, product), case.dtype)
    if bound is not None:
        row |= {"bound_ms": bound.ms, "bound_limit": bound.limit, "peak_bound_ms": bound.peak_ms}
    if not accuracy.is_good:
        return row
    rivals = machine.rivals(operands, product, ours)
    forms = {
        f"{kind} {name}": call
        for kind, calls in rivals.sparse.items()
        for name, call in calls.items()
    }
    # What is alone is not next to ours, which would find its operands in the caches.
    everything = {"ours": ours, **rivals.masked, **rivals.alone, **rivals.dense, **forms}
    estimates = machine.estimate_s(everything)
    kept = {"ours", *rivals.masked, *rivals.alone, *_contenders(rivals.dense, estimates)}
    if rivals.same_dtype in rivals.dense:
        kept.add(rivals.same_dtype)
    for kind, calls in rivals.sparse.items():
        kept |= _fastest([f"{kind} {name}" for name in calls], estimates)
    timings, timed = machine.interleave(
        {name: call for name, call in everything.items() if name in kept},
        budget_s=budget_s,
        repeats=repeats,
        estimates=estimates,
    )

    def time_of(prefix: str) -> float | None:
        found = (timing.median_ms for name, timing in timings.items() if name.startswith(prefix))
        return next(found, None)

    dense = {name: timings[name] for name in rivals.dense if name in kept}
    row |= _best("best_dense", dense)
    row |= _best("best_fp32_dense", {k: v for k, v in dense.items() if k.endswith(" fp32")})
    row |= {
        "time_ms": timings["ours"].median_ms,
        "spread_ms": timings["ours"].spread_ms,
        "samples": timings["ours"].samples,
        "timed": timed,
        "one_thread_ms": time_of("one thread"),
        "masked_dense_ms": time_of("masked dense"),
        "compiled_masked_ms": time_of("compiled masked"),
        "dense_ms": time_of(rivals.same_dtype),
        "torch_csr_ms": time_of("csr "),
        "torch_bsr_ms": time_of("bsr "),
        **rivals.notes,
        "baselines": {
            name: {"time_ms": t.median_ms, "spread_ms": t.spread_ms, "samples": t.samples}
            for name, t in timings.items()
            if name != "ours" and name not in rivals.alone
        },
    }
    return row


def _contenders(dense: Mapping[str, Candidate], estimates: Mapping[str, float]) -> set[str]:
    """The dense ways that may turn out the best, or the best of those in fp32."""
    fastest = min(estimates[name] for name in dense)
    fp32 = [estimates[name] for name in dense if name.endswith(" fp32")]
    fastest_fp32 = min(fp32, default=0.0)
    return {
        name
        for name in dense
        if estimates[name] <= HOPELESS * fastest
        or (name.endswith(" fp32") and estimates[name] <= HOPELESS * fastest_fp32)
    }


def _fastest(names: Sequence[str], estimates: Mapping[str, float]) -> set[str]:
    return {min(names, key=lambda name: estimates[name])} if names else set()


def _best(prefix: str, timings: Mapping[str, Timing]) -> dict[str, Any]:
    if not timings:
        return {}
    name = min(timings, key=lambda name: timings[name].median_ms)
    return {f"{prefix}_ms": timings[name].median_ms, f"{prefix}_kind": name}


def why_not(backend: str, case: Case, device: str) -> str | None:
    """None if the backend can run every product of the case on that device, else a sentence."""
    sizes = (case.out_features, case.in_features, case.fan_in, case.block)
    problems_of_case = (Problem(device, case.torch_dtype, product, *sizes) for product in PRODUCTS)
    return next(filter(None, (backends.why_not(backend, p) for p in problems_of_case)), None)


def describe_row(case: Case, product: str, backend: str, device: str) -> dict[str, Any]:
    """A row with nothing measured yet."""
    is_decode = case.tokens == 1 and (case.in_features, case.out_features) == (2048, 8192)
    measured = (
        "time_ms", "spread_ms", "samples", "masked_dense_ms", "dense_ms", "best_dense_ms",
        "best_dense_kind", "best_fp32_dense_ms", "best_fp32_dense_kind", "torch_csr_ms",
        "torch_csr_note", "bf16_dense_note", "bound_ms", "bound_limit", "peak_bound_ms",
        "one_thread_ms", "error", "torch_error", "compiled_masked_ms", "compiled_masked_note",
        "torch_bsr_ms", "torch_bsr_note", "timed",
    )  # fmt: skip
    return {
        "device": device,
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
        "torch_csr_ms", "torch_bsr_ms", "compiled_masked_ms", "bound_ms", "peak_bound_ms",
        "one_thread_ms",
    ):  # fmt: skip
        parts = [row[name] for row in rows]
        step[name] = None if None in parts else sum(parts)
    spreads = [row["spread_ms"] for row in rows]
    step["spread_ms"] = None if None in spreads else sum(s * s for s in spreads) ** 0.5
    for name in ("best_dense_kind", "best_fp32_dense_kind", "bound_limit", "backend", "timed"):
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
    parser.add_argument(
        "--part", choices=("targets", "others"), help="the promised cases only, or all but these"
    )
    parser.add_argument("--threads", type=parse_positive, help="torch.set_num_threads")
    parser.add_argument(
        "--repeats",
        type=parse_positive,
        metavar="COUNT",
        help="samples of each call (default: what fits a time budget, at least 5, or 3 if slow)",
    )
    parser.add_argument("--device", default="cpu", metavar="cpu|cuda", help="where (default: cpu)")
    parser.add_argument(
        "--backend", help="which backend is ours (default: the fastest that runs on the device)"
    )
    return parser


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[Case]:
    """The cases to run. Ends the program with a message if an option cannot be met."""
    reason = devices.why_not(options.device)
    if reason is not None:
        parser.error(f"--device {options.device}: {reason}")
    if options.json is not None:
        reason = report.why_not_writable(options.json)
        if reason is not None:
            parser.error(f"--json: {reason}")
    if options.plot is not None:
        reason = report.why_no_plot(options.plot)
        if reason is not None:
            parser.error(f"--plot: {reason}")
    if options.device == "cpu" and options.dtype not in (None, *problems.CPU_DTYPES):
        parser.error(f"--dtype {options.dtype}: the processor's kernels have no {options.dtype}")
    sizes = {
        "cpu": (problems.default_cases, problems.smoke_cases, problems.full_cases),
        "cuda": (problems.gpu_cases, problems.gpu_smoke_cases, problems.gpu_full_cases),
    }
    default, smoke, full = sizes[options.device]
    build = smoke if options.smoke else full if options.full else default
    cases = problems.select(
        build(),
        shape=options.filter,
        tokens=options.tokens,
        block=options.block,
        dtype=options.dtype,
    )
    if options.part is not None:
        cases = [case for case in cases if case.is_target == (options.part == "targets")]
    if not cases:
        parser.error("no case is left: --filter, --tokens, --block, --dtype, --part exclude all")
    if options.backend is not None:
        if options.backend not in backends.NAMES:
            names = ", ".join(backends.NAMES)
            parser.error(f"--backend must be one of {names}, got {options.backend!r}")
        reasons = [why_not(options.backend, case, options.device) for case in cases]
        if None not in reasons:
            parser.error(f"the backend {options.backend} cannot run here: {reasons[0]}")
    return cases


def run(options: argparse.Namespace, cases: Sequence[Case], command: Sequence[str]) -> int:
    """Measures the cases, prints as it goes, and returns the exit status."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    machine = devices.connect(options.device)
    backend = machine.backend if options.backend is None else options.backend
    progress = report.Progress(len(cases))
    rows: list[dict[str, Any]] = []
    progress.show("measuring what the machine can do")
    interrupted = False
    group = ""
    description: dict[str, Any] = {}
    failed: dict[str, str] = {}
    left_out: dict[str, str] = {}
    if backend is not None:
        reasons = {case: why_not(backend, case, machine.name) for case in cases}
        cases = [case for case in cases if reasons[case] is None]
        left_out = {str(case): reason for case, reason in reasons.items() if reason is not None}

    def save(*, complete: bool) -> None:
        if options.json is not None:
            extra = {"failed": failed} if failed else {}
            report.write_json(options.json, description, rows, complete=complete, **extra)

    try:
        machine.prepare(smoke=options.smoke)
        description = machine.describe(command)
        progress.clear()
        line = report.machine_line(description)
        print(line, "", *report.table_header(machine.name), sep="\n", flush=True)
        if left_out:
            print("", f"left out, because the backend {backend} cannot run them:", sep="\n")
            print(*(f"  {case}: {reason}" for case, reason in left_out.items()), sep="\n")
        for case in cases:
            progress.show(str(case))
            try:
                with torch.no_grad():
                    case_rows = measure_case(
                        case,
                        backend,
                        machine,
                        budget_s=SMOKE_BUDGET_S if options.smoke else BUDGET_S,
                        repeats=options.repeats,
                    )
            except RuntimeError as error:
                # Out of memory, or a launch that was refused: the other cases may still run.
                failed[str(case)] = str(error).splitlines()[0]
                progress.advance()
                progress.clear()
                print(f"\n{case}: FAIL, {failed[str(case)]}", flush=True)
                continue
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
    if description:
        save(complete=not interrupted)
    print(*report.summary_lines(rows), sep="\n", flush=True)
    if options.plot is not None and rows:
        report.draw(rows, options.plot, report.machine_line(description))
    wrong = [row for row in rows if not row["correct"]]
    if failed:
        print(f"\n{len(failed)} of {len(cases)} cases did not run: see FAIL above", flush=True)
    if wrong:
        print(f"\n{len(wrong)} of {len(rows)} rows are WRONG: see FAIL above", flush=True)
    if interrupted:
        print(f"\ninterrupted after {len(rows) // 4} of {len(cases)} cases", flush=True)
        return INTERRUPTED
    return 1 if wrong or failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; `arguments` are the words after the module's name."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = build_parser()
    options = parser.parse_args(words)
    cases = check_options(parser, options)
    return run(options, cases, ["-m", "benchmarks.matmul", *words])


if __name__ == "__main__":
    sys.exit(main())
