"""The runner: measures one case after another, keeps the rows, shows progress and time left.

A case comes with a function that measures it and returns its rows. Correctness comes first: a row
that is wrong has no times. Ctrl-C ends the run and keeps the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks import baselines, report, roofline
from benchmarks.baselines import Operands
from benchmarks.cases import PRODUCTS, Case
from benchmarks.devices import Device
from benchmarks.timing import Budget, Candidate, Timing
from sparse_kernels import backends

AnyCase = TypeVar("AnyCase")
# A baseline that is this much slower than the fastest when it is warm cannot be the best one.
HOPELESS = 2.0
# Columns that a step adds up.
TIMES = (
    "time_ms", "masked_dense_ms", "dense_ms", "best_dense_ms", "best_fp32_dense_ms",
    "best_sparse_ms", "torch_csr_ms", "torch_bsr_ms", "compiled_masked_ms", "bound_ms",
    "peak_bound_ms", "one_thread_ms",
)  # fmt: skip
_NOTES = (
    "sparse_note", "torch_csr_note", "torch_bsr_note", "bf16_dense_note", "compiled_masked_note",
)  # fmt: skip
_KINDS = ("best_dense_kind", "best_fp32_dense_kind", "best_sparse_kind", "bound_limit")


@dataclass(frozen=True)
class Outcome:
    """What a run leaves: its rows, and the exit status."""

    machine: dict[str, Any]
    rows: list[dict[str, Any]]
    status: int


def run(
    cases: Sequence[AnyCase],
    measure: Callable[[AnyCase], list[dict[str, Any]]],
    show: Callable[[Sequence[report.Row]], str],
    device: Device,
    *,
    command: Sequence[str],
    smoke: bool,
    json: Path | None,
) -> Outcome:
    """Measures the cases in order.

    Args:
        measure: returns the rows of one case.
        show: one line for the rows of one case, printed as soon as they are measured.
        command: the words after `python`, for the result file.
        json: where the rows are written after each case, or None.
    """
    rows: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    machine: dict[str, Any] = {}
    is_interrupted = False

    def save(*, complete: bool) -> None:
        if json is not None:
            extra = {"failed": failed} if failed else {}
            report.write_json(json, machine, rows, complete=complete, **extra)

    with report.progress(total=len(cases) + 1) as bar:
        try:
            bar.set_description("peaks of this machine")
            sentences = device.prepare(smoke=smoke)
            machine = device.describe(command)
            bar.write("\n".join([report.machine_line(machine), *sentences, ""]))
            bar.update()
            for case in cases:
                bar.set_description(str(case))
                try:
                    with torch.no_grad():
                        measured = measure(case)
                except RuntimeError as error:
                    # Out of memory, or a refused launch: the other cases may still run.
                    failed[str(case)] = str(error).splitlines()[0]
                    bar.write(f"{case}: FAIL, {failed[str(case)]}")
                else:
                    rows += measured
                    bar.write(show(measured))
                    save(complete=False)
                bar.update()
        except KeyboardInterrupt:
            is_interrupted = True
    if machine:
        save(complete=not is_interrupted)
    wrong = sum(not row["correct"] for row in rows)
    if failed:
        print(f"{len(failed)} of {len(cases)} cases did not run: see FAIL above")
    if wrong:
        print(f"{wrong} of {len(rows)} rows are WRONG: see FAIL above")
    if is_interrupted:
        print(f"interrupted; the rows of the finished cases are kept ({len(rows)})")
        return Outcome(machine, rows, report.INTERRUPTED)
    return Outcome(machine, rows, 1 if wrong or failed else 0)


def measure_case(
    case: Case, backend: str | None, device: Device, budget: Budget
) -> list[dict[str, Any]]:
    """The four rows of a matmul case: forward, grad_input, grad_weight and step."""
    operands = Operands.draw(case, device=device.name)
    rows = [measure_product(operands, product, backend, device, budget) for product in PRODUCTS]
    return [*rows, sum_rows(rows)]


def measure_product(
    operands: Operands, product: str, backend: str | None, device: Device, budget: Budget
) -> dict[str, Any]:
    """Checks one product, then times it in turns with its baselines."""
    case = operands.case
    problem = backends.problem_of(operands.x, operands.problem.layout, product)
    backend = backends.choose(problem, backend)
    ours = baselines.ours(operands, product, backend)
    accuracy = baselines.check(operands, product, ours)
    row = describe_row(case, product, backend, device.name)
    row |= {
        "error": accuracy.error,
        "torch_error": accuracy.torch_error,
        "correct": accuracy.is_good,
        "checked": accuracy.checked,
    }
    bound = device.bound(count_work(operands, product), case.dtype)
    if bound is not None:
        row |= {"bound_ms": bound.ms, "bound_limit": bound.limit, "peak_bound_ms": bound.peak_ms}
    if not accuracy.is_good:
        return row
    others = device.baselines(operands, product, ours)
    # The isolated ones are not next to ours, which would find its operands in the caches.
    every = {"ours": ours, **others.masked, **others.isolated, **others.dense, **others.sparse}
    estimates = device.estimate_s(every)
    if budget.limit_s is not None:
        # One sample of the slowest may take longer than everything else: its estimate counts.
        budget = replace(budget, limit_s=max(budget.limit_s, 2 * estimates["ours"]))
    kept = {
        "ours", *others.masked, *others.isolated, others.same_dtype,
        *_contenders(others.dense, estimates),
        *_contenders({n: c for n, c in others.dense.items() if n.endswith(" fp32")}, estimates),
        *_contenders(others.sparse, estimates),
        *_contenders(_named(others.sparse, "torch CSR"), estimates, 1.0),
        *_contenders(_named(others.sparse, "torch BSR"), estimates, 1.0),
    }  # fmt: skip
    timings, timed = device.interleave(
        {name: call for name, call in every.items() if name in kept}, budget, estimates
    )

    def time_of(prefix: str) -> float | None:
        return min((t.median_ms for n, t in timings.items() if n.startswith(prefix)), default=None)

    dense = {name: timings[name] for name in others.dense if name in kept}
    row |= _best("best_dense", dense)
    row |= _best("best_fp32_dense", {k: v for k, v in dense.items() if k.endswith(" fp32")})
    row |= _best("best_sparse", {name: timings[name] for name in others.sparse if name in kept})
    row |= {
        "time_ms": timings["ours"].median_ms,
        "spread_ms": timings["ours"].spread_ms,
        "samples": timings["ours"].samples,
        "timed": timed,
        "one_thread_ms": time_of("one thread"),
        "masked_dense_ms": time_of("masked dense"),
        "compiled_masked_ms": time_of("compiled masked"),
        "dense_ms": time_of(others.same_dtype),
        "torch_csr_ms": time_of("torch CSR"),
        "torch_bsr_ms": time_of("torch BSR"),
        **others.notes,
        "baselines": {
            name: {"time_ms": t.median_ms, "spread_ms": t.spread_ms, "samples": t.samples}
            for name, t in timings.items()
            if name != "ours" and name not in others.isolated
        },
    }
    return row


def _named(candidates: Mapping[str, Candidate], prefix: str) -> dict[str, Candidate]:
    return {name: call for name, call in candidates.items() if name.startswith(prefix)}


def _contenders(
    candidates: Mapping[str, Candidate], estimates: Mapping[str, float], factor: float = HOPELESS
) -> set[str]:
    """Those that may turn out the fastest of these."""
    fastest = min((estimates[name] for name in candidates), default=0.0)
    return {name for name in candidates if estimates[name] <= factor * fastest}


def _best(prefix: str, timings: Mapping[str, Timing]) -> dict[str, Any]:
    if not timings:
        return {}
    name = min(timings, key=lambda name: timings[name].median_ms)
    return {f"{prefix}_ms": timings[name].median_ms, f"{prefix}_kind": name}


def describe_row(case: Case, product: str, backend: str, device: str) -> dict[str, Any]:
    """A row with nothing measured yet."""
    measured = (*TIMES, *_NOTES, *_KINDS, "spread_ms", "samples", "error", "torch_error", "timed")
    is_decode = case.tokens == 1 and (case.in_features, case.out_features) == (2048, 8192)
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
        "headline": case.has_goal or is_decode or case.fan_in == 128,
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
    step = dict(rows[0]) | {"product": "step"}
    for name in TIMES:
        parts = [row[name] for row in rows]
        step[name] = None if None in parts else sum(parts)
    spreads = [row["spread_ms"] for row in rows]
    step["spread_ms"] = None if None in spreads else sum(s * s for s in spreads) ** 0.5
    for name in (*_KINDS, "backend", "timed"):
        kinds = list(dict.fromkeys(row[name] for row in rows))
        step[name] = None if None in kinds else " + ".join(kinds)
    for name in ("error", "torch_error"):
        step[name] = max(row[name] for row in rows)
    step["correct"] = all(row["correct"] for row in rows)
    step["samples"] = None if None in spreads else min(row["samples"] for row in rows)
    step["checked"] = "; ".join(dict.fromkeys(row["checked"] for row in rows))
    step.pop("baselines", None)
    return step
