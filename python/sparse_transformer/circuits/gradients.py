"""Gradients of a loss in the presence of each edge of a model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparse_transformer.circuits.problem import Problem


class EdgeGradients:
    """Inside the block every backward adds to the gradients in the presence h of each edge.

    An edge carries `w mean(x) + h w (x - mean(x))`, with h = 1 where it is there and 0 where it is
    removed. With g the gradient of the loss in what it leads to, summed over tokens,
    `d loss / d h = sum(g w (x - mean(x))) = w (dw - mean(x) db)`, dw and db being the gradients of
    the weight and of a bias. No K x N matrix is made but the gradient of a dense layer's weight.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._modules = {
            matrix.module: problem.model.get_submodule(matrix.module)
            for matrix in problem.edges.matrices
        }
        self._weights = {
            name: module.get_parameter("weight") for name, module in self._modules.items()
        }
        self._sums: dict[str, Tensor] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> EdgeGradients:
        for name, module in self._modules.items():
            self._hooks.append(module.register_forward_hook(self._watch(name)))
        for weight in self._weights.values():
            weight.requires_grad_(True)
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()
        for weight in self._weights.values():
            weight.requires_grad_(False)
            weight.grad = None

    def take(self) -> Tensor:
        """`(E,)`, the gradients of the backwards since the last call."""
        found = []
        for matrix in self._problem.edges.matrices:
            weight = self._weights[matrix.module]
            if weight.grad is None:
                # Nothing that counts goes through this matrix.
                found.append(torch.zeros_like(matrix.weight))
                continue
            mean = self._problem.means[matrix.reads][matrix.inputs]
            db = self._sums[matrix.module][matrix.outputs]
            dw = weight.grad.reshape(-1)[matrix.position]
            found.append(matrix.weight * (dw - mean * db))
            weight.grad = None
        self._sums.clear()
        return torch.cat(found)

    def _watch(self, name: str) -> Callable[..., None]:
        def add(grad: Tensor) -> None:
            total = grad.sum((0, 1))
            self._sums[name] = total if name not in self._sums else self._sums[name] + total

        def note(module: object, inputs: object, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(add)

        return note
