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
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import sparse_kernels as sk
from benchmarks.baselines import Operands, Rival, Rivals
from benchmarks.timing import Candidate

# Peers multiply at about 4 to 50 Gflop/s. A case of more work than this would take seconds.
MAX_FLOPS = 16e9
# Two results that differ by more, relative to the largest element, are not the same.
TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 2e-3}
# Blocks that torch's BSR kernels take.
BSR_SIDES = (16, 32, 64, 128)
INSTALL = {
    "sparselab": "pip install --no-deps sparselab",
    "sparse_dot_mkl": "pip install mkl sparse-dot-mkl",
    "scipy": "pip install scipy",
}


def missing() -> list[str]:
    """A sentence for each peer that is not installed."""
    return [
        f"{package} is not compared: it is not installed ({command})"
        for package, command in INSTALL.items()
        if importlib.util.find_spec(package) is None
    ]


def why_none(operands: Operands) -> str | None:
    """None if peers can run the case, else a sentence."""
    case = operands.case
    if operands.x.is_cuda:
        return None
    if case.dtype != "float32":
        return f"sparse peers have no {case.dtype}"
    if 2.0 * case.tokens * case.out_features * case.fan_in > MAX_FLOPS:
        return "a call of a sparse peer would take seconds"
    return None


def rivals(operands: Operands, product: str, ours: Candidate) -> tuple[Rivals, str | None]:
    """The peers that compute the product right, and a sentence about those that do not."""
    if reason := why_none(operands):
        return {}, reason
    found: Rivals = {}
    problems = []
    expected = _expected(operands, product, ours)
    scale = float(expected.abs().max()) or 1.0
    on_gpu = operands.x.is_cuda
    for build in (_torch_csr, _torch_bsr) if on_gpu else (_torch_csr, _sparselab, _mkl, _scipy):
        try:
            for name, call in build(operands, product):
                error = float((_dense(call(), operands, product) - expected).abs().max()) / scale
                if error <= TOLERANCES[operands.case.dtype]:
                    groups = [name[:9].lower().replace(" ", "_")] if name[:5] == "torch" else []
                    found[name] = Rival(call, "best_sparse", *groups)
                else:
                    problems.append(f"{name} is not compared: its {product} is off by {error:.0e}")
        except (RuntimeError, ValueError, AssertionError) as error:
            # torch's products differ between versions in what they refuse.
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            problems.append(f"{build.__name__[1:]} refuses {product}: {reason}")
    return found, "; ".join(problems) or None


def _expected(operands: Operands, product: str, ours: Candidate) -> Tensor:
    result = ours()
    assert isinstance(result, Tensor)
    if product != "grad_weight":
        return result
    # Values in the order of CSR.
    return sk.to_dense(result, operands.problem.layout)[operands.mask.bool()]


def _dense(result: object, operands: Operands, product: str) -> Tensor:
    if not isinstance(result, Tensor):
        return torch.as_tensor(result)
    if result.layout == torch.sparse_bsr:
        return result.to_dense()[operands.mask.bool()]
    return result.values() if result.layout == torch.sparse_csr else result


Built = Iterator[tuple[str, Candidate]]


def _sides(operands: Operands, product: str) -> tuple[Tensor, Tensor]:
    """The matrix of forward or grad_input, dense (rows, columns), and the activations."""
    if product == "forward":
        return operands.weight, operands.x
    return operands.weight.t(), operands.grad_output


def _csr(matrix: Tensor, pattern: Tensor) -> Tensor:
    # MKL multiplies with 32-bit indices; given 64-bit ones torch converts them at every call.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # CSR is in beta
        kept = pattern.to_sparse_csr()
        crow, columns = kept.crow_indices(), kept.col_indices()
        rows = torch.repeat_interleave(torch.arange(len(crow) - 1, device=crow.device), crow.diff())
        values = matrix[rows, columns]
        return torch.sparse_csr_tensor(crow.int(), columns.int(), values, matrix.shape)


def _torch_csr(operands: Operands, product: str) -> Built:
    """`sampled_addmm` is the gradient of the weight: autograd has no rule for CSR weights."""
    if not operands.x.is_cuda and not torch.backends.mkl.is_available():
        return
    x, grad, mask = operands.x, operands.grad_output, operands.mask
    if product == "grad_weight":
        pattern, left = _csr(mask, mask), grad.t().contiguous()
        yield "torch CSR", lambda: torch.sparse.sampled_addmm(pattern, left, x, beta=0.0)
        return
    dense, activations = _sides(operands, product)
    matrix = _csr(dense, mask if product == "forward" else mask.t())
    feature_major = activations.t().contiguous()
    yield "torch CSR", lambda: torch.sparse.mm(matrix, activations.t()).t()
    yield "torch CSR feature-major", lambda: (matrix @ feature_major).t()


def _torch_bsr(operands: Operands, product: str) -> Built:
    block = operands.case.block
    if block[0] != block[1] or block[0] not in BSR_SIDES:
        return
    x, grad = operands.x, operands.grad_output
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # BSR is in beta
        if product == "grad_weight":
            pattern, left = operands.mask.to_sparse_bsr(block), grad.t().contiguous()
            yield "torch BSR", lambda: torch.sparse.sampled_addmm(pattern, left, x, beta=0.0)
            return
        dense, activations = _sides(operands, product)
        matrix = dense.contiguous().to_sparse_bsr(block)
        yield "torch BSR", lambda: functional.linear(activations, matrix)


def _sparselab(operands: Operands, product: str) -> Built:
    if importlib.util.find_spec("sparselab") is None:
        return
    import sparselab

    core = sparselab._core
    weight = sparselab.PaddedCSR.from_torch_sparse_csr(_csr(operands.weight, operands.mask))
    x, grad = (t.t().contiguous().numpy() for t in (operands.x, operands.grad_output))
    if product == "grad_weight":
        kept = torch.from_numpy(weight.col_indices.copy()) >= 0  # the rest is padding
        if bool(kept.all()):
            yield "SparseLab", lambda: core.spmm_grad_w_simd(weight, grad, x)
        else:
            yield "SparseLab", lambda: torch.as_tensor(core.spmm_grad_w_simd(weight, grad, x))[kept]
        return
    matrix, activations = (weight, x) if product == "forward" else (weight.transpose(), grad)
    yield "SparseLab", lambda: core.spmm_simd(matrix, activations).T


def _mkl(operands: Operands, product: str) -> Built:
    if product == "grad_weight" or importlib.util.find_spec("sparse_dot_mkl") is None:
        return
    libraries = glob.glob(os.path.join(sys.prefix, "lib", "libmkl_rt.so*"))
    if libraries:
        os.environ.setdefault("MKL_RT", libraries[0])
    try:
        from sparse_dot_mkl import dot_product_mkl
    except (ImportError, OSError):
        return
    matrix, right = _scipy_operands(operands, product)
    multiply: Callable[..., object] = dot_product_mkl
    yield "MKL", lambda: torch.as_tensor(multiply(matrix, right)).t()


def _scipy(operands: Operands, product: str) -> Built:
    if product == "grad_weight" or importlib.util.find_spec("scipy") is None:
        return
    matrix, right = _scipy_operands(operands, product)
    yield "scipy", lambda: (matrix @ right).T


def _scipy_operands(operands: Operands, product: str) -> tuple[Any, Any]:
    """The matrix as scipy's CSR, and the activations feature-major."""
    import scipy.sparse

    dense, activations = _sides(operands, product)
    return scipy.sparse.csr_matrix(dense.numpy()), activations.t().contiguous().numpy()
