"""Topology changes: a new pattern for a layer, with weights and optimizer state carried along."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparse_kernels.layout import FanInLayout
from sparse_kernels.linear import SparseLinear


def survivors(old: FanInLayout, new: FanInLayout) -> tuple[Tensor, Tensor]:
    """Where the blocks of `new` were in `old`, two layouts of the same geometry.

    Returns:
        `(slots, kept)`, int64 and bool `(R, F)`: where `kept[r, f]`, block `f` of row `r` of `new`
        is block `slots[r, f]` of row `r` of `old`; elsewhere the block is new and the slot any.
    """
    slots = torch.searchsorted(old.indices, new.indices).clamp_(max=old.blocks_per_row - 1)
    return slots, old.indices.gather(1, slots) == new.indices


def carry(tensor: Tensor, slots: Tensor, kept: Tensor) -> Tensor:
    """`tensor` of `values_shape` in the new order: survivors keep their values, new blocks are 0.

    `(R, F, block_out, block_in)` to the same; `slots` and `kept` as `survivors` returns them. For
    state that `rewire_` does not know of, such as an average of the weights.
    """
    moved = tensor.gather(1, slots[:, :, None, None].expand_as(tensor))
    return moved.masked_fill_(~kept[:, :, None, None], 0)


def rewire_(layer: SparseLinear, optimizer: Optimizer | None, new_layout: FanInLayout) -> None:
    """Gives `layer` the pattern `new_layout`, in place.

    Connections that both patterns have keep their weight, their gradient and their optimizer state;
    new ones start with all of them zero. `layer.weight` stays the same Parameter. Of the optimizer,
    every state tensor of this weight that has the weight's shape is carried (momenta, second
    moments, float32 master copies); step counters and other parameters are not touched.

    Everything is validated and computed before anything is written.

    Args:
        layer: the layer to change.
        optimizer: the optimizer that trains `layer.weight`, or None.
        new_layout: of the geometry of `layer.layout`: for a fan-out layer, that of `W^T`.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: another geometry or device, or an optimizer that does not hold the weight.
    """
    if not isinstance(layer, SparseLinear):
        raise TypeError(f"layer must be a SparseLinear, got {type(layer).__name__}")
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer or None, got {type(optimizer).__name__}"
        )
    if not isinstance(new_layout, FanInLayout):
        raise TypeError(f"new_layout must be a FanInLayout, got {type(new_layout).__name__}")
    old_layout, weight = layer.layout, layer.weight
    if _geometry(new_layout) != _geometry(old_layout):
        raise ValueError(f"new_layout must have the geometry of {old_layout}, got {new_layout}")
    if new_layout.device != old_layout.device:
        raise ValueError(
            f"new_layout must be on the layer's device {old_layout.device}, got {new_layout.device}"
        )
    carried = [weight.detach()]
    if weight.grad is not None:
        carried.append(weight.grad.detach())
    if optimizer is not None:
        if not any(held is weight for group in optimizer.param_groups for held in group["params"]):
            raise ValueError("optimizer must hold layer.weight, and none of its groups does")
        carried += [
            state
            for state in optimizer.state.get(weight, {}).values()
            if isinstance(state, Tensor) and state.shape == weight.shape
        ]
    with torch.no_grad():
        slots, kept = survivors(old_layout, new_layout)
        moved = [carry(tensor, slots, kept) for tensor in carried]
        for tensor, value in zip(carried, moved, strict=True):
            tensor.copy_(value)
    layer._replace_pattern(new_layout)


def _geometry(layout: FanInLayout) -> tuple[int, int, int, tuple[int, int]]:
    return layout.out_features, layout.in_features, layout.fan_in, layout.block
