"""The models that are measured against each other, and one training step of each.

Weights and tokens are drawn at random, and so are the connections. A step costs what it costs
whatever the values are; nothing here says how well a model learns.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function

from sparse_transformer.masked import masked_layers, project_
from sparse_transformer.model import ModelConfig, Transformer
from sparse_transformer.optimizer import OptimizerConfig, make_optimizer, normalize_gradients_
from sparse_transformer.topology import Topology, TopologyConfig

_PROBED_TOKENS = 32
# Dense bfloat16 is left out where a call takes longer and so many times longer than float32.
_BF16_MAX_S, _BF16_SLOWER = 10.0, 4.0
# Larger than any step number here: the share of connections that a change replaces is at its most.
_RUN = 10**6


@dataclass(frozen=True)
class Shape:
    """Sizes of a model and of a step.

    Args:
        density: of the four matrices of a block.
        embedding_density: of embedding and unembedding.
        tokens: M, in windows of `context`.
        min_nonzeros: as in `ModelConfig`; 1 where a sweep needs the density to be exact.
    """

    d_model: int = 1024
    n_layer: int = 4
    density: float = 1 / 64
    embedding_density: float = 1 / 16
    context: int = 256
    tokens: int = 2048
    vocab_size: int = 2048
    min_nonzeros: int = 4


# One that fills a GPU, one whose weights a forward must read, and one for tests.
GPU_MODEL = Shape(d_model=2048, n_layer=8, density=1 / 256, embedding_density=1 / 32, tokens=16384)
LARGE_MODEL = replace(GPU_MODEL, tokens=256)
SMOKE_MODEL = Shape(
    d_model=64, n_layer=2, density=1 / 8, embedding_density=1 / 4, context=32, tokens=64,
    vocab_size=128, min_nonzeros=1,
)  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """A way to train or run a model of a shape.

    Args:
        name: as in the rows.
        linear, abs_topk, active: as in `ModelConfig`.
        projection: how `project_` makes a masked dense weight sparse after each step, or None.
        compiled: the loss is compiled by `torch.compile`; on a GPU alone.
    """

    name: str
    linear: str
    abs_topk: str = "kernel"
    active: float | None = 0.25
    projection: str | None = None
    compiled: bool = False


SPARSE = Variant("sparse", "sparse")
# As released: torch.topk for the activations, and for the weights.
MASKED_DENSE = Variant("masked_dense", "masked_dense", abs_topk="torch", projection="topk")
# The same with our abs_topk.
MASKED_DENSE_ABS_TOPK = Variant("masked_dense_abs_topk", "masked_dense", projection="topk")
# As fast as masked dense can be made here: our abs_topk, and the fast projection.
MASKED_DENSE_KERNEL = Variant("masked_dense_kernel", "masked_dense", projection="select")
# The plain model: no zeros, no AbsTopK.
DENSE = Variant("dense", "dense", active=None)
COMPILED = Variant("masked_dense_compiled", "masked_dense", projection="select", compiled=True)
VARIANTS = {
    v.name: v
    for v in (SPARSE, MASKED_DENSE, MASKED_DENSE_ABS_TOPK, MASKED_DENSE_KERNEL, DENSE, COMPILED)
}


@dataclass(frozen=True)
class Case:
    """One line of the table: a variant of a shape, its products in a dtype."""

    shape: Shape
    variant: Variant
    dtype: str = "float32"

    @property
    def label(self) -> str:
        """For a person who waits."""
        shape = self.shape
        return f"{self.variant.name} {self.dtype} d_model={shape.d_model} 1/{1 / shape.density:g}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.float32 if self.dtype == "float32" else torch.bfloat16

    def columns(self) -> dict[str, Any]:
        """What a row says of the case."""
        shape = self.shape
        return {
            "variant": self.variant.name,
            "dtype": self.dtype,
            "d_model": shape.d_model,
            "n_layer": shape.n_layer,
            "context": shape.context,
            "density": shape.density,
            "embedding_density": shape.embedding_density,
            "tokens": shape.tokens,
        }

    def as_dict(self) -> dict[str, Any]:
        """What JSON can hold; see `from_dict`."""
        return {
            "shape": asdict(self.shape),
            "variant": self.variant.name,
            "dtype": self.dtype,
        }

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Case:
        """The inverse of `as_dict`."""
        return cls(Shape(**stored["shape"]), VARIANTS[stored["variant"]], stored["dtype"])


def config_of(shape: Shape, variant: Variant) -> ModelConfig:
    """The model's configuration: published in everything that a shape does not say."""
    return ModelConfig(
        vocab_size=shape.vocab_size,
        n_layer=shape.n_layer,
        d_model=shape.d_model,
        context=shape.context,
        active=variant.active,
        linear=variant.linear,
        density=shape.density,
        embedding_density=shape.embedding_density,
        min_nonzeros=shape.min_nonzeros,
        abs_topk=variant.abs_topk,
    )


def make_model(case: Case, device: str, dtype: torch.dtype = torch.float32) -> Transformer:
    """The seeded model of a case, whose parameters are float32 when it is trained."""
    config = config_of(case.shape, case.variant)
    generator = torch.Generator().manual_seed(0)
    return Transformer(config, generator=generator, device=device, dtype=dtype)


