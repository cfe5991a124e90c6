"""Random products against dense PyTorch until time is up: `python tests/fuzz.py --minutes 60`.

Each case follows from one number, which a failure prints: `--seed N --cases 1` replays it. Drawn
are sizes, blocks, fan-in, how lopsided the pattern is, strides, dtype, operands of wildly different
magnitude (the weights too), the instruction set and the number of threads. Each product runs twice:
the second call with a layout takes a shorter way to the same kernel.
"""

import argparse
import contextlib
import time
from collections.abc import Sequence

import torch
from oracle import BLOCKS, DTYPES, PRODUCTS, STRIDES, dense_product, kept, sparse_product, to_dense
from torch import Tensor

import sparse_kernels as sk
from sparse_kernels import cpu
from sparse_kernels.testing import max_error


def _pick(options: Sequence, generator: torch.Generator):
    return options[int(torch.randint(len(options), (), generator=generator))]


def _layout(generator: torch.Generator) -> sk.FanInLayout:
    block = _pick(BLOCKS, generator)
    most = _pick((40, 300, 3000), generator)
    rows, cols = (
        int(torch.randint(1, max(2, most // side + 1), (), generator=generator)) for side in block
    )
    per_row = _pick((1, min(cols, 8), cols, max(1, cols // 7)), generator)
    if rows * cols > 1 << 18:
        per_row = min(per_row, 16)
    # The larger the power, the more rows read the same few columns.
    weights = torch.rand(cols, generator=generator) ** _pick((0.0, 4.0, 30.0), generator)
    noise = torch.rand(rows, cols, generator=generator).clamp_min(1e-9)
    score = noise ** (1 / (weights + 1e-6))
    indices = score.topk(per_row, dim=1).indices.sort(dim=1).values
    return sk.FanInLayout(indices, cols * block[1], rows * block[0], block)


def _matrix(rows: int, cols: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Any strides; normal, or of magnitudes from 1e-6 to 1e6, or with exact zeros."""
    wide = torch.randn(3 * rows + 1, 2 * cols + 3, generator=generator, dtype=torch.float64)
    kind = _pick(("normal", "magnitudes", "zeros"), generator)
    if kind == "magnitudes":
        wide *= 10.0 ** (12 * torch.rand(wide.shape, generator=generator, dtype=wide.dtype) - 6)
    if kind == "zeros":
        wide *= torch.rand(wide.shape, generator=generator) < 0.3
    wide = wide.to(dtype)
    stride = _pick(STRIDES, generator)
    if stride == "transposed":
        return wide[:rows, :cols].t().contiguous().t()
    if stride == "col_step":
        return wide[:rows, 1 : 2 * cols : 2]
    if stride == "row_step":
        return wide[: 3 * rows : 3, :cols]
    if stride in ("row_gap", "unaligned"):
        return wide[:rows, 1 : cols + 1]
    if stride == "one_row":
        return wide[:1, :cols].expand(rows, cols)
    if stride == "negated_view":
        return torch._neg_view(wide[:rows, :cols].contiguous())
    return wide[:rows, :cols].contiguous()


def check(seed: int, isas: Sequence[str] = ()) -> None:
    """Raises AssertionError, with the seed, if a product is less accurate than PyTorch allows.

    One of the instruction sets, by default of all, is drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    layout = _layout(generator)
    dtype = _pick(DTYPES, generator)
    tokens = _pick((0, 1, 2, 3, 8, 9, 31, 33, 64, 129, 300, 2100), generator)
    x = _matrix(tokens, layout.in_features, dtype, generator)
    grad_output = _matrix(tokens, layout.out_features, dtype, generator)
    size = layout.block[0] * layout.block[1]
    values = _matrix(layout.num_blocks, size, dtype, generator).reshape(layout.values_shape)
    isa, threads = _pick(isas or cpu.isas(), generator), _pick((1, 2, 3, 8), generator)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with cpu.use_isa(isa) if isa else contextlib.nullcontext():
            for product in PRODUCTS:
                _check_product(product, x, grad_output, values, layout, f"{isa} {threads}", seed)
    finally:
        torch.set_num_threads(before)


def _exact(product: str, x: Tensor, grad_output: Tensor, weight: Tensor) -> Tensor:
    """The product in float64 with a compensated sum: 16 terms at a time err by 16 roundings."""
    left, right = {
        "forward": (x, weight.t()),
        "grad_input": (grad_output, weight),
        "grad_weight": (grad_output.t(), x),
    }[product]
    total = lost = left.new_zeros(left.shape[0], right.shape[1])
    for some_left, some_right in zip(left.split(16, dim=1), right.split(16), strict=True):
        part = some_left @ some_right
        after = total + part
        added = after - total
        lost = lost + (total - (after - added)) + (part - added)
        total = after
    return total + lost


def _check_product(
    product: str,
    x: Tensor,
    grad_output: Tensor,
    values: Tensor,
    layout: sk.FanInLayout,
    where: str,
    seed: int,
) -> None:
    weight = to_dense(values, layout)
    actual, again = (
        sparse_product(product, x, grad_output, values, layout, None, "cpu") for _ in range(2)
    )
    assert torch.equal(actual, again), f"--seed {seed}: {product} {layout} differs the second time"

    def stored(result: Tensor) -> Tensor:
        return kept(result, layout) if product == "grad_weight" else result

    operands = x, grad_output, weight
    wide = [t.double() for t in operands]
    exact = _exact if x.dtype == torch.float64 else dense_product
    truth = stored(exact(product, *wide))
    terms = stored(dense_product(product, *(t.abs() for t in wide)))
    own = max_error(stored(dense_product(product, *operands)), truth)
    rounding = torch.finfo(x.dtype).eps * (float(terms.max()) if terms.numel() else 0.0)
    if x.dtype == torch.float64:
        rounding *= 16  # the truth's
    error = max_error(actual, truth)
    assert error <= 2 * own + rounding, (
        f"--seed {seed}: {product} {tuple(x.shape)} {x.dtype} {layout} on {where}: "
        f"error {error:.3e}, PyTorch's own {own:.3e}, a rounding {rounding:.3e}"
    )


def main() -> None:
    """Runs cases until the time or their number is over; the first failure ends it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0, help="time limit")
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    parser.add_argument("--cases", type=int, default=2**62, help="number of cases")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    seed = options.seed
    while seed < options.seed + options.cases and time.monotonic() < end:
        check(seed)
        seed += 1
    print(f"{seed - options.seed} cases from seed {options.seed}: nothing found")


if __name__ == "__main__":
    main()
