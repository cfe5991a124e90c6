"""The models that are measured against each other.

Weights, connections and tokens are random: a step takes as long whatever their values are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from sparse_transformer.model import ModelConfig, Transformer

MODEL = ModelConfig(d_model=1024)
# One whose weights a forward must read, and one for tests.
LARGE_MODEL = ModelConfig(d_model=2048, n_layer=8, density=1 / 256, embedding_density=1 / 32)
SMOKE_MODEL = ModelConfig(
    d_model=64, n_layer=2, density=1 / 8, embedding_density=1 / 4, context=32, vocab_size=128,
    min_nonzeros=1,
)  # fmt: skip


# What differs from the sparse model, and how `project_` makes a weight sparse after each step.
VARIANTS: dict[str, dict[str, Any]] = {
    "sparse": {},
    "masked_dense": {"linear": "masked_dense", "abs_topk": "torch"},
    "masked_dense_abs_topk": {"linear": "masked_dense"},
    "masked_dense_kernel": {"linear": "masked_dense"},
    "dense": {"linear": "dense", "active": None},
}
PROJECTIONS = {
    "masked_dense": "topk",
    "masked_dense_abs_topk": "topk",
    "masked_dense_kernel": "select",
}


@dataclass(frozen=True)
class Case:
    """One line of the table: what is timed of a variant of a model, its products in a dtype.

    The phase is "train", "prefill" or "decode"; the model is that of the sparse variant; a call has
    a batch of sequences, each of a whole context, or of one token with half of it in the cache.
    """

    model: ModelConfig
    variant: str
    dtype: str = "float32"
    phase: str = "train"
    batch: int = 8

    @property
    def length(self) -> int:
        return 1 if self.phase == "decode" else self.model.context

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.float32 if self.dtype == "float32" else torch.bfloat16

    def __str__(self) -> str:
        name = f"{self.phase} {self.variant} {self.dtype} d_model={self.model.d_model}"
        return f"{name} 1/{1 / self.model.density:g}"

    def columns(self) -> dict[str, Any]:
        """What a row says of the case."""
        shape = ("d_model", "n_layer", "context", "density", "embedding_density")
        # Without training there is no projection, and one masked dense.
        name = self.variant if self.phase == "train" else self.variant.removesuffix("_kernel")
        return {
            "phase": self.phase,
            "variant": name,
            "dtype": self.dtype,
            **{name: getattr(self.model, name) for name in shape},
            "tokens": self.batch * self.length,
            "batch": self.batch,
        }


@dataclass(frozen=True)
class Group:
    """Cases that take turns, all in memory at once; the peak memory of some is measured too."""

    name: str
    cases: tuple[Case, ...]
    memory: tuple[Case, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}: {len(self.cases)} variants in turns"


def make_model(case: Case, device: str, dtype: torch.dtype = torch.float32) -> Transformer:
    """The seeded model of a case, with float32 parameters unless told otherwise."""
    generator = torch.Generator().manual_seed(0)
    config = replace(case.model, **VARIANTS[case.variant])
    return Transformer(config, generator=generator, device=device, dtype=dtype)
