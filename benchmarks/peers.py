"""Other sparse libraries: torch CSR, SparseLab, MKL and scipy where installed; on a GPU torch's.

    pip install scipy mkl sparse-dot-mkl && pip install --no-deps sparselab

A peer keeps W in its own format and gets activations feature-major or token-major, as it likes
best; neither conversion is timed, nor the transposition of its result. Every result is compared
with ours, which was compared with float64, before it is timed. On the CPU all take float32 alone.
"""

from __future__ import annotations

import glob
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import sparse_kernels as sk
from benchmarks.baselines import Operands, Rivals
from benchmarks.timing import Candidate

# The slowest peers multiply at less than 1 Gflop/s, and each is called about five times.
MAX_FLOPS = 2e9
# Two results that differ by more, relative to the largest element, are not the same.
TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 2e-3}
# Blocks that torch's BSR kernels take.
BSR_BLOCKS = ((16, 16), (32, 32), (64, 64), (128, 128))
INSTALL = {
    "sparselab": "pip install --no-deps sparselab",
    "sparse_dot_mkl": "pip install mkl sparse-dot-mkl",
    "scipy": "pip install scipy",
}
Ways = Iterator[tuple[str, Candidate]]


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def missing() -> list[str]:
    """A sentence for each peer that is not installed."""
    return [
        f"{package} is not compared: it is not installed ({command})"
        for package, command in INSTALL.items()
        if not _is_installed(package)
    ]


def rivals(operands: Operands, product: str, ours: Candidate) -> tuple[Rivals, dict[str, str]]:
    """The peers that compute the product right, and a note about those that do not."""
    case, on_gpu = operands.case, operands.mask.is_cuda
    if not on_gpu and case.dtype != "float32":
        return {}, {"sparse_note": f"sparse peers have no {case.dtype}"}
    if not on_gpu and 2.0 * case.tokens * case.out_features * case.fan_in > MAX_FLOPS:
        return {}, {"sparse_note": "a sparse peer would take many seconds"}
    expected = _expected(operands, product, ours)
    scale = float(expected.abs().max()) or 1.0
    found: Rivals = {}
    problems = []
    for ways in (_torch_csr, _torch_bsr) if on_gpu else (_torch_csr, _sparselab, _scipy_and_mkl):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # CSR and BSR are in beta
                for name, call in ways(operands, product):
                    error = float((_dense(call(), operands) - expected).abs().max()) / scale
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


def _expected(operands: Operands, product: str, ours: Candidate) -> Tensor:
    result = ours()
    assert isinstance(result, Tensor)
    if product != "grad_weight":
        return result
    # Values in the order of CSR.
    return sk.to_dense(result, operands.problem.layout)[operands.mask.bool()]


def _dense(result: object, operands: Operands) -> Tensor:
    if not isinstance(result, Tensor):
        return torch.as_tensor(result)
    if result.layout == torch.sparse_bsr:
        return result.to_dense()[operands.mask.bool()]
    return result.values() if result.layout == torch.sparse_csr else result


def _sides(operands: Operands, product: str) -> tuple[Tensor, Tensor, Tensor]:
    """Forward's or grad_input's dense matrix (rows, columns), its pattern and the activations."""
    if product == "forward":
        return operands.weight, operands.mask, operands.problem.x
    return operands.weight.t(), operands.mask.t(), operands.problem.grad_output


def _csr(matrix: Tensor, pattern: Tensor) -> Tensor:
    # MKL multiplies with 32-bit indices; given 64-bit ones torch converts them at every call.
    kept = pattern.to_sparse_csr()
    crow, columns = kept.crow_indices(), kept.col_indices()
    rows = torch.repeat_interleave(torch.arange(len(crow) - 1, device=crow.device), crow.diff())
    values = matrix[rows, columns]
    return torch.sparse_csr_tensor(crow.int(), columns.int(), values, matrix.shape)


def _torch_csr(operands: Operands, product: str) -> Ways:
    """`sampled_addmm` is the gradient of the weight: autograd has no rule for CSR weights."""
    if not operands.mask.is_cuda and not torch.backends.mkl.is_available():
        return
    if product == "grad_weight":
        pattern, x = _csr(operands.mask, operands.mask), operands.problem.x
        left = operands.problem.grad_output.t().contiguous()
        yield "torch CSR", lambda: torch.sparse.sampled_addmm(pattern, left, x, beta=0.0)
        return
    dense, mask, activations = _sides(operands, product)
    matrix, feature_major = _csr(dense, mask), activations.t().contiguous()
    yield "torch CSR", lambda: torch.sparse.mm(matrix, activations.t()).t()
    yield "torch CSR feature-major", lambda: (matrix @ feature_major).t()


def _torch_bsr(operands: Operands, product: str) -> Ways:
    block = operands.case.block
    if block not in BSR_BLOCKS:
        return
    if product == "grad_weight":
        pattern, x = operands.mask.to_sparse_bsr(block), operands.problem.x
        left = operands.problem.grad_output.t().contiguous()
        yield "torch BSR", lambda: torch.sparse.sampled_addmm(pattern, left, x, beta=0.0)
        return
    dense, _, activations = _sides(operands, product)
    matrix = dense.contiguous().to_sparse_bsr(block)
    yield "torch BSR", lambda: functional.linear(activations, matrix)


def _sparselab(operands: Operands, product: str) -> Ways:
    if not _is_installed("sparselab"):
        return
    import sparselab

    core, problem = sparselab._core, operands.problem
    weight = sparselab.PaddedCSR.from_torch_sparse_csr(_csr(operands.weight, operands.mask))
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

    dense, _, activations = _sides(operands, product)
    matrix, right = scipy.sparse.csr_matrix(dense.numpy()), activations.t().contiguous().numpy()
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