def draw_tokens(shape: Shape, device: str, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens and targets, int64 `(B, T)`, uniform over the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    size = (max(1, shape.tokens // shape.context), min(shape.context, shape.tokens))
    tokens, targets = (
        torch.randint(shape.vocab_size, size, generator=generator).to(device) for _ in range(2)
    )
    return tokens, targets


class Training:
    """A model with its optimizer, and its steps, as `sparse_transformer.train` takes them.

    Args:
        case: what to train.
        device: torch's name.
        period: steps between two changes of the connections.
    """

    def __init__(self, case: Case, device: str, *, period: int = TopologyConfig.period) -> None:
        self.case = case
        self.device = device
        self.period = period
        self.model = make_model(case, device)
        self.optimizer = make_optimizer(self.model, OptimizerConfig())
        self.topology = None
        if case.variant.linear == "sparse":
            # At the final density: what annealing adds before, the sweep over L0 shows.
            config = TopologyConfig(start_multiple=1, period=period)
            self.topology = Topology(self.model, self.optimizer, config, _RUN)
        self._tokens, self._targets = draw_tokens(case.shape, device)
        self._parameters = list(self.model.parameters())
        self._loss = self.model.loss
        if case.variant.compiled:
            self._loss = torch.compile(self.model.loss)
        self.loss = float("nan")

    @property
    def changes_connections(self) -> bool:
        """Whether there are steps of two kinds."""
        return self.topology is not None

    def step(self, *, rewires: bool = False) -> None:
        """One optimizer step; with `rewires` it also changes the connections."""
        # A change is due at multiples of the period.
        number = self.period if rewires else 1
        capture: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        compute = self._loss
        if rewires:
            assert self.topology is not None
            if self.topology.wants_gradients(number):
                capture, compute = self.topology.capture(), self.model.loss
        bf16 = self.case.dtype == "bfloat16"
        with capture:
            with torch.autocast(self.device, self.case.torch_dtype, enabled=bf16):
                loss = compute(self._tokens, self._targets)
            loss.backward()
        # The names of the ranges are parts: see benchmarks.transformer.parts.
        with record_function("optimizer"):
            self.loss = float(loss.detach())
            normalize_gradients_(self._parameters, clip_only=False)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        with record_function("topology"):
            if self.topology is not None:
                if self.topology.step(number):
                    self.topology.hash()
            elif self.case.variant.projection is not None:
                project_(self.model, 1.0, method=self.case.variant.projection)
        if self.device != "cpu":
            torch.cuda.synchronize()

    def l0(self) -> int:
        """Nonzero weights of all matrices, embedding and unembedding included."""
        if self.topology is not None:
            return sum(layer.weight.numel() for layer in self.model.sparse_layers().values())
        masked = masked_layers(self.model).values()
        if masked:
            return sum(int(torch.count_nonzero(layer.weight)) for layer in masked)
        kinds = (nn.Linear, nn.Embedding)
        return sum(m.weight.numel() for m in self.model.modules() if isinstance(m, kinds))


def why_no_bf16_dense(shape: Shape, *, backward: bool) -> str | None:
    """A sentence if torch's bfloat16 dense products are too slow to time here, else None.

    Processors without bfloat16 multiply-adds run them through a reference loop. Judged by a few
    tokens through one matrix, where bfloat16 must also be several times slower than float32.
    """
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = (
            torch.ones(size, shape.d_model, dtype=dtype, requires_grad=backward)
            for size in (_PROBED_TOKENS, shape.d_model)
        )
        times_s = []
        for _ in range(3):
            start = time.perf_counter()
            y = nn.functional.linear(x, weight)
            if backward:
                y.sum().backward()
            times_s.append(time.perf_counter() - start)
        # Attention 4 and MLP 8 times d_model^2 in each layer.
        products = 12 * shape.n_layer * max(1, shape.tokens // _PROBED_TOKENS)
        seconds[dtype] = products * min(times_s)
    bf16 = seconds[torch.bfloat16]
    if bf16 < _BF16_MAX_S or bf16 < _BF16_SLOWER * seconds[torch.float32]:
        return None
    return (
        "dense bfloat16 is left out: torch has no fast bfloat16 product for this processor, "
        f"and one call would take about {bf16:.0f} s"
    )


def state_bytes(training: Training) -> dict[str, int]:
    """Bytes of parameters, gradients and optimizer state, after a step.

    "state" is without the bigram table, which is dense in every variant: that is "bigram".
    "patterns" are the index buffers of the sparse layers, as a checkpoint has them.
    """
    bigram = training.model.bigram
    sizes = {"state": 0, "bigram": 0}
    for parameter in training.model.parameters():
        kept = training.optimizer.state.get(parameter, {}).values()
        # The gradient, of the parameter's size and dtype, is freed after a step.
        size = 2 * _bytes([parameter]) + _bytes(v for v in kept if isinstance(v, Tensor))
        sizes["bigram" if parameter is bigram else "state"] += size
    return sizes | {"patterns": pattern_bytes(training.model)}


def pattern_bytes(model: Transformer) -> int:
    """Bytes of the index buffers of the sparse layers."""
    return _bytes(layer.indices for layer in model.sparse_layers().values())


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
