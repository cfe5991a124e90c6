"""Fixed-fan-in block-sparse matmul kernels for PyTorch: time and memory follow the nonzeros."""

from sparse_kernels.backends import available_backends
from sparse_kernels.layout import FanInLayout
from sparse_kernels.matmul import sparse_linear

__all__ = ["FanInLayout", "available_backends", "sparse_linear"]
