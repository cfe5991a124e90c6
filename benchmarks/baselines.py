"""Ours, dense and other sparse libraries: ways to compute the three products.

Each candidate is a call without arguments over tensors that exist already. All get their best
conditions: weights in their own format, activations in the dtype or layout they like best, and no
conversion is timed, nor the transposition of a result. Only `masked dense` is what people run
today. A sparse peer's result is compared with ours, which was compared with float64, before it is
timed; on the CPU they take float32 alone.
"""

from __future__ import annotations

import functools
import glob
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

import sparse_kernels as sk
from benchmarks.cases import DTYPES, HEADLINES, SQUARES, Case
from benchmarks.timing import Candidate
from sparse_kernels import ops
from sparse_kernels.testing import MatmulCase, make_problem

# torch's bfloat16 products of more multiplications take seconds on processors that lack the
# instructions, where they were 8 and more times slower than fp32.
BF16_LOOP_MAX = 2**28
# The slowest peers multiply at less than 1 Gflop/s, and each is called about five times.
MAX_FLOPS = 2e9
# Two results that differ by more, relative to the largest element, are not the same.
TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 2e-3}
INSTALL = {
    "sparselab": "pip install --no-deps sparselab",
    "sparse_dot_mkl": "pip install mkl sparse-dot-mkl",
    "scipy": "pip install scipy",
}
SHORT_NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}

# The name of a baseline -> its call, and the columns `GROUP_ms` of a row that it may fill: a column
# holds the least of its group.
Rivals = dict[str, tuple[Candidate, list[str]]]
Ways = Iterator[tuple[str, Candidate]]


@dataclass(frozen=True, eq=False)
class Operands:
    """The tensors of one case. `weight` is the dense `W` with zeros, `mask` its pattern."""

    case: Case
    problem: MatmulCase
    weight: Tensor  # (N, K)
    mask: Tensor  # (N, K), 0 or 1 in the weight's dtype

    @classmethod
    def draw(cls, case: Case, device: str = "cpu") -> Operands:
        """The seeded operands of a case; the activations are drawn on the device."""
        dtype = DTYPES[case.dtype]
        sizes = (case.in_features, case.out_features, case.fan_in, case.block, dtype)
        drawn = make_problem(0, 1, *sizes, bias=False, device=device)
        generator = torch.Generator(device).manual_seed(0)
        x, grad = (
            torch.randn(case.tokens, features, generator=generator, device=device).to(dtype)
            for features in (case.in_features, case.out_features)
        )
        problem = replace(drawn, x=x, grad_output=grad)
        pattern = replace(problem, values=torch.ones_like(problem.values))
        return cls(case, problem, problem.dense_weight(), pattern.dense_weight())

    @property
    def used_in_features(self) -> int:
        """Inputs that at least one output reads."""
        return int(self.problem.layout.indices.unique().numel()) * self.case.block[1]


def ours(operands: Operands, product: str, backend: str) -> Callable[[], Tensor]:
    """The product as users call it (without autograd's bookkeeping), schedules built already."""
    problem = operands.problem
    x, grad, values, layout = problem.x, problem.grad_output, problem.values, problem.layout
    if product == "grad_weight":
        return lambda: ops.grad_weight(grad, x, layout, backend)
    left, transpose = (x, False) if product == "forward" else (grad, True)
    return lambda: sk.sparse_linear(left, values, layout, backend=backend, transpose=transpose)


def with_precision(call: Candidate, precision: str) -> Candidate:
    """fp32 in and out; "medium" multiplies in bf16, on a GPU "high" in tf32, "highest" in fp32."""

    def run() -> None:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            call()
        finally:
            torch.set_float32_matmul_precision(before)

    return run


def masked_dense(operands: Operands, product: str) -> Candidate:
    """`linear(x, W * mask)`, and the backward that autograd derives from it.

    The masked weight is made in the forward, which saves it for the backward; the weight's gradient
    is masked.
    """
    x, weight, mask = operands.problem.x, operands.weight, operands.mask
    if product == "forward":
        return lambda: linear(x, weight * mask)
    gradient = dense(operands, product, weight.dtype)
    return gradient if product == "grad_input" else lambda: gradient() * mask


def dense(operands: Operands, product: str, dtype: torch.dtype) -> Callable[[], Tensor]:
    """`nn.Linear` of the full size, and the two products of its backward, with tensors in `dtype`.

    Times the same multiplications whatever the values are, so the masked operands serve.
    """
    x, grad, weight = _tensors(operands, dtype)
    if product == "grad_weight":
        return lambda: grad.t() @ x
    return (lambda: linear(x, weight)) if product == "forward" else lambda: grad @ weight


