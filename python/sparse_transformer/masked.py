"""The baseline: dense layers that training keeps sparse (train/masked_dense.py).

This is the published recipe (Gao et al. 2025, arXiv 2511.13653, section 2.1, and the training
script released with it): everything about the layers is dense but for the zeros in their weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Masked(nn.Module):
    """What both layers have.

    Attributes:
        weight: `(rows, columns)`.
        density: nonzeros of the weight over all entries, at the end of training.
        min_fan_in: nonzeros that every row keeps at least.
        min_fan_out: nonzeros that every column keeps at least. At most one of the two.
    """

    weight: Tensor
    density: float
    min_fan_in = 0
    min_fan_out = 0

    def _keep(self, density: float, min_fan_in: int = 0, min_fan_out: int = 0) -> None:
        rows, columns = self.weight.shape
        if not 0 < density <= 1:
            raise ValueError(f"density must be in (0, 1], got {density}")
        if min_fan_in and min_fan_out:
            raise ValueError("at most one of min_fan_in and min_fan_out can be given, got both")
        for name, fan, most in (
            ("min_fan_in", min_fan_in, columns),
            ("min_fan_out", min_fan_out, rows),
        ):
            if not 0 <= fan <= most:
                raise ValueError(f"{name} must be in [0, {most}], got {fan}")
        self.density, self.min_fan_in, self.min_fan_out = density, min_fan_in, min_fan_out

    def extra_repr(self) -> str:
        """What `print(layer)` shows."""
        return f"{super().extra_repr()}, density={self.density:.3g}"


class MaskedLinear(Masked, nn.Linear):
    """`nn.Linear` whose weight `project_` keeps sparse, see `Masked`; all of it is dense."""

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
        nn.Linear.__init__(self, in_features, out_features, bias, device, dtype)
        self._keep(density, min_fan_in, min_fan_out)


class MaskedEmbedding(Masked, nn.Embedding):
    """`nn.Embedding` whose weight `(V, D)` `project_` keeps sparse, without a least number."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        density: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Embedding.__init__(self, num_embeddings, embedding_dim, device=device, dtype=dtype)
        self._keep(density)


def masked_layers(model: nn.Module) -> dict[str, Masked]:
    """The layers that `project_` projects, by qualified name, in order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Masked)}
