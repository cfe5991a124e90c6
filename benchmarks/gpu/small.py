"""Every GPU kernel once on small shapes, checked: for compute-sanitizer and a profiler.

    python -m benchmarks.gpu.small [BACKEND...]     by default cuda and triton

Odd sizes, empty inputs, strided inputs, blocks of every backend, all dtypes; the exit status is 1
if a result is wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from benchmarks import baselines
from benchmarks.baselines import Operands
from benchmarks.cases import DTYPES, Case, TopkCase
from benchmarks.devices import why_not
from sparse_kernels import backends, ops, reference

# tokens, in_features, out_features, fan_in, block.
SHAPES = (
    (37, 70, 45, 7, (1, 1)),
    (1, 64, 33, 64, (1, 1)),
    (130, 48, 64, 12, (4, 2)),
    (65, 96, 80, 24, (16, 1)),
    (0, 32, 16, 4, (1, 1)),
    (97, 96, 64, 32, (16, 16)),
    (130, 128, 96, 64, (32, 32)),
    (70, 256, 128, 128, (64, 64)),
    (1, 256, 128, 128, (128, 128)),
)
EVERY_ROW = 1000
TOPK_SHAPES = ((5, 33, 7), (3, 2048, 512), (1, 9000, 1), (0, 16, 4))


def wrong_products(
    device: str, names: Sequence[str], dtypes: Sequence[str] = tuple(DTYPES)
) -> Iterator[str]:
    """Runs every product of every shape and dtype on each backend that can; yields what is off."""
    for case in (Case(*shape, dtype) for dtype in dtypes for shape in SHAPES):
        operands = Operands.draw(case, device=device)
        # Rows that are not adjacent.
        x, grad = (
            torch.cat([t, t], dim=1)[:, : t.shape[1]] for t in (operands.x, operands.grad_output)
        )
        problem = replace(operands.problem, x=x, grad_output=grad)
        operands = replace(operands, problem=problem)
        for name in names:
            for wanted in case.problems(device):
                if backends.why_not(name, wanted) is None:
                    call = baselines.ours(operands, wanted.product, name)
                    if not baselines.check(operands, wanted.product, call, EVERY_ROW).correct:
                        yield f"{name} {wanted.product} {case}"


def wrong_topk(
    device: str, names: Sequence[str], dtypes: Sequence[str] = tuple(DTYPES)
) -> Iterator[str]:
    """The same for `abs_topk` and its backward."""
    for case in (TopkCase(*shape, dtype) for dtype in dtypes for shape in TOPK_SHAPES):
        generator = torch.Generator().manual_seed(case.tokens)
        x = torch.randn(case.tokens, case.width, generator=generator).to(device, case.torch_dtype)
        (problem,) = case.problems(device)
        for name in (name for name in names if backends.why_not(name, problem) is None):
            y = ops.abs_topk(x, case.k, name)
            if not torch.equal(y, reference.abs_topk(x, case.k)):
                yield f"{name} abs_topk {case}"
            back = ops.abs_topk_backward(x, y, name)
            if not torch.equal(back, reference.abs_topk_backward(x, y)):
                yield f"{name} abs_topk_backward {case}"


def main(names: Sequence[str]) -> int:
    """Runs everything; returns the exit status."""
    if reason := why_not("cuda"):
        print(reason, file=sys.stderr)
        return 2
    names = names or ("cuda", "triton")
    wrong = [*wrong_products("cuda", names), *wrong_topk("cuda", names)]
    torch.cuda.synchronize()
    print(*(f"WRONG: {line}" for line in wrong), f"{len(wrong)} wrong", sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
