"""The operations that are measured: what is called, how it is checked, what it competes with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks import baselines
from benchmarks.baselines import Accuracy, Operands, Rivals
from benchmarks.cases import DTYPES, Case, TopkCase
from benchmarks.roofline import Work, count_work
from benchmarks.timing import Candidate
from sparse_kernels import abs_topk, backends, reference


@dataclass(frozen=True)
class Operation:
    """One call that is measured, and what it is compared with."""

    product: str  # its name in the rows
    backend: str
    ours: Candidate
    check: Callable[[], Accuracy]  # compares the result with the truth
    work: Work  # for the bound
    rivals: Callable[[], tuple[Rivals, dict[str, str]]]  # and notes about what is missing


def products(case: Case, device: str, backend: str | None) -> Iterator[Operation]:
    """The three products of a layer, over the same operands. Without a backend sk chooses one."""
    operands = Operands.draw(case, device)

    for problem in case.problems(device):
        name, product = backends.choose(problem, backend), problem.product
        ours = baselines.ours(operands, product, name)
        yield Operation(
            product=product,
            backend=name,
            ours=ours,
            check=partial(baselines.check, operands, product, ours),
            work=count_work(case, product, operands.used_in_features),
            rivals=partial(baselines.rivals, operands, product, ours),
        )


def forward_and_backward(case: TopkCase, device: str, backend: str | None) -> Iterator[Operation]:
    """abs_topk against what users write in PyTorch, whose backward is autograd's.

    Every element of the result is compared with the specification, or its gradient.
    """
    generator = torch.Generator(device).manual_seed(case.width + case.k)
    x, grad = (
        torch.randn(case.tokens, case.width, generator=generator, device=device).to(
            DTYPES[case.dtype]
        )
        for _ in range(2)
    )
    name = backends.choose(case.problems(device)[0], backend)
    ways = {
        "ours": partial(abs_topk, k=case.k, backend=name),
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
            backend=name,
            ours=calls["ours"],
            check=partial(_count_different, calls["ours"], truth),
            # Forward reads x and writes y; backward reads dY and Y and writes dX.
            work=Work(flops=0, operand_bytes=0, read_bytes=read, write_bytes=x.nbytes),
            rivals=partial(tuple[Rivals, dict[str, str]], (rivals, {})),
        )


def _torch_abs_topk(x: Tensor, k: int, *, is_sorted: bool) -> Tensor:
    index = x.abs().topk(k, sorted=is_sorted).indices
    return torch.zeros_like(x).scatter_(-1, index, x.gather(-1, index))


def _count_different(call: Candidate, truth: Tensor) -> Accuracy:
    result = call()
    assert isinstance(result, Tensor)
    different = int((result != truth).sum())
    return Accuracy(different, 0.0, different == 0, "every element")
