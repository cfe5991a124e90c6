"""What autograd saves of a result of AbsTopK: a bit for each entry, and those that are not zero.

In the body of `packed_activations` a result of AbsTopK knows its packed form. A function that saves
it for its backward, such as the product that reads it, saves that instead and unpacks it when the
backward comes: at a quarter of the entries, in 29% of the memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from sparse_kernels import ops

_NAME = "_sparse_kernels_packed"
_enabled: ContextVar[bool] = ContextVar("packed_activations", default=False)


@contextlib.contextmanager
def packed_activations() -> Iterator[None]:
    """A context in which layers keep the packed form of a fused AbsTopK's result for backward.

    On the CPU this halves the memory of a training step, in the same time. The gradients are the
    same, unless the result is changed through `.data` or NumPy, which torch does not count, before
    a layer reads it. Then the gradient of the weights belongs to the unchanged result.
    """
    token = _enabled.set(True)
    try:
        yield
    finally:
        _enabled.reset(token)


class Packed(NamedTuple):
    """See `reference.pack`."""

    bits: Tensor
    values: Tensor
    of_gelu: bool  # the values are those before GELU
    backend: str
    shape: torch.Size
    version: int  # torch's count of writes to the result

    def unpack(self) -> Tensor:
        """The result of AbsTopK, of the shape that it had."""
        width = self.shape[-1]
        y: Tensor = ops.unpack(self.values, self.bits, width, self.of_gelu, self.backend)
        return y


def is_packed(backend: str) -> bool:
    """Whether results of AbsTopK get their packed form: not where a graph or a rule is recorded."""
    return backend == "cpu" and not torch.compiler.is_compiling() and not ops.is_transformed()


def attach(y: Tensor, bits: Tensor, values: Tensor, *, of_gelu: bool, backend: str) -> None:
    """Tells `y (M, D)`, a fresh result, its packed form, if that is wanted."""
    if is_packed(backend) and _enabled.get():  # in this order for torch.compile
        setattr(y, _NAME, Packed(bits, values, of_gelu, backend, y.shape, y._version))


def packed_form(x: Tensor) -> Packed | None:
    """The packed form of x, or None: x is no view of all of a result of AbsTopK, or was written."""
    root = x if x._base is None else x._base
    packed: Packed | None = getattr(root, _NAME, None)
    same = packed is not None and root._version == packed.version and x.dtype == root.dtype
    same = same and x.numel() == root.numel() and x.is_contiguous() and not x.is_neg()
    return packed if same else None


def remember(x: Tensor) -> Callable[[], Tensor]:
    """Keeps x, in packed form if it has one; returns a function that returns x, detached.

    For hooks that need a layer's input in the backward pass, such as those of rewiring.
    """
    packed = None if torch.compiler.is_compiling() else packed_form(x)
    if packed is None:
        whole = x.detach()
        return lambda: whole
    shape = x.shape
    return lambda: packed.unpack().view(shape)


def saving(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """In its body, what saves x saves its packed form, unless others handle saved tensors."""
    if torch.compiler.is_compiling() or packed_form(x) is None or _are_hooked():
        return contextlib.nullcontext()
    address, shape = x.data_ptr(), x.shape

    def pack(tensor: Tensor) -> Callable[[], Tensor]:
        if tensor.data_ptr() == address and tensor.shape == shape:
            return remembered
        return lambda: tensor

    remembered = remember(x)
    return saved_tensors_hooks(pack, lambda recall: recall())


def _are_hooked() -> bool:
    """Whether someone else handles saved tensors, as a checkpoint does, or forbids that."""
    enabled = torch._C._autograd._saved_tensors_hooks_is_enabled  # type: ignore[attr-defined]
    if ops.is_transformed() or not enabled():
        return True
    hooks: object = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None
