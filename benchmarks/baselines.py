"""Ours and the dense baselines: ways to compute the three products that are compared.

Each candidate is a call without arguments over tensors that exist already. The dense baselines get
their best conditions: packed weights, activations in the dtype or layout they like best, and no
conversion is timed. Only `masked dense` is what people run today.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

import sparse_kernels as sk
from benchmarks.cases import Case
from benchmarks.timing import Candidate, sample_s
from sparse_kernels import ops
from sparse_kernels.testing import MatmulCase, allowed_error, make_problem, max_error

# A bfloat16 dense product that would take longer than this, and several times as long as fp32, is
# not timed.
BF16_MAX_SECONDS = 2.0
BF16_SLOWER = 4.0
PROBED_TOKENS = 32
PROBED_FEATURES = 256
# Rows of the result that are compared: enough to meet every tile, few enough for float64.
CHECKED_ROWS = 64
SHORT_NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


class Rival:
    """Another way to compute what ours computes.

    Its time is a candidate for the columns `GROUP_ms` of a row, which hold the least of each group.
    """

    def __init__(self, call: Candidate, *groups: str) -> None:
        self.call = call
        self.groups = groups


Rivals = dict[str, Rival]


@dataclass(frozen=True)
class Operands:
    """The tensors of one case. `weight` is the dense `W` with zeros, `mask` its pattern."""

    case: Case
    problem: MatmulCase
    weight: Tensor  # (N, K)
    mask: Tensor  # (N, K), 0 or 1 in the weight's dtype

    @classmethod
    def draw(cls, case: Case, seed: int = 0, device: torch.device | str = "cpu") -> Operands:
        """The seeded operands of a case; on a GPU the activations are drawn there, in seconds."""
        on_gpu = torch.device(device).type == "cuda"
        sizes = (case.in_features, case.out_features, case.fan_in, case.block, case.torch_dtype)
        tokens = 1 if on_gpu else case.tokens
        problem = make_problem(seed, tokens, *sizes, bias=False, device=device)
        if on_gpu:
            generator = torch.Generator(device).manual_seed(seed)
            x, grad = (
                torch.randn(case.tokens, n, generator=generator, device=device).to(case.torch_dtype)
                for n in (case.in_features, case.out_features)
            )
            problem = replace(problem, x=x, grad_output=grad)
        pattern = replace(problem, values=torch.ones_like(problem.values))
        return cls(case, problem, problem.dense_weight(), pattern.dense_weight())

    @property
    def x(self) -> Tensor:  # (M, K)
        return self.problem.x

    @property
    def grad_output(self) -> Tensor:  # (M, N)
        return self.problem.grad_output

    @property
    def used_in_features(self) -> int:
        """Inputs that at least one output reads."""
        return int(self.problem.layout.indices.unique().numel()) * self.case.block[1]


def ours(operands: Operands, product: str, backend: str) -> Candidate:
    """The product as users call it (without autograd's bookkeeping), schedules built already."""
    x, grad = operands.x, operands.grad_output
    values, layout = operands.problem.values, operands.problem.layout
    calls: dict[str, Candidate] = {
        "forward": lambda: sk.sparse_linear(x, values, layout, backend=backend),
        "grad_input": lambda: sk.sparse_linear(
            grad, values, layout, backend=backend, transpose=True
        ),
        "grad_weight": lambda: ops.grad_weight(grad, x, layout, backend),
    }
    return calls[product]


def under(call: Candidate, setting: str, value: int | str) -> Candidate:
    """The same call, with `torch.set_<setting>(value)` while it runs."""
    get, put = getattr(torch, f"get_{setting}"), getattr(torch, f"set_{setting}")

    def run() -> None:
        before = get()
        put(value)
        try:
            call()
        finally:
            put(before)

    return run


def with_precision(call: Candidate, precision: str) -> Candidate:
    """fp32 in and out; "medium" multiplies in bf16, on a GPU "high" in tf32, "highest" in fp32."""
    return under(call, "float32_matmul_precision", precision)


def masked_dense(operands: Operands, product: str) -> Candidate:
    """`linear(x, W * mask)`, and the backward that autograd derives from it.

    The masked weight is made in the forward, which saves it for the backward; the weight's gradient
    is masked.
    """
    x, grad, weight, mask = operands.x, operands.grad_output, operands.weight, operands.mask
    masked = weight * mask
    calls: dict[str, Candidate] = {
        "forward": lambda: functional.linear(x, weight * mask),
        "grad_input": lambda: grad @ masked,
        "grad_weight": lambda: (grad.t() @ x) * mask,
    }
    return calls[product]


def dense(
    operands: Operands,
    product: str,
    dtype: torch.dtype,
    tokens: slice = slice(None),
    outputs: slice = slice(None),
) -> Candidate:
    """`nn.Linear` of the full size, and the two products of its backward, with tensors in `dtype`.

    Times the same multiplications whatever the values are, so the masked operands serve. `tokens`
    and `outputs` make the product smaller.
    """
    x, grad = operands.x[tokens].to(dtype), operands.grad_output[tokens, outputs].to(dtype)
    weight = operands.weight[outputs].to(dtype)
    calls: dict[str, Candidate] = {
        "forward": lambda: functional.linear(x, weight),
        "grad_input": lambda: grad @ weight,
        "grad_weight": lambda: grad.t() @ x,
    }
    return calls[product]


def why_no_bf16_dense(operands: Operands, product: str) -> str | None:
    """A sentence if torch's bfloat16 dense product is slow, and too slow to time; else None.

    Without bfloat16 instructions it can run through a reference loop, up to hundreds of times
    slower than fp32, and would take an hour to time. Judged by a few tokens and outputs, where it
    must also be several times slower than fp32: what is left out can never be the best dense.
    """
    part = slice(PROBED_TOKENS), slice(PROBED_FEATURES)
    tokens, outputs = operands.grad_output.shape
    share = min(1, PROBED_TOKENS / tokens) * min(1, PROBED_FEATURES / outputs)
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        call = dense(operands, product, dtype, *part)
        call()
        seconds[dtype] = sample_s(call) / share
    bf16 = seconds[torch.bfloat16]
    if bf16 <= BF16_MAX_SECONDS or bf16 <= BF16_SLOWER * seconds[torch.float32]:
        return None
    return f"torch's bfloat16 dense product is not timed: it would take about {bf16:.0f} s"


def dense_onednn(operands: Operands, product: str, dtype: torch.dtype) -> Candidate:
    """oneDNN's inner product, weights packed beforehand.

    torch uses MKL for fp32, which is slow on processors that are not Intel's. In `grad_weight`
    nothing is constant: the packing of its second operand is part of the call.
    """
    x, grad, weight = (t.to(dtype) for t in (operands.x, operands.grad_output, operands.weight))
    linear = torch.ops.mkldnn._linear_pointwise
    pack = torch.ops.mkldnn._reorder_linear_weight
    if product == "grad_weight":
        return lambda: linear(grad.t().contiguous(), x.t(), None, "none", [], None)
    left, right = (x, weight) if product == "forward" else (grad, weight.t().contiguous())
    packed = pack(right, left.shape[0])
    return lambda: linear(left, packed, None, "none", [], None)


def dense_rivals(operands: Operands, product: str, *, bf16: bool) -> Rivals:
    """Every dense way there is in this process; a name ends with the precision of its products.

    torch's own bf16 is left out if `bf16` is False.
    """
    fp32 = dense(operands, product, torch.float32)
    calls: dict[str, Candidate] = {}
    if operands.x.is_cuda:
        dtype = operands.case.torch_dtype
        if dtype == torch.float32:
            calls["cuBLAS fp32"] = with_precision(fp32, "highest")
            calls["cuBLAS tf32"] = with_precision(fp32, "high")
        if dtype == torch.float16:
            calls["cuBLAS fp16"] = dense(operands, product, dtype)
        else:
            calls["cuBLAS bf16"] = dense(operands, product, torch.bfloat16)
    else:
        calls["torch fp32"] = fp32
        if bf16:
            calls["torch bf16"] = dense(operands, product, torch.bfloat16)
        if torch.backends.mkldnn.is_available():
            calls["oneDNN fp32"] = dense_onednn(operands, product, torch.float32)
            if torch.ops.mkldnn._is_mkldnn_bf16_supported():
                calls["oneDNN bf16"] = dense_onednn(operands, product, torch.bfloat16)
                if operands.case.dtype == "float32":
                    calls["torch via bf16"] = with_precision(fp32, "medium")
    library = "cuBLAS" if operands.x.is_cuda else "torch"
    stock = f"{library} {SHORT_NAMES[operands.case.dtype]}"
    return {
        name: Rival(
            call,
            "best_dense",
            *(["best_fp32_dense"] if name.endswith(" fp32") else []),
            *(["dense"] if name == stock else []),
        )
        for name, call in calls.items()
    }


@dataclass(frozen=True)
class Accuracy:
    """Errors, for products relative to the largest element in float64, and the verdict."""

    error: float
    torch_error: float
    correct: bool
    checked: str


def check(operands: Operands, product: str, call: Candidate, limit: int = CHECKED_ROWS) -> Accuracy:
    """Compares the call that is going to be timed with float64, beside torch's dense product.

    The verdict is that of the tests: at most twice torch's error in the same dtype, plus one
    rounding. Only `limit` rows of the result are compared, each of them whole: tokens, or for
    `grad_weight` output features, spread evenly from the first to the last.
    """
    problem, case = operands.problem, operands.case
    result = call()
    assert isinstance(result, Tensor)
    if product == "grad_weight":
        block_out = case.block[0]
        rows = _spread(problem.layout.block_rows, max(1, limit // block_out))
        features = (rows[:, None] * block_out + torch.arange(block_out)).flatten()
        part = replace(
            problem,
            layout=sk.FanInLayout(
                problem.layout.indices[rows], case.in_features, len(features), case.block
            ),
            values=problem.values[rows],
            grad_output=problem.grad_output[:, features],
        )
        checked = f"{len(features)} of {case.out_features} output features"
    else:
        rows = _spread(case.tokens, limit)
        part = replace(problem, x=problem.x[rows], grad_output=problem.grad_output[rows])
        checked = f"{len(rows)} of {case.tokens} tokens"
    truth, stock = part.reference64(product), part.torch_dense(product)
    error = max_error(result[rows], truth)
    largest = max(max_error(torch.zeros_like(truth), truth), torch.finfo(torch.float64).tiny)
    return Accuracy(
        error=min(error, sys.float_info.max) / largest,
        torch_error=max_error(stock, truth) / largest,
        correct=error <= allowed_error(stock, truth),
        checked=checked,
    )


def _spread(total: int, count: int) -> Tensor:
    """At most `count` row numbers, evenly from the first to the last."""
    numbers = torch.linspace(0, total - 1, min(total, count), dtype=torch.float64)
    return numbers.round().long()
