"""Topology changes: a new pattern for a layer, with weights and optimizer state carried along."""

from __future__ import annotations

from types import NoneType

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparse_kernels.checks import check_type, memory_of
from sparse_kernels.layout import FanInLayout, check_layout
from sparse_kernels.linear import SparseLinear, layers


def survivors(old: FanInLayout, new: FanInLayout) -> tuple[Tensor, Tensor]:
    """Where the blocks of `new` were in `old`, two layouts of the same matrix and block.

    Returns:
        `(slots, kept)`, int64 and bool, both `(R, F)` of `new`: where `kept[r, f]`, block `f` of
        row `r` of `new` is block `slots[r, f]` of row `r` of `old`; elsewhere the block is new and
        the slot has no meaning.
    """
    slots = torch.searchsorted(old.indices, new.indices).clamp_(max=old.blocks_per_row - 1)
    return slots, old.indices.gather(1, slots) == new.indices


def carry(tensor: Tensor, slots: Tensor, kept: Tensor) -> Tensor:
    """`tensor` of `values_shape` in the new order: survivors keep their values, new blocks are 0.

    `(R, F_old, block_out, block_in)` to `(R, F, block_out, block_in)`; `slots` and `kept` as
    `survivors` returns them. Use it for state that `rewire_` does not carry, such as an average of
    the weights.
    """
    moved = tensor.gather(1, slots[:, :, None, None].expand(-1, -1, *tensor.shape[2:]))
    return moved.masked_fill_(~kept[:, :, None, None], 0)


def rewire_(layer: SparseLinear, optimizer: Optimizer | None, new_layout: FanInLayout) -> None:
    """Gives `layer` the pattern `new_layout`, in place; its fan may be another one.

    Connections that both patterns have keep their weight, their gradient and their optimizer state;
    new ones start with all of them zero. `layer.weight` stays the same Parameter, with its hooks.
    Of the optimizer, every state tensor of this weight that has an entry for each block is carried
    (momenta, second moments, float32 master copies, Adafactor's factors inside the blocks); step
    counters and other parameters are not touched.

    With another fan the weight, its gradient, its optimizer state, `layer.indices` and
    `layer.fan_in` (or `fan_out`) get new shapes. Backward through a graph recorded before raises a
    RuntimeError. Wrap the model in `DistributedDataParallel` again, because it has buffers of the
    old shapes, and load checkpoints into a layer of the new fan.

    In a distributed run every rank must rewire with the same `new_layout`; `check_ranks` compares
    the patterns afterwards.

    Everything is validated and computed before anything is written.

    Args:
        layer: the layer to change.
        optimizer: the optimizer that trains `layer.weight`, or None.
        new_layout: of the same matrix and block as `layer.layout`: for a fan-out layer, of `W^T`.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: another matrix, block or device; a weight that is not an ordinary Parameter
            (parametrized, pruned, sharded) or that another layer shares; an optimizer that does not
            hold the weight, or whose state for it cannot be carried (LBFGS,
            ZeroRedundancyOptimizer, anything of another shape).
    """
    check_type("layer", layer, SparseLinear, "a SparseLinear")
    check_type("optimizer", optimizer, (Optimizer, NoneType), "a torch.optim.Optimizer or None")
    check_layout("new_layout", new_layout)
    weight = _ordinary_weight(layer)
    old_layout = layer.layout
    if _matrix(new_layout) != _matrix(old_layout):
        raise ValueError(
            f"new_layout must be of the same matrix and block as {old_layout}, got {new_layout}"
        )
    if new_layout.device != old_layout.device:
        raise ValueError(
            f"new_layout must be on the layer's device {old_layout.device}, got {new_layout.device}"
        )
    state = {} if optimizer is None else _state_by_block(optimizer, weight)
    # Normal tensors even in inference mode, so that training may follow.
    with torch.inference_mode(False), torch.no_grad():
        slots, kept = survivors(old_layout, new_layout)
        values = carry(weight.detach(), slots, kept)
        grad = None if weight.grad is None else carry(weight.grad.detach(), slots, kept)
        moved = {key: carry(tensor, slots, kept) for key, tensor in state.items()}
        if new_layout.values_shape == old_layout.values_shape:
            weight.copy_(values)
            if grad is not None:
                weight.grad.copy_(grad)  # type: ignore[union-attr]
            for key, tensor in moved.items():
                state[key].copy_(tensor)
        else:
            _reshape_(weight, values, grad)
            if optimizer is not None and moved:
                optimizer.state[weight].update(moved)
        layer._replace_pattern(new_layout)


