"""Fixed-fan-in block-sparse matmul kernels for PyTorch: time and memory follow the nonzeros."""

from sparse_kernels.activation import abs_topk, gelu_abs_topk, rms_norm_abs_topk
from sparse_kernels.attention import cached_attention, causal_attention
from sparse_kernels.backends import available_backends, explain_backend
from sparse_kernels.convert import densify_, sparsify_
from sparse_kernels.layout import FanInLayout
from sparse_kernels.linear import SparseLinear, check_ranks
from sparse_kernels.matmul import grad_weight, sparse_linear
from sparse_kernels.reference import from_dense, to_dense
from sparse_kernels.rewire import rewire_

__all__ = [
    "FanInLayout",
    "SparseLinear",
    "abs_topk",
    "available_backends",
    "cached_attention",
    "causal_attention",
    "check_ranks",
    "densify_",
    "explain_backend",
    "from_dense",
    "gelu_abs_topk",
    "grad_weight",
    "rewire_",
    "rms_norm_abs_topk",
    "sparse_linear",
    "sparsify_",
    "to_dense",
]
