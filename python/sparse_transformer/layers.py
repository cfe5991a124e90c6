"""What a block has beside its matrices: RMSNorm, activations, AbsTopK; fused where a kernel is.

AbsTopK of a vector keeps its `k` entries of largest magnitude.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import sparse_kernels as sk
from sparse_transformer import functional
from sparse_transformer.config import ModelConfig


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last axis, so that zero stays zero."""

    def __init__(
        self, width: int, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """`(..., width)` to the same."""
        return functional.rms_norm(x, self.weight)


_ACTIVATIONS: dict[str, nn.Module] = {
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU("tanh"),
    "relu": nn.ReLU(),
}


class AbsTopK(nn.Module):
    """Of the last axis the `k` of largest magnitude stay; the method is `ModelConfig.abs_topk`."""

    def __init__(self, k: int, method: str, backend: str | None) -> None:
        super().__init__()
        self.k, self.method, self.backend = k, method, backend

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        if self.method == "kernel":
            return sk.abs_topk(x, self.k, self.backend)
        places = x.abs().topk(self.k, -1, sorted=False).indices
        return torch.zeros_like(x).scatter_(-1, places, x.gather(-1, places))

    def of_norm(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """AbsTopK of RMSNorm."""
        if self.method == "kernel" and norm.weight.dtype == x.dtype:
            return sk.transformer_ops.rms_norm_abs_topk(
                x, norm.weight, self.k, functional.RMS_EPS, self.backend
            )
        kept: Tensor = self(norm(x))
        return kept

    def extra_repr(self) -> str:
        """What `print(layer)` shows."""
        return str(self.k)


class GeluAbsTopK(AbsTopK):
    """AbsTopK of GELU, in one kernel."""

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        return sk.transformer_ops.gelu_abs_topk(x, self.k, self.backend)


class AbsTopKParts(nn.ModuleList):
    """Each of the parts along axis 2 by its own rule."""

    def forward(self, x: Tensor) -> Tensor:
        """`(B, T, parts, width)` to the same."""
        return torch.stack([keep(x[:, :, part]) for part, keep in enumerate(self)], 2)


def keep_part(keep: nn.Module, x: Tensor, part: int) -> Tensor:
    """What `AbsTopKParts`, or the one rule in its place, makes of one part, `(B, T, width)`."""
    kept: Tensor = (keep[part] if isinstance(keep, AbsTopKParts) else keep)(x)
    return kept


def abs_topk_at(config: ModelConfig, place: str, width: int) -> nn.Module:
    """AbsTopK at one of `config.PLACES`; the identity where there is none, or it would keep all."""
    if config.active is None or place not in config.active_places:
        return nn.Identity()
    k = max(1, int(config.active * width))
    return AbsTopK(k, config.abs_topk, config.backend) if k < width else nn.Identity()


def keep_parts(keeps: Sequence[nn.Module]) -> nn.Module:
    """Of `(B, T, parts, width)`: all parts at once if they have one rule."""
    return keeps[0] if len({type(keep) for keep in keeps}) == 1 else AbsTopKParts(keeps)


def activation(config: ModelConfig) -> nn.Module:
    """The activation function and the AbsTopK after it: in one kernel, if there is one."""
    keep = abs_topk_at(config, "mlp_neuron", config.neurons)
    if isinstance(keep, AbsTopK) and keep.method == "kernel" and config.activation == "gelu":
        return GeluAbsTopK(keep.k, keep.method, keep.backend)
    return nn.Sequential(_ACTIVATIONS[config.activation], keep)
