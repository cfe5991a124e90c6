"""What there is to beat on a GPU: cuBLAS in every precision, compiled masked dense, torch's sparse.

As on the processor each gets every benefit of the doubt: operands in the dtype and layout that it
likes best, converted before the clock starts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import baselines
from benchmarks.baselines import Operands
from benchmarks.gpu.ceilings import tf32
from benchmarks.timing import Candidate

# Blocks that torch's BSR kernels take.
BSR_SIDES = (16, 32, 64, 128)
COMPILE_MODE = "max-autotune-no-cudagraphs"


def dense_candidates(operands: Operands, product: str) -> dict[str, Candidate]:
    """cuBLAS in the dtype of the case; for float32 also in its short form and in bfloat16.

    A name ends with the precision of the multiplications.
    """
    dtype = operands.case.torch_dtype
    call = baselines.dense(operands, product, dtype)
    if dtype != torch.float32:
        return {same_dtype(operands): call}

    def short() -> None:
        with tf32(True):
            call()

    def exact() -> None:
        with tf32(False):
            call()

    return {
        "cuBLAS fp32": exact,
        "cuBLAS tf32": short,
        "cuBLAS bf16": baselines.dense(operands, product, torch.bfloat16),
    }


def same_dtype(operands: Operands) -> str:
    """The name of the dense candidate in the dtype of the case."""
    return {torch.float32: "cuBLAS fp32", torch.bfloat16: "cuBLAS bf16"}.get(
        operands.case.torch_dtype, "cuBLAS fp16"
    )


def masked_candidates(operands: Operands, product: str, *, compiled: bool) -> dict[str, Candidate]:
    """Masked dense as users run it and, where asked for, through torch.compile at its best."""
    candidates = {"masked dense": baselines.masked_dense(operands, product)}
    if compiled:
        candidates["compiled masked"] = _compiled_masked(operands, product)
    return candidates


def _forward(x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    return functional.linear(x, weight * mask)


def _grad_input(grad: Tensor, masked: Tensor) -> Tensor:
    return grad @ masked


def _grad_weight(grad: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    return (grad.t() @ x) * mask


def _compiled_masked(operands: Operands, product: str) -> Candidate:
    x, grad, weight, mask = operands.x, operands.grad_output, operands.weight, operands.mask
    calls: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
        "forward": (_forward, (x, weight, mask)),
        "grad_input": (_grad_input, (grad, weight * mask)),
        "grad_weight": (_grad_weight, (grad, x, mask)),
    }
    function, arguments = calls[product]
    compiled = torch.compile(function, fullgraph=True, dynamic=False, mode=COMPILE_MODE)
    return lambda: compiled(*arguments)


def sparse_candidates(
    operands: Operands, product: str
) -> tuple[dict[str, dict[str, Candidate]], dict[str, str]]:
    """torch's CSR and BSR in every form that runs this product, and why the others do not.

    What torch refuses is asked of torch, by calling it once: versions differ.

    Returns:
        `({"csr" | "bsr": {form: call}}, {"torch_csr_note" | "torch_bsr_note": sentence})`.
    """
    found: dict[str, dict[str, Candidate]] = {}
    notes = {}
    for kind, build in (("csr", _csr), ("bsr", _bsr)):
        try:
            with warnings.catch_warnings():
                # Both are in beta, says torch, once a process.
                warnings.simplefilter("ignore", UserWarning)
                forms = build(operands, product)
        except (RuntimeError, ValueError) as error:  # NotImplementedError is a RuntimeError
            notes[f"torch_{kind}_note"] = f"torch refuses: {_first_line(error)}"
            continue
        for name, call in forms.items():
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)
                    call()
                torch.cuda.synchronize()
            except (RuntimeError, ValueError, AssertionError) as error:
                notes[f"torch_{kind}_note"] = f"torch refuses {name}: {_first_line(error)}"
            else:
                found.setdefault(kind, {})[name] = call
        if kind in found:
            notes.pop(f"torch_{kind}_note", None)
    return found, notes


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _csr(operands: Operands, product: str) -> dict[str, Candidate]:
    x, grad = operands.x, operands.grad_output
    if product == "grad_weight":
        pattern, left = _compressed(operands.mask), grad.t().contiguous()
        return {"sampled_addmm": lambda: torch.sparse.sampled_addmm(pattern, left, x, beta=0.0)}
    matrix, dense_side = (
        (operands.weight, x) if product == "forward" else (operands.weight.t(), grad)
    )
    sparse, turned = _compressed(matrix), dense_side.t()
    straight = turned.contiguous()
    return {
        "linear": lambda: functional.linear(dense_side, sparse),
        "sparse.mm": lambda: torch.sparse.mm(sparse, turned).t(),
        "sparse.mm, feature-major": lambda: torch.sparse.mm(sparse, straight).t(),
    }


def _compressed(matrix: Tensor) -> Tensor:
    csr = matrix.to_sparse_csr()
    return torch.sparse_csr_tensor(
        csr.crow_indices().int(), csr.col_indices().int(), csr.values(), csr.shape
    )


def _bsr(operands: Operands, product: str) -> dict[str, Candidate]:
    block = operands.case.block
    if block[0] != block[1] or block[0] not in BSR_SIDES:
        raise ValueError(f"its BSR kernels take square blocks of {BSR_SIDES}")
    x, grad = operands.x, operands.grad_output
    if product == "grad_weight":
        pattern, left = operands.mask.to_sparse_bsr(block), grad.t().contiguous()
        return {"sampled_addmm": lambda: torch.sparse.sampled_addmm(pattern, left, x, beta=0.0)}
    matrix, dense_side = (
        (operands.weight, x) if product == "forward" else (operands.weight.t().contiguous(), grad)
    )
    sparse = matrix.to_sparse_bsr(block)
    return {"linear": lambda: functional.linear(dense_side, sparse)}
