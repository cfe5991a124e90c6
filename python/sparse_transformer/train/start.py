"""A model that begins as another one: with its weights, and perhaps more connections or positions.

What is added has weight zero, so at first both compute the same. Position channels do take places
of AbsTopK from small channels of the residual stream.
"""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

import sparse_kernels as sk
from sparse_transformer.config import ModelConfig
from sparse_transformer.errors import UserError
from sparse_transformer.model import Transformer

# What may be another: how much is connected, what is read beside the stream, how it is computed.
_FREE = ("density", "embedding_density", "min_nonzeros", "fans", "positions", "abs_topk", "backend")


@torch.no_grad()
def grown(other: Transformer, model: Transformer) -> Transformer:
    """`other` with the fans and the position channels of `model`.

    Each row of a sparse layer keeps the connections of `other`. Connections of `model` join them,
    with weight zero, until the row is as long as in `model`. Position channels that `other` lacks
    are those of `model`.

    Raises:
        UserError: they differ in anything else, `other` has more connections in a row or other
            position channels, or a matrix is dense and `model` has position channels of its own.
    """
    config = model.config
    _check(other.config, config)
    state = other.state_dict()
    added = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name not in state and "position" in name
    }
    if added and config.linear != "sparse":
        raise UserError(
            f"--positions {config.positions} cannot be added to a {config.linear} model: leave it "
            f"out"
        )
    started = Transformer.from_state(config, {**state, **added}, device=model.norm.weight.device)
    wanted = model.sparse_layers()
    for name, layer in started.sparse_layers().items():
        sk.rewire_(layer, None, _union(name, layer.layout, wanted[name].layout))
    return started


def _union(name: str, old: sk.FanInLayout, new: sk.FanInLayout) -> sk.FanInLayout:
    """The blocks of `old`, and as many of the others of `new` as make its rows as long."""
    missing = new.blocks_per_row - old.blocks_per_row
    if missing < 0:
        raise UserError(
            f"{name} has {old.blocks_per_row} connections in a row, and would have "
            f"{new.blocks_per_row}: raise --density, --embedding-density or "
            f"--topology.start-multiple"
        )
    place = torch.searchsorted(old.indices, new.indices).clamp_(max=old.blocks_per_row - 1)
    exists: Tensor = old.indices.gather(1, place) == new.indices
    others = new.indices.gather(1, exists.int().argsort(dim=1, stable=True)[:, :missing])
    indices = torch.cat([old.indices, others], 1).sort(dim=1).values
    return sk.FanInLayout(indices, new.in_features, new.out_features, new.block)


def _check(old: ModelConfig, new: ModelConfig) -> None:
    free = {*_FREE} - ({"positions"} if old.positions else set())
    for field in fields(ModelConfig):
        was, wanted = getattr(old, field.name), getattr(new, field.name)
        if field.name not in free and was != wanted:
            raise UserError(
                f"the model of --start-from has {field.name} {was} and not {wanted}: choose the "
                f"same"
            )
