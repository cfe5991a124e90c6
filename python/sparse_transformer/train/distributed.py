"""The ranks of a run that `torchrun` started; one rank alone is the ordinary case.

Gradients are averaged by hand and not by `DistributedDataParallel`. That builds its buckets once
for the shapes that the parameters have then, and here shapes change with every annealed fan. What
it would gain, messages that overlap with the backward pass, is little for gradients of L0 elements.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from sparse_transformer.errors import UserError

# One message holds at most this many elements, so that dense gradients need no second copy of all.
_MESSAGE_ELEMENTS = 1 << 24
# What the libraries say when another process is gone; they raise plain RuntimeErrors.
_LOST = re.compile(
    r"gloo|nccl|connection|socket|broken pipe|timed? ?out|store|process group", re.IGNORECASE
)


@dataclass(frozen=True)
class Ranks:
    """This process among `world` of them: `rank`, and the `device` it computes on."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files."""
        return self.rank == 0

    @torch.no_grad()
    def average_gradients_(self, parameters: Iterable[Tensor]) -> None:
        """Replaces every gradient by its mean over the ranks."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for group in _messages(gradients):
            average_(group)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over the ranks, the same bits on each."""
        if self.world > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def broadcast_(self, tensors: Iterable[Tensor]) -> None:
        """Gives every rank what the first one has."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)

    def agree(self, topology: str, stop: int) -> int:
        """Compares the topology of all ranks, and hears whether one of them was told to stop.

        Args:
            topology: a hash in hexadecimal; a UserError if it is not the same on all.
            stop: the number of the signal that this rank received, or 0.

        Returns:
            The largest `stop` of all ranks.
        """
        if self.world == 1:
            return stop
        # 63 bits of the hash; int64 has a sign.
        mine = torch.tensor([int(topology[:16], 16) >> 1, stop], device=self.device)
        everyone = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(everyone, mine)
        hashes, stops = torch.stack(everyone).cpu().unbind(1)
        if (hashes != hashes[0]).any():
            ranks = (hashes != hashes[0]).nonzero().flatten().tolist()
            raise UserError(
                f"the connections of rank {ranks[0]} are not those of rank 0: run all ranks on the "
                f"same kind of machine with the same versions, then continue with --resume"
            )
        return int(stops.max())

    def wait(self) -> None:
        """Returns when all ranks are here."""
        if self.world > 1:
            self.sum(torch.zeros(1, device=self.device))


@contextlib.contextmanager
def ranks(device: str, timeout_s: float) -> Iterator[Ranks]:
    """This process's place in what `torchrun` started, joined to the others; alone without it.

    Args:
        device: "cpu", "cuda" or "auto", which is CUDA where there is a GPU.
        timeout_s: how long to wait for a rank that does not answer.

    Raises:
        UserError: no such device; or, anywhere inside, a rank that died or does not answer.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA GPU here: use --device cpu")
    world = _world()
    rank, local = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(
                f"rank {rank} has no GPU, there are {torch.cuda.device_count()}: start at most as "
                f"many processes per machine with torchrun --nproc-per-node"
            )
        torch.cuda.set_device(local)
        place = torch.device("cuda", local)
    else:
        place = torch.device("cpu")
    if world == 1:
        yield Ranks(0, 1, place)
        return
    try:
        dist.init_process_group(
            "nccl" if device == "cuda" else "gloo",
            timeout=datetime.timedelta(seconds=timeout_s),
            device_id=place if device == "cuda" else None,
        )
        yield Ranks(rank, world, place)
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not _LOST.search(str(error)):
            raise
        # The group stays as it is: see `leave`.
        raise UserError(
            f"rank {rank} lost the other ranks: one of them died or did not answer for "
            f"{timeout_s:g} s. Check its output, then continue with --resume"
        ) from error
    except BaseException:
        if dist.is_initialized():
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def average_(tensors: Sequence[Tensor]) -> None:
    """The mean of each over the ranks, in place and in one message."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def leave(status: int) -> NoReturn:
    """Ends the process; one of several without taking its libraries down.

    gloo's threads may outlive their group, and then abort the process while it ends: seen at one
    exit in six of runs that had gone well, and more often where another rank had died.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if _world() > 1:
        os._exit(status)
    sys.exit(status)


def _world() -> int:
    """How many processes `torchrun` started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _messages(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive gradients of one dtype, up to `_MESSAGE_ELEMENTS` together or one alone."""
    group: list[Tensor] = []
    size = 0
    for gradient in gradients:
        if group and (
            size + gradient.numel() > _MESSAGE_ELEMENTS or gradient.dtype != group[0].dtype
        ):
            yield group
            group, size = [], 0
        group.append(gradient)
        size += gradient.numel()
    if group:
        yield group
