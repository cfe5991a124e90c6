"""The models that are measured against each other.

Weights, connections and tokens are random: a step takes as long whatever their values are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from benchmarks import timing
from sparse_transformer.model import ModelConfig, Transformer

_PROBED_TOKENS = 32
# Dense bfloat16 is left out where a call takes longer and so many times longer than float32.
_BF16_MAX_S, _BF16_SLOWER = 10.0, 4.0

MODEL = ModelConfig(d_model=1024)
# One whose weights a forward must read, and one for tests.
LARGE_MODEL = ModelConfig(d_model=2048, n_layer=8, density=1 / 256, embedding_density=1 / 32)
SMOKE_MODEL = ModelConfig(
    d_model=64, n_layer=2, density=1 / 8, embedding_density=1 / 4, context=32, vocab_size=128,
    min_nonzeros=1,
)  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """A way to train or run a model.

    Args:
        name: as in the rows.
        linear, abs_topk, active: as in `ModelConfig`.
        projection: how `project_` makes a masked dense weight sparse after each step, or None.
        compiled: whether `torch.compile` compiles the loss.
    """

    name: str
    linear: str
    abs_topk: str = "kernel"
    active: float | None = 0.25
    projection: str | None = None
    compiled: bool = False


SPARSE = Variant("sparse", "sparse")
MASKED_DENSE = Variant("masked_dense", "masked_dense", abs_topk="torch", projection="topk")
MASKED_DENSE_ABS_TOPK = Variant("masked_dense_abs_topk", "masked_dense", projection="topk")
MASKED_DENSE_KERNEL = Variant("masked_dense_kernel", "masked_dense", projection="select")
DENSE = Variant("dense", "dense", active=None)
COMPILED = replace(MASKED_DENSE_KERNEL, name="masked_dense_compiled", compiled=True)
# A model at rest has its zeros already: one kind of masked dense, with the fastest AbsTopK.
MASKED_DENSE_AT_REST = Variant("masked_dense", "masked_dense")


@dataclass(frozen=True)
class Case:
    """One line of the table: what is timed of a variant of a model, its products in a dtype.

    Args:
        model: of the sparse variant; the others differ from it as `variant` says.
        phase: "train", "prefill" or "decode".
        batch: sequences in a call, each of `length` tokens after `cached` ones.
    """

    model: ModelConfig
    variant: Variant
    dtype: str = "float32"
    phase: str = "train"
    batch: int = 8

    @property
    def length(self) -> int:
        return 1 if self.phase == "decode" else self.model.context

    @property
    def cached(self) -> int:
        return self.model.context // 2 if self.phase == "decode" else 0

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.float32 if self.dtype == "float32" else torch.bfloat16

    @property
    def config(self) -> ModelConfig:
        """Of the variant's model."""
        variant = self.variant
        return replace(
            self.model, linear=variant.linear, abs_topk=variant.abs_topk, active=variant.active
        )

    def __str__(self) -> str:
        name = f"{self.phase} {self.variant.name} {self.dtype}"
        return f"{name} d_model={self.model.d_model} 1/{1 / self.model.density:g}"

    def columns(self) -> dict[str, Any]:
        """What a row says of the case."""
        shape = ("d_model", "n_layer", "context", "density", "embedding_density")
        return {
            "phase": self.phase,
            "variant": self.variant.name,
            "dtype": self.dtype,
            **{name: getattr(self.model, name) for name in shape},
            "tokens": self.batch * self.length,
            "batch": self.batch,
            "cached": self.cached,
            "projection": self.variant.projection,
        }


def make_model(case: Case, device: str, dtype: torch.dtype = torch.float32) -> Transformer:
    """The seeded model of a case, with float32 parameters unless told otherwise."""
    generator = torch.Generator().manual_seed(0)
    return Transformer(case.config, generator=generator, device=device, dtype=dtype)


def why_no_bf16_dense(case: Case) -> str | None:
    """A sentence if torch's bfloat16 dense products are too slow to time here, else None.

    Processors without bfloat16 multiply-adds run them through a reference loop. A few tokens
    through one matrix are timed; bfloat16 must also be several times slower than float32.
    """
    model, backward = case.model, case.phase == "train"
    # Attention 4 and MLP 8 times d_model^2 in each layer.
    products = 12 * model.n_layer * max(1, case.batch * case.length // _PROBED_TOKENS)

    def call_s(dtype: torch.dtype) -> float:
        x, weight = (
            torch.ones(rows, model.d_model, dtype=dtype, requires_grad=backward)
            for rows in (_PROBED_TOKENS, model.d_model)
        )

        def product() -> None:
            y = nn.functional.linear(x, weight)
            if backward:
                y.sum().backward()

        return products * min(timing.sample_s(product) for _ in range(3))

    bf16 = call_s(torch.bfloat16)
    if bf16 < max(_BF16_MAX_S, _BF16_SLOWER * call_s(torch.float32)):
        return None
    return (
        "dense bfloat16 is left out: torch has no fast bfloat16 product for this processor, "
        f"and one call would take about {bf16:.0f} s"
    )
