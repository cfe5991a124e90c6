"""The baseline: dense layers that training keeps sparse (train/masked_dense.py).

This is the published recipe (Gao et al. 2025, arXiv 2511.13653, section 2.1, and the training
script released with it): everything about the layers is dense but for the zeros in their weights.
"""

from __future__ import annotations

import torch
from torch import nn


class MaskedLinear(nn.Linear):
    """`nn.Linear` whose weight `project_` keeps sparse; everything about it is dense.

    Args:
        in_features, out_features, bias, device, dtype: as for `nn.Linear`.
        density: nonzeros of the weight over all entries, at the end of training.
        min_fan_in: nonzeros that every row (output) keeps at least.
        min_fan_out: nonzeros that every column (input) keeps at least. At most one of the two.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        density: float,
        min_fan_in: int = 0,
        min_fan_out: int = 0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        _check(density, min_fan_in, min_fan_out, in_features, out_features)
        self.density = density
        self.min_fan_in = min_fan_in
        self.min_fan_out = min_fan_out

    def extra_repr(self) -> str:
        """What `print(layer)` shows."""
        return f"{super().extra_repr()}, density={self.density:.3g}"


class MaskedEmbedding(nn.Embedding):
    """`nn.Embedding` whose weight `(V, D)` `project_` keeps sparse, without a least number."""

    min_fan_in = 0
    min_fan_out = 0

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        density: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)
        _check(density, 0, 0, embedding_dim, num_embeddings)
        self.density = density

    def extra_repr(self) -> str:
        """What `print(layer)` shows."""
        return f"{super().extra_repr()}, density={self.density:.3g}"


def masked_layers(model: nn.Module) -> dict[str, MaskedLinear | MaskedEmbedding]:
    """The layers that `project_` projects, by qualified name, in order."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (MaskedLinear, MaskedEmbedding))
    }


def _check(density: float, min_fan_in: int, min_fan_out: int, columns: int, rows: int) -> None:
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")
    if min_fan_in and min_fan_out:
        raise ValueError("at most one of min_fan_in and min_fan_out can be given, got both")
    if not 0 <= min_fan_in <= columns:
        raise ValueError(f"min_fan_in must be in [0, {columns}], got {min_fan_in}")
    if not 0 <= min_fan_out <= rows:
        raise ValueError(f"min_fan_out must be in [0, {rows}], got {min_fan_out}")
