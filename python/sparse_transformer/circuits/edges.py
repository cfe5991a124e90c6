"""The edges of a model: the nonzero weights of its blocks, each from a node to a node.

`qkv` joins what attention reads to q, k and v channels, `out` joins v channels (through the head)
to what attention writes, `up` and `down` do the same for the MLP. The size of a circuit is the
number of edges between two of its nodes (Gao et al. 2025, section 2.2). Embedding and unembedding
are no part of it, for any kind of model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import sparse_kernels as sk
from sparse_transformer.circuits.nodes import Base, Places
from sparse_transformer.model import Transformer

# Module, the hook point that it reads, and the places of the nodes that it joins.
_MATRICES = (
    ("attn.qkv", "attn.act_in", "attn.act_in", ("attn.q", "attn.k", "attn.v")),
    ("attn.out", "attn.y", "attn.v", ("attn.resid_delta",)),
    ("mlp.up", "mlp.act_in", "mlp.act_in", ("mlp.post_act",)),
    ("mlp.down", "mlp.post_act", "mlp.post_act", ("mlp.resid_delta",)),
)


@dataclass(frozen=True)
class Matrix:
    """The nonzero weights of one matrix.

    Attributes:
        module: its name in the model.
        reads: the hook point of its input, of which `Base` has a value.
        inputs, outputs: int64 `(E,)`, feature numbers of the matrix.
        source, target: int64 `(E,)`, the nodes' numbers in `Places`.
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
        """Those of a model, on the CPU."""
        places = Places.of(model.config)
        starts = dict(zip(places.names, _starts(places.widths), strict=True))
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
                        # q, k and v follow each other in the matrix and in the places.
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

    @contextmanager
    def without(self, model: Transformer, removed: Tensor, base: Base) -> Iterator[None]:
        """Inside the block these edges carry their source's `base`, not its activation.

        Args:
            removed: bool `(E,)`.
            base: by place, `(C,)` or `(B, T, C)`.
        """
        with ExitStack() as stack:
            for matrix, gone in zip(self.matrices, self.split(removed), strict=True):
                if bool(gone.any()):
                    stack.enter_context(_removed(model, matrix, gone, base[matrix.reads]))
            yield


@contextmanager
def _removed(model: Transformer, matrix: Matrix, gone: Tensor, base: Tensor) -> Iterator[None]:
    module = model.get_submodule(matrix.module)
    weight: Tensor = module.get_parameter("weight")
    flat = weight.data.view(-1)
    position = matrix.position[gone].to(flat.device)
    before = flat[position]
    constant = torch.zeros(
        *base.shape[:-1], _out_features(module), dtype=base.dtype, device=base.device
    )
    inputs, outputs = (which[gone].to(base.device) for which in (matrix.inputs, matrix.outputs))
    constant.index_add_(-1, outputs, base[..., inputs] * before.to(base))
    hook = module.register_forward_hook(partial(_add, constant))
    flat[position] = 0
    try:
        yield
    finally:
        flat[position] = before
        hook.remove()


def _add(constant: Tensor, module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    return output + constant


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


def _out_features(module: nn.Module) -> int:
    features = module.out_features
    assert isinstance(features, int)
    return features


def _starts(widths: tuple[int, ...]) -> list[int]:
    return [sum(widths[:place]) for place in range(len(widths))]
