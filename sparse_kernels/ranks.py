"""Distributed runs: compares the patterns of the ranks, or gives all ranks that of the first."""

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


def compare(patterns: dict[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Raises RuntimeError on every rank of `group` if a pattern differs, with the layers' names.

    A collective. `patterns` are the `indices` of each layer, by name, in the same order everywhere.
    """
    if not patterns:
        return
    sums = [checksum(indices) - 2**63 for indices in patterns.values()]  # int64 is signed
    mine = torch.tensor(sums, device=next(iter(patterns.values())).device)
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, mine, group=group)
    differs = (torch.stack(every) != every[0]).any(0).tolist()
    if any(differs):
        names = [name for name, differ in zip(patterns, differs, strict=True) if differ]
        raise RuntimeError(
            f"the ranks have different patterns (indices) in {', '.join(names)}: build the model "
            f"with the same seed on every rank, load the same state dict, rewire every rank with "
            f"the same layout, or use DistributedDataParallel with broadcast_buffers=True"
        )


def check_once(kind: type[SparseLinear]) -> None:
    """Compares patterns at the first forward of the DistributedDataParallel in progress, if any.

    One collective compares all layers of this `kind`, so the ranks may run them in any order.
    Where DistributedDataParallel broadcasts buffers, patterns cannot differ.
    """
    model = DistributedDataParallel._get_active_ddp_module()
    if model is None or model in _compared or model.will_sync_module_buffers():
        return
    compare(patterns(model.module, kind), model.process_group)
    _compared.add(model)


def patterns(model: nn.Module, kind: type[SparseLinear]) -> dict[str, Tensor]:
    """The `indices` of each layer of `model`, by its name."""
    modules = model.named_modules()
    return {name or "the model": m.indices for name, m in modules if isinstance(m, kind)}


def is_sharded(weight: Tensor) -> bool:
    """Whether this rank has only a part of `weight`: a DTensor, as FSDP2 makes it."""
    return hasattr(weight, "device_mesh")


def broadcast(indices: Tensor, weight: Tensor) -> None:
    """Gives `indices` of the first rank to all that share the sharded `weight`."""
    mesh = weight.device_mesh  # type: ignore[attr-defined]
    for dim in range(mesh.ndim):
        group = mesh.get_group(dim)
        dist.broadcast(indices, dist.get_global_rank(group, 0), group)
