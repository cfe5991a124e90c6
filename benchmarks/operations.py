"""The operations that are measured: what is called, how it is checked, what it competes with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import baselines, timing
from benchmarks.baselines import Operands, Rivals
from benchmarks.cases import DTYPES, HEADLINES, PRODUCTS, AnyCase, Case, TopkCase
from benchmarks.devices import Device
from benchmarks.roofline import Work, count_work
from benchmarks.timing import Candidate
from sparse_kernels import abs_topk, reference
from sparse_kernels.testing import Accuracy, check_product

Row = dict[str, Any]


@dataclass(frozen=True)
class Limits:
    """Seconds of timing for an operation, and the samples that it has: see `timing.interleave`."""

    budget_s: float = 0.3
    limit_s: float = 0.8
    min_samples: int = timing.MIN_SAMPLES


SMOKE = Limits(0.01, math.inf)


@dataclass(frozen=True)
class Operation:
    """One call that is measured, and what it is compared with."""

    product: str  # its name in the rows
    ours: dict[str, Callable[[], Tensor]]  # by backend
    check: Callable[[Tensor], Accuracy]  # compares a result with the truth
    work: Work  # for the bound
    rivals: Callable[[], tuple[Rivals, dict[str, str]]]  # and notes about what is missing


def of(
    case: AnyCase, device: str, backends: Sequence[str], *, dense_only: bool = False
) -> Iterator[Operation]:
    """The operations of a case; `dense_only` leaves out rivals that are sparse or compiled."""
    if isinstance(case, TopkCase):
        yield from _forward_and_backward(case, device, backends)
    else:
        yield from _products(case, device, backends, dense_only)


def _products(
    case: Case, device: str, backends: Sequence[str], dense_only: bool
) -> Iterator[Operation]:
    """The three products of a layer, over the same operands."""
    operands = Operands.draw(case, device)
    for product in PRODUCTS:
        ours = {name: baselines.ours(operands, product, name) for name in backends}
        expected = None if dense_only else next(iter(ours.values()))
        yield Operation(
            product=product,
            ours=ours,
            check=partial(check_product, operands.problem, product),
            work=count_work(case, product, operands.used_in_features),
            rivals=partial(baselines.rivals, operands, product, expected),
        )


def _forward_and_backward(
    case: TopkCase, device: str, backends: Sequence[str]
) -> Iterator[Operation]:
    """abs_topk against what users write in PyTorch, whose backward is autograd's.

    Every element of the result is compared with the specification, or its gradient.
    """
    generator = torch.Generator(device).manual_seed(case.width + case.k)
    drawn = torch.randn(2, case.tokens, case.width, generator=generator, device=device)
    x, grad = drawn.to(DTYPES[case.dtype])
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        **{name: partial(abs_topk, k=case.k, backend=name) for name in backends},
        "sorted": partial(_torch_abs_topk, k=case.k, is_sorted=True),
        "unsorted": partial(_torch_abs_topk, k=case.k, is_sorted=False),
    }
    leaf = x.clone().requires_grad_()
    with torch.enable_grad():
        results = {way: call(leaf) for way, call in ways.items()}

    def gradient(y: Tensor) -> Tensor:
        return torch.autograd.grad(y, leaf, grad, retain_graph=True)[0]

    kept = reference.abs_topk(x, case.k)
    forward = {way: partial(call, x) for way, call in ways.items()}
    backward = {way: partial(gradient, y) for way, y in results.items()}
    for product, calls, truth, read in (
        ("abs_topk forward", forward, kept, x.nbytes),
        ("abs_topk backward", backward, reference.abs_topk_backward(grad, kept), 2 * x.nbytes),
    ):
        rivals: Rivals = {way: (calls[way], ["torch"]) for way in ("sorted", "unsorted")}
        yield Operation(
            product=product,
            ours={name: calls[name] for name in backends},
            check=partial(_count_different, truth),
            # Forward reads x and writes y; backward reads dY and Y and writes dX.
            work=Work(flops=0, operand_bytes=0, read_bytes=read, write_bytes=x.nbytes),
            rivals=partial(tuple[Rivals, dict[str, str]], (rivals, {})),
        )


def _torch_abs_topk(x: Tensor, k: int, *, is_sorted: bool) -> Tensor:
    index = x.abs().topk(k, sorted=is_sorted).indices
    return torch.zeros_like(x).scatter_(-1, index, x.gather(-1, index))


def _count_different(truth: Tensor, result: Tensor) -> Accuracy:
    different = int((result != truth).sum())
    return Accuracy(different, 0.0, different == 0, "every element")


@torch.no_grad()
def measure(
    case: AnyCase,
    device: Device,
    backends: Sequence[str],
    limits: Limits | None,
    *,
    dense_only: bool = False,
) -> Iterator[Row]:
    """The rows of a case: each operation on each backend, then for each backend their sum.

    All backends take turns with the rivals. A result that is wrong has no times, and without
    `limits` none has.
    """
    found: dict[str, list[Row]] = {name: [] for name in backends}
    for operation in of(case, device.name, backends, dense_only=dense_only):
        rows = {name: _check(case, operation, name, device) for name in backends}
        right = {name: call for name, call in operation.ours.items() if rows[name]["correct"]}
        if right and limits is not None:
            times, columns = time_in_turns(right, operation, device, limits)
            for name, row in times.items():
                rows[name] |= columns | row
        for name, row in rows.items():
            found[name].append(row)
            yield row
    for products in found.values():
        yield sum_rows(products)


def _check(case: AnyCase, operation: Operation, backend: str, device: Device) -> Row:
    row = {"device": device.name, **case.columns, "product": operation.product}
    row |= {"backend": backend, "threads": torch.get_num_threads()}
    result, again = (operation.ours[backend]() for _ in range(2))
    row |= asdict(operation.check(result)) | {"same_bits": torch.equal(result, again)}
    row |= {"correct": row["correct"] and row["same_bits"], "headline": case in HEADLINES}
    if device.peaks is not None:
        terms = device.peaks.bound_ms(operation.work, case.dtype)
        limit = max(terms, key=lambda term: terms[term])
        row |= {"bound_ms": terms[limit], "bound_limit": limit}
    return row


def time_in_turns(
    ours: Mapping[str, Candidate], operation: Operation, device: Device, limits: Limits
) -> tuple[dict[str, Row], Row]:
    """The columns of each call of ours, and those of the rivals, which are of the same turns."""
    rivals, notes = operation.rivals()
    calls = {**ours, **{name: call for name, (call, _) in rivals.items()}}
    groups: dict[str, list[str]] = {}
    for name, (_, names) in rivals.items():
        for group in names:
            groups.setdefault(group, []).append(name)
    timings = timing.interleave(calls, groups.values(), **vars(limits), sampler=device.sample_s)
    row: Row = dict(notes)
    for group, names in groups.items():
        best = min(names, key=lambda name: timings[name].time_ms)
        row |= {f"{group}_ms": timings[best].time_ms, f"{group}_kind": best}
    columns = {name: asdict(found) for name, found in timings.items()}
    times = {name: {**columns.pop(name), "timed": device.clock} for name in ours}
    return times, row | {"baselines": columns}


def sum_rows(rows: Sequence[Mapping[str, Any]]) -> Row:
    """The `step` row: times and bounds added up, spreads as independent, errors the largest.

    It has a column only where every operation has it.
    """
    combine: dict[str, Callable[[list[Any]], object]] = {
        "spread_ms": lambda values: math.hypot(*values),
        **dict.fromkeys(("error", "torch_error"), max),
        **dict.fromkeys(("samples", "correct", "same_bits"), min),
    }
    step: Row = {}
    for name, first in rows[0].items():
        if name != "baselines" and all(name in row for row in rows):
            values = [row[name] for row in rows]
            if name in combine:
                step[name] = combine[name](values)
            elif name.endswith("_ms"):
                step[name] = sum(values)
            else:
                step[name] = " + ".join(dict.fromkeys(values)) if isinstance(first, str) else first
    return step | {"product": "step"}
