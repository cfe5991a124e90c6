"""Fixed-fan-in block-sparse matmul kernels for PyTorch: time and memory follow the nonzeros."""

from sparse_kernels import transformer_ops
from sparse_kernels.algorithms import SET, AnnealedRigL, RigL, Static
from sparse_kernels.backends import explain_backend
from sparse_kernels.convert import densify_, sparsify_
from sparse_kernels.kept import packed_activations, remember
from sparse_kernels.layout import FanInLayout
from sparse_kernels.linear import SparseLinear, check_ranks
from sparse_kernels.matmul import grad_weight, sparse_linear
from sparse_kernels.reference import from_dense, to_dense
from sparse_kernels.rewire import rewire_
from sparse_kernels.topk import abs_topk

__all__ = [
    "SET",
    "AnnealedRigL",
    "FanInLayout",
    "RigL",
    "SparseLinear",
    "Static",
    "abs_topk",
    "check_ranks",
    "densify_",
    "explain_backend",
    "from_dense",
    "grad_weight",
    "packed_activations",
    "remember",
    "rewire_",
    "sparse_linear",
    "sparsify_",
    "to_dense",
    "transformer_ops",
]
