"""Parameters, gradients and optimizer state spread over the ranks: PyTorch's FSDP2.

Each rank keeps a slice of the rows of every parameter, of its gradient and of both Adam moments.
A block is gathered for its forward and again for its backward pass, and the mean of its gradients
comes back in slices, for each accumulated part, so that no rank ever holds all gradients.

The matrices must be dense: their state is K x N, that of sparse ones L0. Before its slices are cut
a device holds all parameters once, a quarter of what an unsharded run holds.

The tests run this on CPUs (gloo). On GPUs (NCCL) it has not been run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# Importing `torch.distributed.fsdp` and `.tensor` takes a second: only who shards does.

_OUT = "leave --shard out (with --resume give --no-shard)"


def why_not(linear: str, world: int) -> str | None:
    """Why such a model cannot be sharded over `world` ranks, and what to do; None if it can."""
    if linear == "sparse":
        return (
            f"--shard is for dense matrices, the state of --linear sparse is proportional to L0, "
            f"so small, and its shapes change with every rewiring: {_OUT}"
        )
    if world == 1:
        return f"--shard needs several ranks and this is one alone: start with torchrun, or {_OUT}"
    return None


def shard_(model: nn.Module, world: int, device: torch.device) -> None:
    """Leaves this rank its slice of every parameter of `model`, a DTensor; all ranks must call it.

    The model has `blocks` and a method `loss` that may be called like its forward, and is the same
    on each of the `world` ranks, on `device`.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (world,))
    for block in model.get_submodule("blocks").children():
        fully_shard(block, mesh=mesh)
    # By default the outermost parameters stay whole after a forward pass, until a backward pass
    # which validation does not have.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    register_fsdp_forward_method(model, "loss")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which this rank may have a slice; then all ranks must call it."""
    return tensor.full_tensor() if _is_sharded(tensor) else tensor


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Of a whole tensor what this rank has of `parameter`, in memory of its own."""
    if not _is_sharded(parameter):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None).clone()


def gather(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """The whole tensors on the CPU if this rank is to `keep` them, else {}; see `whole`.

    One at a time is whole on the device.
    """
    gathered = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if keep:
            gathered[name] = full.cpu()
    return gathered


def _is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    return hasattr(tensor, "full_tensor")
