"""Attribution: first-order estimates of what the loss rises by if a node or an edge is ablated."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor

from sparse_transformer.circuits.ablation import (
    mask_nodes,
    remove_edges,
    sigmoid_slope,
)
from sparse_transformer.circuits.forward import Skipped
from sparse_transformer.circuits.objective import Subgraph, TaskLoss, by_position, logit_diff


def node_effects(task: TaskLoss, subgraph: Subgraph, *, everywhere: bool = False) -> Tensor:
    """Estimated rise of the loss if a node is ablated, `(total,)`.

    Args:
        everywhere: also in sublayers of which the subgraph has no write, and heads of which it has
            no v; otherwise they have 0.
    """
    mask = _mask(subgraph).requires_grad_(True)
    for ablation in task.pruned_under:
        _backward(task, subgraph, mask, ablation, everywhere)
    if mask.grad is None:
        return torch.zeros_like(mask)
    return -mask.grad / (sigmoid_slope(torch.ones_like(mask), 1.0) * len(task.pruned_under))


def edge_effects(task: TaskLoss, subgraph: Subgraph) -> Tensor:
    """Estimated rise of the loss if an edge is removed at the mean, `(E,)`.

    An edge carries `w mean(x) + h w (x - mean(x))`, with h = 1 where it is present and 0 where it
    is removed. With g the gradient of the loss in what it leads to, summed over tokens,
    `d loss / d h = sum(g w (x - mean(x))) = w (dw - mean(x) db)`, dw and db being the gradients of
    the weight and of a bias. No K x N matrix is made but the gradient of a dense layer's weight.
    """
    bias_gradients: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def add(grad: Tensor) -> None:
            total = grad.sum((0, 1))
            bias_gradients[name] = bias_gradients[name] + total if name in bias_gradients else total

        def note(module: object, inputs: object, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(add)

        return note

    names = [matrix.module for matrix in task.edges.matrices]
    modules = [task.model.get_submodule(name) for name in names]
    weights = [module.get_parameter("weight").requires_grad_(True) for module in modules]
    try:
        with ExitStack() as stack:
            for name, module in zip(names, modules, strict=True):
                stack.enter_context(module.register_forward_hook(watch(name)))
            _backward(task, subgraph, _mask(subgraph), "mean")
        found = []
        for matrix, weight in zip(task.edges.matrices, weights, strict=True):
            if weight.grad is None:
                # Nothing that counts goes through this matrix.
                found.append(torch.zeros_like(matrix.weight))
                continue
            mean = task.means[matrix.reads][matrix.inputs]
            dw = weight.grad.reshape(-1)[matrix.position]
            db = bias_gradients[matrix.module][matrix.outputs]
            found.append(matrix.weight * (mean * db - dw))
        return torch.cat(found)
    finally:
        for weight in weights:
            weight.requires_grad_(False)
            weight.grad = None


def _mask(subgraph: Subgraph) -> Tensor:
    return torch.where(subgraph.keep, 1.0, -1.0)


def _backward(
    task: TaskLoss, subgraph: Subgraph, mask: Tensor, ablation: str, everywhere: bool = False
) -> None:
    """Gradients of the calibrated loss on the prompts for fitting."""
    live = task.with_random_rest(subgraph, 0).keep if ablation == "random" else None
    kept = subgraph.keep if live is None else live
    for batch, calibration in task.fit_batches(subgraph):
        rest = task.baseline(batch, ablation)
        skipped = Skipped() if everywhere else Skipped.without(task.nodes, kept, rest)
        if len(skipped.writes) == 2 * task.model.config.n_layer:
            return  # nothing has an effect
        with (
            remove_edges(task.model, task.edges, subgraph.removed, rest),
            mask_nodes(
                task.model, mask, rest, live=None if live is None else live & ~subgraph.keep
            ),
        ):
            diffs = logit_diff(task.model, batch, skipped, shared=not by_position(rest))
            diffs = calibration.apply(diffs, batch.positive)
            (torch.nn.functional.softplus(-diffs).sum() / (2 * len(task.fit))).backward()
