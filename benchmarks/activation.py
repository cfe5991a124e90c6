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
from collections.abc import Iterator
from functools import partial
from math import inf

import torch
from torch import Tensor

from benchmarks import operations, run
from benchmarks.baselines import Accuracy, Rivals
from benchmarks.cases import DTYPES, TopkCase, topk_cases
from benchmarks.operations import Operation
from benchmarks.roofline import Work
from benchmarks.timing import Candidate
from sparse_kernels import abs_topk, backends, reference


def torch_abs_topk(x: Tensor, k: int, *, is_sorted: bool) -> Tensor:
    """The usual way in PyTorch."""
    index = x.abs().topk(k, sorted=is_sorted).indices
    return torch.zeros_like(x).scatter_(-1, index, x.gather(-1, index))


def check(call: Candidate, truth: Tensor) -> Accuracy:
    """The error is the number of elements that differ."""
    result = call()
    assert isinstance(result, Tensor)
    different = int((result != truth).sum())
    return Accuracy(different, 0.0, different == 0, "every element")


def both(case: TopkCase, device: str, backend: str | None) -> Iterator[Operation]:
    """Forward and backward of a case."""
    generator = torch.Generator().manual_seed(case.width + case.k)
    x, grad = (
        torch.randn(case.tokens, case.width, generator=generator).to(device, DTYPES[case.dtype])
        for _ in range(2)
    )
    name = backends.choose(case.problems(device)[0], backend)
    ways = {
        "ours": partial(abs_topk, k=case.k, backend=name),
        "sorted": partial(torch_abs_topk, k=case.k, is_sorted=True),
        "unsorted": partial(torch_abs_topk, k=case.k, is_sorted=False),
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
            check=partial(check, calls["ours"], truth),
            # Forward reads x and writes y; backward reads dY and Y and writes dX.
            work=Work(flops=0, operand_bytes=0, read_bytes=read, write_bytes=x.nbytes),
            rivals=partial(tuple[Rivals, dict[str, str]], (rivals, {})),
        )


BENCHMARK = operations.benchmark(
    "activation",
    __doc__,
    topk_cases,
    both,
    seconds=(1.5, inf),
    is_drawn=False,
)
main = partial(run.main, BENCHMARK)

if __name__ == "__main__":
    sys.exit(main())
