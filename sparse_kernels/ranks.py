"""The ranks of a distributed run must have the same patterns: compared, or given by the first."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparse_kernels.layout import checksum

if TYPE_CHECKING:
    from sparse_kernels.linear import SparseLinear

_compared: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def check_once(kind: type[SparseLinear]) -> None:
    """At the first forward of the DistributedDataParallel in progress, if any, compares patterns.

    It compares all layers of that `kind` in one collective: whichever of them a rank runs first,
    all ranks take part. Where DistributedDataParallel broadcasts the buffers nothing can
    differ.

    Raises:
        RuntimeError: on every rank, with the names of the layers that differ.
    """
    model = DistributedDataParallel._get_active_ddp_module()
    if model is None or model in _compared or model.will_sync_module_buffers():
        return
    named = {
        name or "the model": module.indices
        for name, module in model.module.named_modules()
        if isinstance(module, kind)
    }
    # Signed, as torch has it.
    sums = [checksum(indices) - 2**63 for indices in named.values()]
    mine = torch.tensor(sums, device=next(iter(named.values())).device)
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size(model.process_group))]
    dist.all_gather(every, mine, group=model.process_group)
    differs = (torch.stack(every) != every[0]).any(0).tolist()
    if any(differs):
        names = [name for name, differ in zip(named, differs, strict=True) if differ]
        raise RuntimeError(
            f"the ranks have different patterns (indices) in {', '.join(names)}, and "
            f"DistributedDataParallel does not broadcast buffers: build the model with the same "
            f"seed on every rank, load the same state dict, or wrap it with broadcast_buffers=True"
        )
    _compared.add(model)


def is_sharded(weight: Tensor) -> bool:
    """Whether this rank has a part of `weight` alone: a DTensor, as FSDP2 makes it."""
    return hasattr(weight, "device_mesh")


def broadcast(indices: Tensor, weight: Tensor) -> None:
    """Gives `indices` of the first rank to all that share the sharded `weight`."""
    mesh = weight.device_mesh  # type: ignore[attr-defined]
    for dim in range(mesh.ndim):
        group = mesh.get_group(dim)
        dist.broadcast(indices, dist.get_global_rank(group, 0), group)