def _ordinary_weight(layer: SparseLinear) -> nn.Parameter:
    """`layer.weight`, a whole Parameter of this layer alone, or raises ValueError."""
    weight = layer._parameters.get("weight")
    if weight is None:
        raise ValueError(
            "layer.weight must be an ordinary Parameter, and it is parametrized or pruned: remove "
            "that first (torch.nn.utils.parametrize.remove_parametrizations, prune.remove)"
        )
    if type(weight.data) is not Tensor:
        raise ValueError(
            f"layer.weight must be an ordinary Parameter, got a {type(weight.data).__name__}: "
            f"rewire before the weight is sharded or quantized"
        )
    weights = [other._parameters.get("weight") for other in layers if other is not layer]
    if any(other is not None and memory_of(other) == memory_of(weight) for other in weights):
        raise ValueError(
            "layer.weight must belong to this layer alone, and another SparseLinear shares it, "
            "whose pattern would no longer fit: give one of them a copy of the weight"
        )
    return weight


def _state_by_block(optimizer: Optimizer, weight: nn.Parameter) -> dict[str, Tensor]:
    """The state of `optimizer` for each block of `weight`; raises ValueError if there is other."""
    if not any(held is weight for group in optimizer.param_groups for held in group["params"]):
        raise ValueError("optimizer must hold layer.weight, and none of its groups does")
    names = {base.__name__ for base in type(optimizer).__mro__}
    if names & {"LBFGS", "ZeroRedundancyOptimizer"}:
        raise ValueError(
            f"optimizer must keep a state of each weight that can be carried to new positions, and "
            f"{type(optimizer).__name__} mixes or spreads it: rewire without it (None) and make a "
            f"new one"
        )
    by_block = {}
    for key, value in optimizer.state.get(weight, {}).items():
        if isinstance(value, Tensor) and value.dim() == 4 and value.shape[:2] == weight.shape[:2]:
            by_block[key] = value
        elif not isinstance(value, (int, float, str, NoneType)) and not (
            isinstance(value, Tensor) and value.numel() == 1
        ):
            what = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"optimizer must keep tensors of the weight's shape {tuple(weight.shape)} or "
                f"numbers, and its state {key!r} is {what}: rewire without it (None) and make a "
                f"new one"
            )
    return by_block


def _reshape_(weight: nn.Parameter, values: Tensor, grad: Tensor | None) -> None:
    """Gives a Parameter values of another shape, and a new node that accumulates its gradient.

    The node has the shape of the weight that it was made for, and graphs share it while one of them
    exists (usually that of the last loss). Assigning data of another dtype makes torch drop the
    node; the next forward makes a new one, with the Parameter's hooks. The old node then raises, as
    after `torch.utils.swap_tensors`.
    """
    if weight.requires_grad:
        with torch.enable_grad():
            torch.autograd.graph.get_gradient_edge(weight).node.register_prehook(_refuse)
    weight.grad = None
    other = torch.float64 if weight.dtype != torch.float64 else torch.float32
    weight.data = torch.empty(0, dtype=other, device=weight.device)
    weight.data = torch.empty_like(values)
    # Copying counts as a write, so that graphs which saved the weight find it changed.
    weight.copy_(values)
    weight.grad = grad


def _refuse(grad_outputs: object) -> None:
    raise RuntimeError(
        "backward through a SparseLinear whose fan rewire_ has changed since the forward: "
        "run the forward again"
    )


def _matrix(layout: FanInLayout) -> tuple[int, int, tuple[int, int]]:
    return layout.out_features, layout.in_features, layout.block
