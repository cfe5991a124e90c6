"""Forwards in which parts of a model are ablated: replaced by a baseline, by default their mean.

A frozen v channel freezes the same channel of the attention's result `y` as well: with a sink the
probabilities do not add up to 1, so the pattern alone would leak through a constant value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from sparse_transformer import hooks
from sparse_transformer.circuits.graph import Edges, Matrix, Nodes
from sparse_transformer.model import Transformer

# By hook point, `{layer}.attn.y` included: the ablated activations, `(C,)` or `(B, T, C)`.
Baseline = Mapping[str, Tensor]


@contextmanager
def keep_nodes(model: Transformer, keep: Tensor, baseline: Baseline) -> Iterator[None]:
    """Inside the block only the nodes of `keep` are computed; the others have their baseline.

    Args:
        keep: bool `(total,)`, or `(G, total)`: then the batch is G groups of equally many rows,
            each with its own set.
    """
    parts = Nodes.of(model.config).split(keep)
    with hooks.replacing(model, _changes(parts, baseline, _replace)):
        yield


@contextmanager
def mask_nodes(
    model: Transformer, mask: Tensor, baseline: Baseline, temperature: float | Tensor = 1.0
) -> Iterator[None]:
    """`keep_nodes` where `mask` is above 0, differentiable in `mask`.

    In the backward the step has the derivative of `sigmoid(mask / temperature)`.

    Args:
        mask: float `(G, total)`.
        baseline: constants `(C,)`.
        temperature: a number, or `(G, 1)`.
    """
    parts = Nodes.of(model.config).split(mask)

    def soften(x: Tensor, part: Tensor, constant: Tensor) -> Tensor:
        y: Tensor = Mask.apply(x, part, constant, temperature)
        return y

    with hooks.replacing(model, _changes(parts, baseline, soften)):
        yield


@contextmanager
def remove_edges(
    model: Transformer, edges: Edges, removed: Tensor | None, baseline: Baseline
) -> Iterator[None]:
    """Inside the block these edges carry their source's baseline, not its activation.

    Args:
        removed: bool `(E,)`; None for none.
    """
    with ExitStack() as stack:
        if removed is not None:
            for matrix, gone in zip(edges.matrices, edges.split(removed), strict=True):
                if bool(gone.any()):
                    stack.enter_context(_removed(model, matrix, gone, baseline[matrix.reads]))
        yield


class Mask(Function):
    """`y = x where mask > 0 else baseline`; x `(B, T, C)`, mask `(G, C)`, baseline `(C,)`.

    `d mask = sum over a group's rows and tokens of dY (x - baseline)`, times the derivative of
    `sigmoid(mask / temperature)` (Gao et al. 2025, appendix A.5).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mask: Tensor, baseline: Tensor, temperature: float | Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, mask, baseline)
        ctx.temperature = temperature
        return _replace(x, mask > 0, baseline)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, mask, baseline = ctx.saved_tensors
        G, C = mask.shape
        effect = torch.sub(x, baseline).mul_(grad_y).view(G, -1, C).sum(1)
        slope = sigmoid_slope(mask, ctx.temperature)
        return grad_y * _by_row(mask > 0, x), effect * slope, None, None


def sigmoid_slope(mask: Tensor, temperature: float | Tensor) -> Tensor:
    """The derivative of `sigmoid(mask / temperature)`."""
    share = torch.sigmoid(mask / temperature)
    return share * (1 - share) / temperature


def _changes(
    parts: Mapping[str, Tensor],
    baseline: Baseline,
    change: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> dict[str, hooks.Replacement]:
    def at(name: str, part: Tensor) -> hooks.Replacement:
        return lambda x: change(x, part, baseline[name])

    changes = {name: at(name, part) for name, part in parts.items()}
    for name, part in parts.items():
        if name.endswith(".v"):
            result = name[:-1] + "y"
            changes[result] = at(result, part)
    return changes


def _replace(x: Tensor, keep: Tensor, baseline: Tensor) -> Tensor:
    return torch.where(_by_row(keep, x), x, baseline)


def _by_row(part: Tensor, x: Tensor) -> Tensor:
    """`(C,)` as it is, `(G, C)` as `(B, 1, C)`."""
    if part.dim() == 1:
        return part
    return part.repeat_interleave(x.shape[0] // part.shape[0], 0).unsqueeze(1)


@contextmanager
def _removed(model: Transformer, matrix: Matrix, gone: Tensor, baseline: Tensor) -> Iterator[None]:
    module = model.get_submodule(matrix.module)
    weight: Tensor = module.get_parameter("weight")
    flat = weight.data.view(-1)
    position = matrix.position[gone].to(flat.device)
    before = flat[position]
    constant = torch.zeros(
        *baseline.shape[:-1], _out_features(module), dtype=baseline.dtype, device=baseline.device
    )
    inputs, outputs = (which[gone].to(baseline.device) for which in (matrix.inputs, matrix.outputs))
    constant.index_add_(-1, outputs, baseline[..., inputs] * before.to(baseline))
    hook = module.register_forward_hook(partial(_add, constant))
    flat[position] = 0
    try:
        yield
    finally:
        flat[position] = before
        hook.remove()


def _add(constant: Tensor, module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    return output + constant


def _out_features(module: nn.Module) -> int:
    features = module.out_features
    assert isinstance(features, int)
    return features
