"""The nodes of a model, and forwards in which all but some of them are frozen.

A node is one channel of one place: what a sublayer reads of the residual stream (after RMSNorm and
AbsTopK), a q, k or v channel, an MLP neuron, what a sublayer writes (Gao et al. 2025, section 2.2).
A set of nodes is a bool vector over `Places.total`, the same for all tokens and prompts.

A frozen v channel freezes the same channel of the attention's result `y` as well: with a sink the
probabilities do not add up to 1, so that the pattern alone would leak through a constant value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from sparse_transformer import hooks
from sparse_transformer.model import ModelConfig, Transformer

_KINDS = {"act_in": "read", "q": "q", "k": "k", "v": "v", "resid_delta": "write"}
_KINDS |= {"post_act": "neuron"}
# By place: what its nodes have where they are frozen, `(C,)` or `(B, T, C)`.
Base = Mapping[str, Tensor]


@dataclass(frozen=True)
class Places:
    """Where nodes are, in the order in which a forward reaches them.

    Attributes:
        names: of hook points.
        widths: how many nodes each has.
        heads: width of an attention head.
    """

    names: tuple[str, ...]
    widths: tuple[int, ...]
    d_head: int

    @classmethod
    def of(cls, config: ModelConfig) -> Places:
        """Those of a model."""
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
        """`(..., total)` to `(..., width)` by place."""
        return dict(zip(self.names, flat.split(self.widths, -1), strict=True))

    def locate(self, index: int) -> tuple[str, int]:
        """Place and channel of a node."""
        for name, width in zip(self.names, self.widths, strict=True):
            if index < width:
                return name, index
            index -= width
        raise IndexError("no such node")

    def id(self, index: int) -> str:
        """`place:channel`."""
        return "{}:{}".format(*self.locate(index))

    def index(self, id: str) -> int:
        """The inverse of `id`.

        Raises:
            KeyError: there is no such node.
        """
        place, _, channel = id.partition(":")
        if place not in self.names or not channel.isdecimal():
            raise KeyError(id)
        number = self.names.index(place)
        if int(channel) >= self.widths[number]:
            raise KeyError(id)
        return sum(self.widths[:number]) + int(channel)

    def kind(self, name: str) -> str:
        """Of a place: read, q, k, v, neuron or write."""
        return _KINDS[name.rsplit(".", 1)[1]]


@contextmanager
def frozen(model: Transformer, keep: Tensor, base: Base) -> Iterator[None]:
    """Inside the block only the nodes of `keep` are computed, all others have their `base`.

    Args:
        keep: bool `(total,)`, or `(G, total)`: then the batch is G groups of equally many rows,
            each with its own set.
        base: by place, and by `{layer}.attn.y`.
    """
    places = Places.of(model.config)
    with hooks.replacing(model, _changes(places.split(keep), base, _replace)):
        yield


@contextmanager
def masked(
    model: Transformer, mask: Tensor, base: Base, temperature: float | Tensor
) -> Iterator[None]:
    """`frozen` with the nodes where `mask` is above 0, differentiable in `mask`.

    In the backward the step has the derivative of `sigmoid(mask / temperature)`.

    Args:
        mask: float `(G, total)`.
        base: as for `frozen`, constants `(C,)`.
        temperature: a number, or `(G, 1)`.
    """
    places = Places.of(model.config)

    def soften(x: Tensor, part: Tensor, constant: Tensor) -> Tensor:
        y: Tensor = Freeze.apply(x, part, constant, temperature)
        return y

    with hooks.replacing(model, _changes(places.split(mask), base, soften)):
        yield


def _changes(
    parts: Mapping[str, Tensor], base: Base, change: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> dict[str, hooks.Replacement]:
    def at(name: str, part: Tensor) -> hooks.Replacement:
        return lambda x: change(x, part, base[name])

    changes = {name: at(name, part) for name, part in parts.items()}
    for name, part in parts.items():
        if name.endswith(".v"):
            result = name[:-1] + "y"
            changes[result] = at(result, part)
    return changes


def _replace(x: Tensor, keep: Tensor, base: Tensor) -> Tensor:
    return torch.where(_by_row(keep, x), x, base)


def _by_row(part: Tensor, x: Tensor) -> Tensor:
    """`(C,)` as it is, `(G, C)` as `(B, 1, C)`."""
    if part.dim() == 1:
        return part
    return part.repeat_interleave(x.shape[0] // part.shape[0], 0).unsqueeze(1)


class Freeze(Function):
    """`y = x where mask > 0 else base`; x `(B, T, C)`, mask `(G, C)`, base `(C,)`.

    `d mask = sum over a group's rows and tokens of dY (x - base)`, times the derivative of
    `sigmoid(mask / temperature)` (Gao et al. 2025, appendix A.5).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mask: Tensor, base: Tensor, temperature: float | Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, mask, base)
        ctx.temperature = temperature
        return torch.where(_by_row(mask > 0, x), x, base)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, mask, base = ctx.saved_tensors
        G, C = mask.shape
        share = torch.sigmoid(mask / ctx.temperature)
        slope = share * (1 - share) / ctx.temperature
        effect = torch.sub(x, base).mul_(grad_y).view(G, -1, C).sum(1)
        return grad_y * _by_row(mask > 0, x), effect * slope, None, None
