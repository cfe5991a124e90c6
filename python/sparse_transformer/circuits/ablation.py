"""Forwards in which parts of a model are ablated: replaced by a baseline, by default their mean.

A frozen v channel freezes the same channel of the attention's result `y` as well: with a sink the
probabilities do not add up to 1, so the pattern alone would leak through a constant value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

import sparse_kernels as sk
from sparse_transformer import hooks
from sparse_transformer.circuits.graph import Edges, Matrix, Nodes
from sparse_transformer.model import Transformer

# By hook point, `{layer}.attn.y` included: the ablated activations, `(C,)` or `(B, T, C)`.
Baseline = Mapping[str, Tensor]


@contextmanager
def keep_nodes(model: Transformer, keep: Tensor, baseline: Baseline) -> Iterator[None]:
    """Inside the block only the nodes of `keep`, bool `(total,)`, are computed.

    The others have their baseline.
    """
    parts = Nodes.of(model.config).split(keep)
    frozen = {name: part for name, part in parts.items() if not bool(part.all())}

    def freeze(part: Tensor, constant: Tensor) -> hooks.Replacement:
        share = part.to(constant.dtype)
        rest = constant * (1 - share)
        return lambda x: torch.addcmul(rest, x, share)

    with hooks.replacing(model, _changes(frozen, baseline, freeze)):
        yield


@contextmanager
def mask_nodes(
    model: Transformer,
    mask: Tensor,
    baseline: Baseline,
    temperature: float = 1.0,
    live: Tensor | None = None,
) -> Iterator[None]:
    """`keep_nodes` where `mask` is above 0, differentiable in `mask`.

    In the backward the step has the derivative of `sigmoid(mask / temperature)`.

    Args:
        mask: float `(total,)`.
        live: bool `(total,)`, nodes that are computed whatever their mask.
    """
    nodes = Nodes.of(model.config)
    held = dict.fromkeys(nodes.names) if live is None else nodes.split(live)

    def soften(part: tuple[Tensor, Tensor | None], constant: Tensor) -> hooks.Replacement:
        mask, always = part
        share = (mask > 0) if always is None else (mask > 0) | always
        share = share.to(constant.dtype)
        rest = constant * (1 - share)

        def change(x: Tensor) -> Tensor:
            y: Tensor = Mask.apply(x, mask, share, constant, rest, always, temperature)
            return y

        return change

    parts = {name: (part, held[name]) for name, part in nodes.split(mask).items()}
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
    """`y = x where share is 1 else baseline`; x `(B, T, C)`, baseline `(C,)` or `(B, T, C)`.

    `d mask = sum over tokens of dY (x - baseline)`, times the derivative of
    `sigmoid(mask / temperature)` (Gao et al. 2025, appendix A.5); 0 for what is always computed.
    `rest` is `baseline * (1 - share)`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mask: Tensor,
        share: Tensor,
        baseline: Tensor,
        rest: Tensor,
        always: Tensor | None,
        temperature: float,
    ) -> Tensor:
        ctx.save_for_backward(x, mask, share, baseline, always)
        ctx.temperature = temperature
        return torch.addcmul(rest, x, share)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, mask, share, baseline, always = ctx.saved_tensors
        if baseline.dim() == 1:
            effect = _column_sums(x * grad_y) - baseline * _column_sums(grad_y)
        else:
            effect = _column_sums(torch.sub(x, baseline).mul_(grad_y))
        effect = effect * sigmoid_slope(mask, ctx.temperature)
        if always is not None:
            effect = effect.masked_fill(always, 0.0)
        return grad_y * share, effect, None, None, None, None, None


def sigmoid_slope(mask: Tensor, temperature: float) -> Tensor:
    """The derivative of `sigmoid(mask / temperature)`."""
    share = torch.sigmoid(mask / temperature)
    return share * (1 - share) / temperature


def _column_sums(x: Tensor) -> Tensor:
    """`(B, T, C)` to `(C,)`; as a product several times faster than `sum`."""
    rows = x.reshape(-1, x.shape[-1])
    return (rows.new_ones(1, len(rows)) @ rows).squeeze(0)


def _changes(
    parts: Mapping[str, Any],
    baseline: Baseline,
    change: Callable[[Any, Tensor], hooks.Replacement],
) -> dict[str, hooks.Replacement]:
    changes = {name: change(part, baseline[name]) for name, part in parts.items()}
    for name, part in parts.items():
        if name.endswith(".v"):
            result = name[:-1] + "y"
            changes[result] = change(part, baseline[result])
    return changes


@contextmanager
def _removed(model: Transformer, matrix: Matrix, gone: Tensor, baseline: Tensor) -> Iterator[None]:
    module = model.get_submodule(matrix.module)
    weight: Tensor = module.get_parameter("weight")
    flat = weight.data.view(-1)
    position = matrix.position[gone].to(flat.device)
    before = flat[position]
    assert isinstance(module, (nn.Linear, sk.SparseLinear))
    constant = baseline.new_zeros(*baseline.shape[:-1], module.out_features)
    inputs, outputs = (which[gone].to(baseline.device) for which in (matrix.inputs, matrix.outputs))
    constant.index_add_(-1, outputs, baseline[..., inputs] * before.to(baseline))
    hook = module.register_forward_hook(lambda _, given, output: output + constant)
    flat[position] = 0
    try:
        yield
    finally:
        flat[position] = before
        hook.remove()
