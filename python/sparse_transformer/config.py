"""The architecture of a model as settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from sparse_transformer.ranges import need, need_choices, need_number, need_whole

# Where AbsTopK stands, by the names of the released configurations.
PLACES = (
    "attn_in", "attn_q", "attn_k", "attn_v", "attn_out", "mlp_in", "mlp_neuron", "mlp_out"
)  # fmt: skip


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of a model. The defaults are the small model of the published recipe.

    A value that does not fit raises a ValueError that names it.
    """

    vocab_size: int = 2048
    """Tokens of the vocabulary, end-of-text included."""
    n_layer: int = 4
    """Blocks."""
    d_model: int = 256
    """Channels of the residual stream."""
    context: int = 256
    """Tokens that the model reads at once."""
    d_head: int = 16
    """Channels of an attention head."""
    n_head: int | None = None
    """Attention heads; by default d_model / d_head."""
    d_mlp: int | None = None
    """Neurons of a block; by default 4 d_model."""
    activation: Literal["gelu", "gelu_tanh", "relu"] = "gelu"
    """Activation function of the neurons; gelu is exact, as released."""
    active: float | None = 0.25
    """Share of each vector that AbsTopK keeps, rounded down; None: there is no AbsTopK."""
    active_places: tuple[str, ...] = PLACES
    """Where AbsTopK is applied; by default at all eight places."""
    linear: Literal["sparse", "masked_dense", "dense"] = "sparse"
    """Kind of all matrices; masked_dense is as published."""
    density: float = 1 / 64
    """Final density of the four matrices of a block."""
    embedding_density: float = 1 / 16
    """Final density of embedding and unembedding."""
    min_nonzeros: int = 4
    """Minimum fan-in, or fan-out for attn.out and mlp.down."""
    writers: Literal["fan_out", "fan_in"] = "fan_out"
    """What attn.out and mlp.down fix."""
    fans: Mapping[str, int] | None = None
    """Final fan by name of layer, in place of the fan that the densities give."""
    sinks: bool = True
    """Learned attention sinks, one for each head."""
    bigram: bool = True
    """A learned (vocabulary, vocabulary) table whose row of the current token joins the logits."""
    bias: bool = True
    """Biases of all linear layers but the unembedding."""
    positions: int = 0
    """Learned position channels, read beside the residual stream and never written."""
    added_positions: bool = False
    """GPT-2's learned positions, added to the embedding."""
    tied: bool = False
    """Embedding and unembedding share their weights."""
    logits_bias: bool = False
    """A learned bias of the logits, as in some released models."""
    abs_topk: Literal["kernel", "torch"] = "kernel"
    """How AbsTopK is computed: the kernel of sparse_kernels, or topk and scatter as released."""
    backend: Literal["reference", "cpu", "triton", "cuda"] | None = None
    """Backend of sparse_kernels; by default the fastest available."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "active_places", tuple(self.active_places))
        for name in ("vocab_size", "n_layer", "d_model", "context", "d_head", "min_nonzeros"):
            need_whole(self, name, 1)
        need_whole(self, "positions", 0)
        for name in ("n_head", "d_mlp"):
            if getattr(self, name) is not None:
                need_whole(self, name, 1)
        if self.n_head is None:
            need(self.d_model % self.d_head == 0, "d_head", "a divisor of d_model", self.d_head)
        for name in ("density", "embedding_density", *(() if self.active is None else ("active",))):
            need_number(self, name, 0, 1, above=True)
        need_choices(self)
        for place in self.active_places:
            need(place in PLACES, "active_places", f"of {', '.join(PLACES)}", place)
        fans: Mapping[str, Any] = self.fans or {}
        for name, fan in fans.items():
            need(isinstance(fan, int) and fan >= 1, f"the fan of {name}", "at least 1", fan)

    @property
    def heads(self) -> int:
        """H."""
        return self.d_model // self.d_head if self.n_head is None else self.n_head

    @property
    def neurons(self) -> int:
        """Width of the MLP."""
        return 4 * self.d_model if self.d_mlp is None else self.d_mlp

    def values(self, fan_multiple: float = 1.0) -> int:
        """About how many numbers the parameters of such a model hold (`fans` left aside)."""
        D, V, W = self.d_model, self.vocab_size, self.heads * self.d_head

        def matrix(rows: int, width: int, density: float, least: int) -> int:
            if self.linear != "sparse":
                return rows * width
            fan = min(width, max(least, round(density * width)))
            return rows * min(width, round(fan * fan_multiple))

        read, out = D + self.positions, self.writers == "fan_out"
        block = matrix(3 * W, read, self.density, self.min_nonzeros)
        block += matrix(self.neurons, read, self.density, self.min_nonzeros)
        for inputs in (W, self.neurons):
            rows, width = (inputs, D) if out else (D, inputs)
            block += matrix(rows, width, self.density, self.min_nonzeros)
        ends = (1 if self.tied else 2) * matrix(V, D, self.embedding_density, 1)
        channels = D if self.added_positions else self.positions
        return self.n_layer * block + ends + self.bigram * V * V + self.context * channels

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> ModelConfig:
        """The inverse of `dataclasses.asdict`, also through JSON; a ValueError for other names."""
        unknown = sorted(set(stored) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"the model's configuration has no field {', '.join(unknown)}")
        return cls(**stored)
