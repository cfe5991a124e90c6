"""Every GPU kernel once on small shapes, checked: for `compute-sanitizer`, under which all is slow.

    compute-sanitizer --tool memcheck --error-exitcode 1 python -m benchmarks.gpu.small

Odd sizes, empty inputs, strided inputs, blocks of every backend, all dtypes; the exit status is 1
if a result is wrong. PYTORCH_NO_CUDA_MEMORY_CACHING=1 gives each tensor memory of its own, so that
an access outside of one is seen.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch

from benchmarks.cases import DTYPES, PRODUCTS
from benchmarks.devices import why_not
from sparse_kernels import backends, ops, reference
from sparse_kernels.layout import Problem
from sparse_kernels.testing import MatmulCase, allowed_error, make_problem, max_error

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
TOPK_SHAPES = ((5, 33, 7), (3, 2048, 512), (1, 9000, 1), (0, 16, 4))


def wrong_products(device: str, names: tuple[str, ...]) -> Iterator[str]:
    """Runs every product of every shape and dtype on each backend that can; yields what is off."""
    for name in names:
        for dtype in DTYPES.values():
            for tokens, in_features, out_features, fan_in, block in SHAPES:
                sizes = (in_features, out_features, fan_in)
                if any(
                    backends.why_not(
                        name,
                        Problem(device, dtype, product, out_features, in_features, fan_in, block),
                    )
                    for product in PRODUCTS
                ):
                    continue
                case = make_problem(0, tokens, *sizes, block, dtype, device=device)
                for product in PRODUCTS:
                    actual = run(case, product, name)
                    truth, stock = case.reference64(product), case.torch_dense(product)
                    if not max_error(actual, truth) <= allowed_error(stock, truth):
                        yield f"{name} {product} {dtype} {tokens} {sizes} {block}"


def run(case: MatmulCase, product: str, backend: str) -> torch.Tensor:
    """One product of the case, with an input whose rows are not adjacent."""
    x, grad = (torch.cat([t, t], dim=1)[:, : t.shape[1]] for t in (case.x, case.grad_output))
    if product == "forward":
        return ops.forward(x, case.values, case.layout, case.bias, backend)
    if product == "grad_input":
        return ops.grad_input(grad, case.values, case.layout, case.input_bias, backend)
    return ops.grad_weight(grad, x, case.layout, backend)


def wrong_topk(device: str, names: tuple[str, ...]) -> Iterator[str]:
    """The same for `abs_topk` and its backward."""
    for name in names:
        for dtype in DTYPES.values():
            if backends.why_not(name, Problem(device, dtype, "abs_topk")):
                continue
            for rows, columns, k in TOPK_SHAPES:
                generator = torch.Generator().manual_seed(rows)
                x = torch.randn(rows, columns, generator=generator).to(device, dtype)
                y = ops.abs_topk(x, k, name)
                if not torch.equal(y, reference.abs_topk(x, k)):
                    yield f"{name} abs_topk {dtype} {(rows, columns, k)}"
                back = ops.abs_topk_backward(x, y, name)
                if not torch.equal(back, reference.abs_topk_backward(x, y)):
                    yield f"{name} abs_topk_backward {dtype} {(rows, columns, k)}"


def main() -> int:
    """Runs everything; returns the exit status."""
    reason = why_not("cuda")
    if reason is not None:
        print(reason, file=sys.stderr)
        return 2
    names = ("cuda", "triton")
    wrong = [*wrong_products("cuda", names), *wrong_topk("cuda", names)]
    torch.cuda.synchronize()
    print(*(f"WRONG: {line}" for line in wrong), sep="\n")
    print(f"{len(wrong)} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
