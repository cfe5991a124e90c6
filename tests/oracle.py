"""An independent dense oracle for the tests, and the problems that they draw.

Nothing here calls the code under test except `FanInLayout`'s constructor, whose format is checked
in test_layout.py against plain loops.
"""

import contextlib
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sparse_kernels as sk
from sparse_kernels import backends
from sparse_kernels.testing import max_error

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
BLOCKS = [(1, 1), (1, 2), (4, 1), (16, 1), (2, 3), (5, 3), (8, 8), (16, 16), (32, 32)]
PRODUCTS = ["forward", "grad_input", "grad_weight"]


@dataclass(frozen=True)
class Target:
    """A backend, and for `cpu` the instruction set that it runs on."""

    backend: str
    isa: str | None = None

    @property
    def device(self) -> str:
        return "cpu" if self.backend in ("reference", "cpu") else "cuda"

    def __str__(self) -> str:
        return self.backend if self.isa is None else f"{self.backend}-{self.isa}"

    def use(self) -> contextlib.AbstractContextManager:
        if self.isa is None:
            return contextlib.nullcontext()
        return sk.cpu.use_isa(self.isa)


def _targets() -> list[Target]:
    layout = sk.FanInLayout.random(2, 2, 1)
    problem = backends.problem_of(torch.ones(1, 2), layout, "forward")
    able = [name for name in backends.NAMES if backends.why_not(name, problem) is None]
    targets = []
    for name in able:
        targets += [Target(name, isa) for isa in (sk.cpu.isas() if name == "cpu" else [None])]
    return targets


TARGETS = _targets()


def to_dense(values: Tensor, layout: sk.FanInLayout) -> Tensor:
    """(N, K): W[r*bo + a, indices[r,f]*bi + b] = values[r, f, a, b]."""
    block_rows, _, block_out, block_in = values.shape
    cols = layout.in_features // block_in
    blocks = values.new_zeros(block_rows, cols, block_out, block_in)
    blocks[torch.arange(block_rows)[:, None], layout.indices.long()] = values
    return blocks.transpose(1, 2).reshape(block_rows * block_out, cols * block_in)


def kept(dense: Tensor, layout: sk.FanInLayout) -> Tensor:
    """The inverse gather: values (R, F, bo, bi) of a dense (N, K) matrix at the kept blocks."""
    block_out, block_in = layout.block
    rows, cols = dense.shape[0] // block_out, dense.shape[1] // block_in
    blocks = dense.reshape(rows, block_out, cols, block_in).transpose(1, 2)
    return blocks[torch.arange(rows)[:, None], layout.indices.long()]


def dense_product(
    product: str, x: Tensor, grad_output: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """One of the three products as a user writes it in dense PyTorch, in the dtype of its inputs.

    `bias` belongs to the product's output: (N,) for forward, (K,) for grad_input.
    """
    if product == "forward":
        return torch.nn.functional.linear(x, weight, bias)
    if product == "grad_input":
        return torch.nn.functional.linear(grad_output, weight.t(), bias)
    return grad_output.t() @ x


def sparse_product(
    product: str,
    x: Tensor,
    grad_output: Tensor,
    values: Tensor,
    layout: sk.FanInLayout,
    bias: Tensor | None,
    backend: str,
) -> Tensor:
    """The same product through the public function."""
    if product == "forward":
        return sk.sparse_linear(x, values, layout, bias, backend)
    if product == "grad_input":
        return sk.sparse_linear(grad_output, values, layout, bias, backend, transpose=True)
    leaf = values.detach().requires_grad_()
    y = sk.sparse_linear(x, leaf, layout, None, backend)
    return torch.autograd.grad(y, leaf, grad_output)[0]


def assert_accurate(
    actual: Tensor, torch_dense: Tensor, reference64: Tensor, terms64: Tensor
) -> None:
    """At most twice PyTorch's own error, plus one rounding of the largest sum of |terms|.

    `sparse_kernels.testing.allowed_error` adds one rounding of the largest result, which tiny
    problems can undercut: where a few terms cancel, PyTorch's own error may be zero by luck.
    """
    assert actual.dtype == torch_dense.dtype
    assert actual.shape == reference64.shape
    largest = float(terms64.max()) if terms64.numel() else 0.0
    allowed = 2 * max_error(torch_dense, reference64) + torch.finfo(actual.dtype).eps * largest
    error = max_error(actual, reference64)
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"


STRIDES = [
    "contiguous",
    "transposed",
    "row_gap",
    "col_step",
    "row_step",
    "unaligned",
    "one_row",
    "one_column",
    "one_element",
    "negated_view",
]


def random(shape, dtype: torch.dtype, generator, exact: bool) -> Tensor:
    """Normal numbers, or whole numbers so small that every sum of products is exact.

    With whole numbers each element of a right result is the one right number, rounded once.
    """
    if exact:
        return torch.randint(-15, 16, shape, generator=generator).to(dtype)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def strided(
    rows: int, cols: int, kind: str, dtype: torch.dtype, generator, exact: bool = False
) -> Tensor:
    """A random (rows, cols) tensor whose memory is laid out as `kind` says."""

    def normal(*shape: int) -> Tensor:
        return random(shape, dtype, generator, exact)

    if kind == "transposed":
        return normal(cols, rows).t()
    if kind == "row_gap":
        return normal(rows, cols + 3)[:, 1 : cols + 1]
    if kind == "col_step":
        return normal(rows, 2 * cols)[:, 1::2]
    if kind == "row_step":
        return normal(3 * rows, cols)[::3]
    if kind == "unaligned":
        return normal(rows * cols + 1)[1:].view(rows, cols)
    if kind == "one_row":
        return normal(1, cols).expand(rows, cols)
    if kind == "one_column":
        return normal(rows, 1).expand(rows, cols)
    if kind == "one_element":
        return normal(1, 1).expand(rows, cols)
    if (
        kind == "negated_view"
    ):  # memory holds the negative: whoever reads it raw gets the sign wrong
        return torch._neg_view(normal(rows, cols))
    return normal(rows, cols)


@st.composite
def layouts(draw, max_features: int = 150, blocks=BLOCKS) -> sk.FanInLayout:
    """Layouts of every block, odd sizes, fan-in from one block to all, and lopsided columns."""
    block_out, block_in = draw(st.sampled_from(blocks))
    rows = draw(st.integers(1, max(3, max_features // block_out)))
    cols = draw(st.integers(1, max(3, max_features // block_in)))
    per_row = draw(st.one_of(st.integers(1, cols), st.sampled_from([1, cols])))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    if draw(st.booleans()):
        score = torch.rand(rows, cols, generator=generator)
    else:  # all rows read the same columns: the others are unused, one list is as long as it gets
        score = torch.rand(1, cols, generator=generator).expand(rows, cols)
    indices = score.topk(per_row, dim=1).indices.sort(dim=1).values
    return sk.FanInLayout(indices, cols * block_in, rows * block_out, block=(block_out, block_in))


def tokens(largest: int = 300) -> st.SearchStrategy[int]:
    """Numbers of rows of activations: empty, one, around vector and tile widths, anything."""
    edges = [0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129]
    return st.one_of(st.sampled_from(edges), st.integers(0, largest))


def seeds() -> st.SearchStrategy[int]:
    return st.integers(0, 2**32)


class Largest(TorchDispatchMode):
    """Notes the largest memory, in elements, behind any tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.elements, self.name = 0, None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                elements = leaf.untyped_storage().nbytes() // leaf.element_size()
                if elements > self.elements:
                    self.elements, self.name = elements, str(func)
        return out