def dense_onednn(operands: Operands, product: str, dtype: torch.dtype) -> Candidate:
    """oneDNN's inner product, weights packed beforehand.

    torch uses MKL for fp32, which is slow on processors that are not Intel's. In `grad_weight`
    nothing is constant: the packing of its second operand is part of the call.
    """
    x, grad, weight = _tensors(operands, dtype)
    multiply = torch.ops.mkldnn._linear_pointwise
    if product == "grad_weight":
        return lambda: multiply(grad.t().contiguous(), x.t(), None, "none", [], None)
    left, right = (x, weight) if product == "forward" else (grad, weight.t().contiguous())
    packed = torch.ops.mkldnn._reorder_linear_weight(right, left.shape[0])
    return lambda: multiply(left, packed, None, "none", [], None)


def _tensors(operands: Operands, dtype: torch.dtype) -> list[Tensor]:
    problem = operands.problem
    return [tensor.to(dtype) for tensor in (problem.x, problem.grad_output, operands.weight)]


def has_bf16_dense() -> bool:
    """Whether this processor has bfloat16 instructions for torch's dense products.

    Without them they run through a reference loop, up to hundreds of times slower than fp32.
    """
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def rivals(
    operands: Operands, product: str, ours: Candidate | None
) -> tuple[Rivals, dict[str, str]]:
    """Masked dense, every dense way there is and sparse ways, and why some are left out.

    Sparse results are compared with that of ours; without ours no rival is sparse or compiled. What
    is left out since it would take seconds can never be the best dense.
    """
    case, on_gpu = operands.case, operands.weight.is_cuda
    is_small = case.tokens * case.in_features * case.out_features <= BF16_LOOP_MAX
    has_bf16 = on_gpu or is_small or has_bf16_dense()
    found: Rivals = {}
    notes: dict[str, str] = {}
    if has_bf16 or case.dtype != "bfloat16":
        masked = masked_dense(operands, product)
        found["masked dense"] = masked, ["masked_dense"]
        if ours is not None and on_gpu and case in HEADLINES:
            compiled = torch.compile(masked, fullgraph=True, dynamic=False)
            found["compiled masked"] = compiled, ["compiled_masked"]
    if not has_bf16:
        note = "torch's bfloat16 dense product is not timed: it takes seconds on this processor"
        notes["bf16_dense_note"] = note
    stock = f"{'cuBLAS' if on_gpu else 'torch'} {SHORT_NAMES[case.dtype]}"
    for name, call in _dense_ways(operands, product, bf16=has_bf16):
        found[name] = call, ["best_dense", *(["dense"] if name == stock else [])]
    if ours is None:
        return found, notes
    sparse, more = sparse_rivals(operands, product, ours)
    return found | sparse, notes | more


def _dense_ways(operands: Operands, product: str, *, bf16: bool) -> Ways:
    """A name says the precision of the products; without `bf16` torch's own bf16 is left out."""
    fp32 = dense(operands, product, torch.float32)
    dtype = operands.case.dtype
    if operands.weight.is_cuda:
        if dtype == "float32":
            yield "cuBLAS fp32", with_precision(fp32, "highest")
            yield "cuBLAS tf32", with_precision(fp32, "high")
        other = "float16" if dtype == "float16" else "bfloat16"
        yield f"cuBLAS {SHORT_NAMES[other]}", dense(operands, product, DTYPES[other])
        return
    yield "torch fp32", fp32
    if bf16:
        yield "torch bf16", dense(operands, product, torch.bfloat16)
    if torch.backends.mkldnn.is_available():
        yield "oneDNN fp32", dense_onednn(operands, product, torch.float32)
        if has_bf16_dense():
            yield "oneDNN bf16", dense_onednn(operands, product, torch.bfloat16)
            if dtype == "float32":
                yield "torch via bf16", with_precision(fp32, "medium")


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def missing_peers() -> list[str]:
    """A sentence for each peer that is not installed."""
    return [
        f"{package} is not compared: it is not installed ({command})"
        for package, command in INSTALL.items()
        if not _is_installed(package)
    ]


def sparse_rivals(
    operands: Operands, product: str, ours: Candidate
) -> tuple[Rivals, dict[str, str]]:
    """The peers that compute the product right, and a note about those that do not."""
    case, on_gpu = operands.case, operands.mask.is_cuda
    if not on_gpu and case.dtype != "float32":
        return {}, {"sparse_note": f"sparse peers have no {case.dtype}"}
    if not on_gpu and 2.0 * case.tokens * case.out_features * case.fan_in > MAX_FLOPS:
        return {}, {"sparse_note": "a sparse peer would take many seconds"}
    expected = _values(ours(), operands)
    scale = float(expected.abs().max()) or 1.0
    found: Rivals = {}
    problems = []
    for ways in (_torch_csr, _torch_bsr) if on_gpu else (_torch_csr, _sparselab, _scipy_and_mkl):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # CSR and BSR are in beta
                for name, call in ways(operands, product):
                    error = float((_values(call(), operands) - expected).abs().max()) / scale
                    if error <= TOLERANCES[case.dtype]:
                        found[name] = call, ["best_sparse"]
                    else:
                        off = f"its {product} is off by {error:.0e}"
                        problems.append(f"{name} is not compared: {off}")
        except (RuntimeError, ValueError, AssertionError) as error:
            # torch's products differ between versions in what they refuse.
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            problems.append(f"{ways.__name__[1:]} refuses {product}: {reason}")
    return found, {"sparse_note": "; ".join(problems)} if problems else {}


