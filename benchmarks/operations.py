"""The operations that are measured: what is called, how it is checked, what it competes with."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, rms_norm, scaled_dot_product_attention

from benchmarks import baselines, timing
from benchmarks.baselines import Operands, Rivals
from benchmarks.cases import (
    DTYPES,
    HEADLINES,
    PRODUCTS,
    AnyCase,
    AttentionCase,
    Case,
    TopkCase,
)
from benchmarks.devices import Device
from benchmarks.roofline import Work, count_work
from benchmarks.timing import Candidate
from sparse_kernels import abs_topk, reference, transformer_ops
from sparse_kernels.testing import Accuracy, allowed_error, check_product, max_error
from sparse_transformer import attention

Row = dict[str, Any]
Way = Callable[..., Tensor]

_EPS = 1e-5  # of RMSNorm


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
    check: Callable[[str, Tensor], Accuracy]  # compares a result of a backend with the truth
    work: Work  # for the bound
    rivals: Callable[[], tuple[Rivals, dict[str, str]]]  # and notes about what is missing


def of(
    case: AnyCase, device: str, backends: Sequence[str], *, dense_only: bool = False
) -> Iterator[Operation]:
    """The operations of a case; `dense_only` leaves out rivals that are sparse or compiled."""
    if isinstance(case, TopkCase):
        yield from _abs_topk(case, device, backends)
    elif isinstance(case, AttentionCase):
        yield from _attention(case, device, backends)
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
            check=partial(_check_product, operands, product),
            work=count_work(case, product, operands.used_in_features),
            rivals=partial(baselines.rivals, operands, product, expected),
        )


def _check_product(operands: Operands, product: str, _: str, result: Tensor) -> Accuracy:
    return check_product(operands.problem, product, result)


def _both(
    name: str,
    ways: dict[str, Way],
    rivals: Mapping[str, str],
    inputs: Sequence[Tensor],
    grad: Tensor,
    check: Callable[[str, Tensor, Tensor | None], Accuracy],
    works: tuple[Work, Work],
) -> Iterator[Operation]:
    """Forward, and backward by autograd, whose result is the gradient of the first input.

    `rivals` are the ways that are not ours, with the column that they fill. `check` gets the name
    of a way, its result, and its gradient if that is what is checked.
    """
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    with torch.enable_grad():
        results = {way: call(*leaves) for way, call in ways.items()}

    def gradient(y: Tensor) -> Tensor:
        # A rival may lack an input: PyTorch's attention has no sinks.
        return torch.autograd.grad(y, leaves, grad, retain_graph=True, allow_unused=True)[0]

    forward: dict[str, Callable[[], Tensor]] = {w: partial(f, *inputs) for w, f in ways.items()}
    backward: dict[str, Callable[[], Tensor]] = {w: partial(gradient, results[w]) for w in ways}
    checks: tuple[Callable[[str, Tensor], Accuracy], ...] = (
        lambda way, result: check(way, result, None),
        lambda way, result: check(way, results[way].detach(), result),
    )
    for product, calls, compare, work in zip(
        (f"{name} forward", f"{name} backward"), (forward, backward), checks, works, strict=True
    ):
        found: Rivals = {way: (calls[way], [column]) for way, column in rivals.items()}
        yield Operation(
            product=product,
            ours={way: call for way, call in calls.items() if way not in rivals},
            check=compare,
            work=work,
            rivals=partial(tuple[Rivals, dict[str, str]], (found, {})),
        )


def _abs_topk(case: TopkCase, device: str, backends: Sequence[str]) -> Iterator[Operation]:
    """abs_topk, alone or of GELU or RMSNorm, against what users write in PyTorch.

    What is before it may be rounded otherwise than in PyTorch; of that, every element kept and its
    gradient is compared with the specification.
    """
    generator = torch.Generator(device).manual_seed(case.width + case.k)
    drawn = torch.randn(3, case.tokens, case.width, generator=generator, device=device)
    x, grad, weight = drawn.to(DTYPES[case.dtype])
    inputs = [x, 1 + weight[0]] if case.op == "rms_norm_abs_topk" else [x]

    def before(x: Tensor, weight: Tensor | None = None) -> Tensor:
        if weight is not None:
            return rms_norm(x, weight.shape, weight, _EPS)
        return gelu(x) if case.op == "gelu_abs_topk" else x

    def ours(x: Tensor, weight: Tensor | None = None, *, backend: str, k: int = case.k) -> Tensor:
        if weight is not None:
            return transformer_ops.rms_norm_abs_topk(x, weight, k, _EPS, backend)
        run = transformer_ops.gelu_abs_topk if case.op == "gelu_abs_topk" else abs_topk
        return run(x, k, backend)

    def check(way: str, y: Tensor, gradient: Tensor | None) -> Accuracy:
        if gradient is not None:
            kept = torch.where(y != 0, grad, 0)
            wide, stock = (
                _gradient(before, [t.to(dtype) for t in inputs], kept.to(dtype))
                for dtype in (torch.float64, x.dtype)
            )
            return exactly(_compare(gradient, stock, wide))
        whole = ours(*inputs, backend=way, k=case.width)
        found = _compare(whole, before(*inputs), before(*(t.double() for t in inputs)))
        same = torch.equal(y, reference.abs_topk(whole, case.k))
        return exactly(replace(found, correct=found.correct and same))

    def exactly(found: Accuracy) -> Accuracy:
        """Alone it rounds nothing."""
        return replace(found, correct=found.correct and (case.op != "abs_topk" or not found.error))

    ways: dict[str, Way] = {name: partial(ours, backend=name) for name in backends}
    for name, is_sorted in (("sorted", True), ("unsorted", False)):
        ways[name] = partial(_by_torch, before, case.k, is_sorted)
    # Forward reads x and writes y; backward reads dY, Y and what was before it, and writes dX.
    reads = (1, 2 if case.op == "abs_topk" else 3)
    works = tuple(Work(0, 0, n * x.nbytes, x.nbytes) for n in reads)
    rivals = {"sorted": "torch", "unsorted": "torch"}
    yield from _both(case.op, ways, rivals, inputs, grad, check, (works[0], works[1]))


def _by_torch(before: Way, k: int, is_sorted: bool, *inputs: Tensor) -> Tensor:
    x = before(*inputs)
    index = x.abs().topk(k, sorted=is_sorted).indices
    return torch.zeros_like(x).scatter_(-1, index, x.gather(-1, index))


def _attention(case: AttentionCase, device: str, backends: Sequence[str]) -> Iterator[Operation]:
    """Attention of the model against its formula, and against PyTorch's own, which has no sinks.

    The first and the last sequence are compared with float64.
    """
    B, T, H, d, dtype = case.batch, case.length, case.heads, case.d_head, DTYPES[case.dtype]
    generator = torch.Generator(device).manual_seed(T + d)
    drawn = torch.randn(B, T, 4, H, d, generator=generator, device=device).to(dtype)
    qkv, grad, sinks = drawn[:, :, :3].contiguous(), drawn[:, :, 3], drawn[0, 0, 3, :, 0].clone()

    def plain(qkv: Tensor, sinks: Tensor) -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return attention.attend(q, k, v, sinks).transpose(1, 2)

    def without_sinks(qkv: Tensor, _: Tensor) -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    def check(_: str, y: Tensor, gradient: Tensor | None) -> Accuracy:
        some = slice(None, None, max(1, B - 1))
        result = (y if gradient is None else gradient)[some]
        wide, stock = (
            plain(*parts) if gradient is None else _gradient(plain, parts, grad[some].to(kind))
            for kind in (torch.float64, dtype)
            for parts in [[qkv[some].to(kind), sinks.to(kind)]]
        )
        return replace(_compare(result, stock, wide), checked=f"{len(result)} of {B} sequences")

    ways: dict[str, Way] = dict.fromkeys(backends, attention.causal_attention)
    ways |= {"plain": plain, "without sinks": without_sinks}
    rivals = {"plain": "plain", "without sinks": "without_sinks"}
    # Two products of scores or of values, and five; what the backward keeps is y.
    flops, size = 2.0 * B * H * d * T * (T + 1) / 2, drawn.nbytes // 4
    works = Work(2 * flops, 0, 3 * size, size), Work(5 * flops, 0, 5 * size, 3 * size)
    yield from _both("attention", ways, rivals, [qkv, sinks], grad, check, works)


def _gradient(call: Way, inputs: Sequence[Tensor], grad: Tensor) -> Tensor:
    leaf = inputs[0].detach().clone().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(call(leaf, *inputs[1:]), leaf, grad)[0]


def _compare(result: Tensor, stock: Tensor, truth: Tensor) -> Accuracy:
    """A result, and PyTorch's in the same dtype, with float64."""
    error = max_error(result, truth)
    return Accuracy(
        error=min(error, sys.float_info.max),
        torch_error=max_error(stock, truth),
        correct=error <= allowed_error(stock, truth),
        checked="every element",
    )


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
    row |= asdict(operation.check(backend, result)) | {"same_bits": torch.equal(result, again)}
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
