"""The graph of a model: its nodes, and the nonzero weights that are the edges between them.

A node is one channel of one hook point: what a sublayer reads of the residual stream (after RMSNorm
and AbsTopK), a q, k or v channel, an MLP neuron, what a sublayer writes (Gao et al. 2025, section
2.2). A set of nodes is a bool vector over `Nodes.total`, the same for all tokens and prompts.

An edge is a nonzero weight of a block: `qkv` joins what attention reads to q, k and v channels,
`out` joins v channels (through the head) to what attention writes, `up` and `down` do the same for
the MLP. The size of a circuit is the number of edges between two of its nodes. Embedding and
unembedding do not count, for any kind of model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

import sparse_kernels as sk
from sparse_transformer import hooks
from sparse_transformer.config import ModelConfig
from sparse_transformer.model import Transformer

_KINDS = {
    "act_in": "read",
    "q": "q",
    "k": "k",
    "v": "v",
    "post_act": "neuron",
    "resid_delta": "write",
}
# Module, the hook point of its input, and the hook points of the nodes that it joins.
_MATRICES = (
    ("attn.qkv", "attn.act_in", "attn.act_in", ("attn.q", "attn.k", "attn.v")),
    ("attn.out", "attn.y", "attn.v", ("attn.resid_delta",)),
    ("mlp.up", "mlp.act_in", "mlp.act_in", ("mlp.post_act",)),
    ("mlp.down", "mlp.post_act", "mlp.post_act", ("mlp.resid_delta",)),
)


@dataclass(frozen=True)
class Nodes:
    """The nodes of a model, in the order in which a forward reaches them.

    Attributes:
        names: hook points.
        widths: how many nodes each has.
        d_head: width of an attention head.
    """

    names: tuple[str, ...]
    widths: tuple[int, ...]
    d_head: int

    @classmethod
    def of(cls, config: ModelConfig) -> Nodes:
        """The nodes of a model with this configuration."""
        found = {
            name: width
            for name, width in hooks.widths(config).items()
            if name.rsplit(".", 1)[-1] in _KINDS
        }
        return cls(tuple(found), tuple(found.values()), config.d_head)

    @property
    def total(self) -> int:
        return sum(self.widths)

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """`(..., total)` to `(..., width)` by hook point."""
        return dict(zip(self.names, flat.split(self.widths, -1), strict=True))

    def locate(self, index: int) -> tuple[str, int]:
        """Hook point and channel of a node."""
        for name, width in zip(self.names, self.widths, strict=True):
            if index < width:
                return name, index
            index -= width
        raise IndexError("no such node")

    def id(self, index: int) -> str:
        """`hook:channel`."""
        return "{}:{}".format(*self.locate(index))

    def index(self, id: str) -> int:
        """The inverse of `id`; a KeyError if there is no such node."""
        name, _, channel = id.partition(":")
        if name not in self.names or not channel.isdecimal():
            raise KeyError(id)
        number = self.names.index(name)
        if int(channel) >= self.widths[number]:
            raise KeyError(id)
        return sum(self.widths[:number]) + int(channel)

    def kind(self, name: str) -> str:
        """Kind of the nodes of a hook point: read, q, k, v, neuron or write."""
        return _KINDS[name.rsplit(".", 1)[1]]


@dataclass(frozen=True)
class Matrix:
    """The nonzero weights of one matrix.

    Attributes:
        module: its name in the model.
        reads: the hook point of its input.
        inputs, outputs: int64 `(E,)`, feature numbers of the matrix.
        source, target: int64 `(E,)`, the nodes' numbers in `Nodes`.
        position: int64 `(E,)`, where in the flattened weight each stands.
        weight: `(E,)`.
    """

    module: str
    reads: str
    inputs: Tensor
    outputs: Tensor
    source: Tensor
    target: Tensor
    position: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Edges:
    """All edges of a model, matrix after matrix; E in all.

    Attributes:
        matrices: in the order of a forward.
        source, target: int64 `(E,)`, node numbers.
        weight: `(E,)`.
    """

    matrices: tuple[Matrix, ...]
    source: Tensor
    target: Tensor
    weight: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, model: Transformer) -> Edges:
        """The edges of a model, on the CPU."""
        nodes = Nodes.of(model.config)
        starts = dict(zip(nodes.names, accumulate((0, *nodes.widths)), strict=False))
        found = []
        for layer in range(model.config.n_layer):
            for module, reads, sources, targets in _MATRICES:
                name = f"blocks.{layer}.{module}"
                outputs, inputs, position, weight = _nonzero(model.get_submodule(name))
                first = starts[f"{layer}.{targets[0]}"]
                found.append(
                    Matrix(
                        module=name,
                        reads=f"{layer}.{reads}",
                        inputs=inputs,
                        outputs=outputs,
                        source=inputs + starts[f"{layer}.{sources}"],
                        # q, k and v follow each other in the matrix and in `Nodes`.
                        target=outputs + first,
                        position=position,
                        weight=weight,
                    )
                )
        return cls(
            tuple(found),
            *(
                torch.cat([getattr(matrix, name) for matrix in found])
                for name in ("source", "target", "weight")
            ),
        )

    def between(self, keep: Tensor) -> Tensor:
        """bool `(E,)`: the edges that join two nodes of `keep`, bool `(total,)`."""
        return keep[self.source] & keep[self.target]

    def count(self, keep: Tensor) -> int:
        """The size of the circuit of these nodes, with all their edges."""
        return int(self.between(keep).sum())

    def split(self, flat: Tensor) -> list[Tensor]:
        """`(E,)` by matrix."""
        return list(flat.split([len(matrix.source) for matrix in self.matrices]))


def rows_of(module: nn.Module, tokens: Sequence[int]) -> Tensor:
    """The rows of embedding or unembedding of these tokens, dense `(len(tokens), D)`."""
    weight = module.get_parameter("weight").detach()
    if not isinstance(module, sk.SparseLinear):
        return weight[list(tokens)]
    # Embedding: a fan-out for each token. Unembedding: a fan-in for each token. Both by token.
    columns = module.layout.indices[list(tokens)].long()
    D = module.out_features if module.transpose else module.in_features
    return weight.new_zeros(len(tokens), D).scatter_(1, columns, weight[list(tokens)].flatten(1))


def _nonzero(module: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output and input feature, position in the flattened weight and value of each nonzero."""
    weight = module.get_parameter("weight").detach().cpu()
    if isinstance(module, sk.SparseLinear):
        if module.layout.block != (1, 1):
            raise ValueError(f"edges are single weights, got blocks of {module.layout.block}")
        columns = module.layout.indices.cpu().long()
        rows = torch.arange(columns.shape[0]).unsqueeze(1).expand_as(columns)
        outputs, inputs = (columns, rows) if module.transpose else (rows, columns)
        outputs, inputs = outputs.reshape(-1), inputs.reshape(-1)
    else:
        N, K = weight.shape
        outputs = torch.arange(N).repeat_interleave(K)
        inputs = torch.arange(K).repeat(N)
    flat = weight.reshape(-1)
    exists = flat.nonzero().squeeze(1)
    return outputs[exists], inputs[exists], exists, flat[exists]