def _values(result: object, operands: Operands) -> Tensor:
    """A result as a tensor, that of grad_weight as the kept values in the order of CSR."""
    if not isinstance(result, Tensor):
        return torch.as_tensor(result)
    if result.shape == operands.problem.values.shape:
        return sk.to_dense(result, operands.problem.layout)[operands.mask.bool()]
    if result.layout == torch.sparse_bsr:
        return result.to_dense()[operands.mask.bool()]
    return result.values() if result.layout == torch.sparse_csr else result


def _sides(operands: Operands, product: str) -> tuple[Tensor, Tensor]:
    """Forward's or grad_input's dense matrix (rows, columns) and the activations."""
    if product == "forward":
        return operands.weight, operands.problem.x
    return operands.weight.t(), operands.problem.grad_output


@functools.lru_cache(1)
def _csr(operands: Operands, is_transposed: bool) -> Tensor:
    matrix, mask = (t.t() if is_transposed else t for t in (operands.weight, operands.mask))
    csr = mask.to_sparse_csr()
    # MKL multiplies with 32-bit indices; given 64-bit ones torch converts them at every call.
    indices = csr.crow_indices().int(), csr.col_indices().int()
    return torch.sparse_csr_tensor(*indices, matrix[mask.bool()], matrix.shape)


def _sampled(operands: Operands, pattern: Tensor) -> Candidate:
    """grad_weight at the places of a matrix: autograd has no rule for CSR weights."""
    x, left = operands.problem.x, operands.problem.grad_output.t().contiguous()
    return lambda: torch.sparse.sampled_addmm(pattern, left, x, beta=0.0)


def _torch_csr(operands: Operands, product: str) -> Ways:
    if not operands.mask.is_cuda and not torch.backends.mkl.is_available():
        return
    if product == "grad_weight":
        yield "torch CSR", _sampled(operands, _csr(operands, False))
        return
    _, activations = _sides(operands, product)
    matrix, feature_major = _csr(operands, product != "forward"), activations.t().contiguous()
    yield "torch CSR", lambda: torch.sparse.mm(matrix, activations.t()).t()
    yield "torch CSR feature-major", lambda: (matrix @ feature_major).t()


def _torch_bsr(operands: Operands, product: str) -> Ways:
    block = operands.case.block
    if block not in SQUARES:  # those that torch's BSR kernels take
        return
    if product == "grad_weight":
        yield "torch BSR", _sampled(operands, operands.mask.to_sparse_bsr(block))
        return
    dense, activations = _sides(operands, product)
    matrix = dense.contiguous().to_sparse_bsr(block)
    yield "torch BSR", lambda: linear(activations, matrix)


def _sparselab(operands: Operands, product: str) -> Ways:
    if not _is_installed("sparselab"):
        return
    import sparselab

    core, problem = sparselab._core, operands.problem
    weight = sparselab.PaddedCSR.from_torch_sparse_csr(_csr(operands, False))
    x, grad = (t.t().contiguous().numpy() for t in (problem.x, problem.grad_output))
    if product == "grad_weight":
        kept = torch.from_numpy(weight.col_indices.copy()) >= 0  # the rest is padding
        if bool(kept.all()):
            yield "SparseLab", lambda: core.spmm_grad_w_simd(weight, grad, x)
        else:
            yield "SparseLab", lambda: torch.as_tensor(core.spmm_grad_w_simd(weight, grad, x))[kept]
        return
    matrix, activations = (weight, x) if product == "forward" else (weight.transpose(), grad)
    yield "SparseLab", lambda: core.spmm_simd(matrix, activations).T


def _scipy_and_mkl(operands: Operands, product: str) -> Ways:
    """Both multiply scipy's CSR with feature-major activations; neither has grad_weight."""
    if product == "grad_weight" or not _is_installed("scipy"):
        return
    import scipy.sparse

    _, activations = _sides(operands, product)
    csr, right = _csr(operands, product != "forward"), activations.t().contiguous().numpy()
    parts = (csr.values().numpy(), csr.col_indices().numpy(), csr.crow_indices().numpy())
    matrix = scipy.sparse.csr_matrix(parts, csr.shape)
    yield "scipy", lambda: (matrix @ right).T
    if _is_installed("sparse_dot_mkl"):
        if libraries := glob.glob(os.path.join(sys.prefix, "lib", "libmkl_rt.so*")):
            os.environ.setdefault("MKL_RT", libraries[0])
        try:
            from sparse_dot_mkl import dot_product_mkl
        except (ImportError, OSError):
            return
        multiply: Any = dot_product_mkl
        yield "MKL", lambda: torch.as_tensor(multiply(matrix, right)).t()
