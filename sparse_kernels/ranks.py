"""Distributed runs: compares the layers of the ranks, or gives all ranks that of the first."""

from __future__ import annotations

import atexit
import time
import weakref
from hashlib import blake2b
from itertools import chain, compress
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparse_kernels.checks import has_values
from sparse_kernels.layout import checksum

if TYPE_CHECKING:
    from sparse_kernels.linear import SparseLinear

_compared: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def compare(
    model: nn.Module, kind: type[SparseLinear], group: dist.ProcessGroup | None = None
) -> None:
    """Raises RuntimeError on every rank of `group` if the layers of this `kind` differ.

    A collective. It first compares what has the same size everywhere, then a checksum of the
    pattern of each layer.
    """
    layers = {name or "the model": m for name, m in model.named_modules() if isinstance(m, kind)}
    device = _device_of(model, group)
    parts = {
        "number": len(layers),
        "names": list(layers),
        "shapes": [(m.in_features, m.out_features, *m.indices.shape) for m in layers.values()],
        "blocks": [m.block for m in layers.values()],
        "direction (fan_in or fan_out)": [m.transpose for m in layers.values()],
    }
    differs = _differs([_digest(part) for part in parts.values()], device, group)
    if any(differs):
        raise RuntimeError(
            f"the ranks have different SparseLinear layers, in their "
            f"{', '.join(compress(parts, differs))}: build the same model on every rank"
        )
    # Layers on the meta device have no pattern yet, and are equal.
    sums = [checksum(m.indices) if has_values(m.indices) else 0 for m in layers.values()]
    differs = _differs(sums, device, group)
    if any(differs):
        raise RuntimeError(
            f"the ranks have different patterns (indices) in "
            f"{', '.join(compress(layers, differs))}: build the model with the same seed on every "
            f"rank, load the same state dict, rewire every rank with the same layout, or use "
            f"DistributedDataParallel with broadcast_buffers=True"
        )


def _digest(part: object) -> int:
    """64 bits of what `part` prints as, the same in every process."""
    return int.from_bytes(blake2b(repr(part).encode(), digest_size=8).digest(), "little")


def _differs(
    numbers: list[int], device: torch.device, group: dist.ProcessGroup | None
) -> list[bool]:
    """For each of the 64-bit `numbers`, whether a rank has another."""
    mine = torch.tensor([number - 2**63 for number in numbers], dtype=torch.int64, device=device)
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, mine, group=group)
    differs: list[bool] = (torch.stack(every) != every[0]).any(0).tolist()
    return differs


def _device_of(model: nn.Module, group: dist.ProcessGroup | None) -> torch.device:
    """Where `group` compares: the device of the model's tensors, or what the group can use."""
    tensors = chain(model.buffers(), model.parameters())
    fallback = torch.device("cuda" if "nccl" in dist.get_backend(group) else "cpu")
    return next((tensor.device for tensor in tensors if has_values(tensor)), fallback)


def check_once(kind: type[SparseLinear]) -> None:
    """Compares layers at the first forward of the DistributedDataParallel in progress, if any.

    One collective compares all layers of this `kind`, so the ranks may run them in any order.
    Where DistributedDataParallel broadcasts buffers, patterns cannot differ. A forward without
    gradients does not compare: one rank alone may evaluate. Nor does one inside `join`, where the
    other ranks may have no more inputs.
    """
    model = DistributedDataParallel._active_ddp_module
    if model is None or not torch.is_grad_enabled() or model._join_config.enable:
        return
    if torch._C._are_functorch_transforms_active():  # its tensors are no plain ones to gather
        return
    if model in _compared or model.will_sync_module_buffers():
        return
    compare(model.module, kind, model.process_group)
    _compared.add(model)


def broadcast(indices: Tensor, weight: Tensor) -> None:
    """Gives `indices` of the first rank to all that share `weight`, if it is a sharded DTensor."""
    mesh: Any = getattr(weight, "device_mesh", None)
    for dim in range(mesh.ndim if mesh else 0):
        group = mesh.get_group(dim)
        dist.broadcast(indices, dist.get_global_rank(group, 0), group)


@atexit.register
def _let_gloo_end() -> None:
    """Waits for gloo's threads where a process ends without `destroy_process_group`.

    A thread that frees what was broadcast last takes the GIL, and aborts the process (PyTorch 2.13)
    if the interpreter is ending by then. DistributedDataParallel broadcasts `indices` in every
    forward, so that a process with this layer meets it often.
    """
    if dist.is_available() and dist.is_initialized():
        time.sleep(0.02)
