"""SparseLinear: the layer. Its weight is an ordinary Parameter, its pattern an ordinary buffer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparse_kernels import backends, ops, reference
from sparse_kernels.layout import (
    FanInLayout,
    check_fan_in,
    check_geometry,
    run_while_tracing,
)
from sparse_kernels.matmul import sparse_linear

_DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)


class SparseLinear(nn.Module):
    """`y = x W^T + b` where every output reads `fan_in` inputs, or every input feeds `fan_out`.

    A drop-in for `torch.nn.Linear` whose time and memory follow the number of weights that exist.

    Args:
        in_features: `K`; x is `(..., K)`.
        out_features: `N`; y is `(..., N)`.
        fan_in: inputs kept by each output in elements, a multiple of `block[1]`, at most `K`.
        fan_out: outputs kept by each input in elements, a multiple of `block[0]`, at most `N`.
            Exactly one of `fan_in` and `fan_out` is given. The published recipe reads through
            fan-in and writes through fan-out (Gao et al. 2025, arXiv 2511.13653).
        block: `(block_out, block_in)`, always in terms of the layer's outputs and inputs.
        bias: whether to add a learned bias `(N,)`.
        device: as for `torch.nn.Linear`.
        dtype: as for `torch.nn.Linear`.
        generator: draws the pattern and the initial weights; by default torch's global one.
        backend: as for `sparse_linear`.

    Attributes:
        weight: Parameter of `layout.values_shape`, `(R, F, *layout.block)`.
        bias: Parameter `(N,)`, or None.
        indices: persistent int32 buffer `(R, F)`, the pattern as the state dict carries it.
        layout: the `FanInLayout` in use. With `fan_out` it is the layout of the transposed matrix:
            `K` rows that keep `fan_out` of `N` columns, its block is `(block_in, block_out)`.

    The weights start uniform in `+-1/sqrt(fan_in)`, as in `torch.nn.Linear` but with the fan-in
    that exists; with `fan_out`, with its mean over the outputs. So does the bias.

    The layout is a validated copy of `indices`, and only the layout reaches a kernel. Writing to
    `indices` (as DistributedDataParallel does to synchronise ranks) takes effect at the next
    forward: the new pattern is validated and used, or refused with a ValueError. A compiled forward
    checks this only when it is traced. To change the pattern during training use `rewire_`.

    On the meta device, and after `to_empty`, the layer has no pattern: `load_state_dict` brings
    one, `reset_parameters` draws one, forward raises RuntimeError until then.

    Raises:
        TypeError, ValueError: an argument of the wrong type or size; the message names it.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    indices: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        fan_in: int | None = None,
        fan_out: int | None = None,
        block: tuple[int, int] = (1, 1),
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.block = check_geometry(out_features, in_features, block)
        if (fan_in is None) == (fan_out is None):
            raise ValueError(
                f"exactly one of fan_in and fan_out must be given, "
                f"got fan_in={fan_in} and fan_out={fan_out}"
            )
        self.fan_in = fan_in
        self.fan_out = fan_out
        if not isinstance(bias, bool):
            raise TypeError(f"bias must be a bool, got {type(bias).__name__}")
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in _DTYPES:
            raise TypeError(f"dtype must be float32, bfloat16, float64 or float16, got {dtype}")
        backends.check_name(backend)
        self.backend = backend
        block_rows, block_cols = self._stored_block
        if fan_out is None:
            count = check_fan_in(fan_in, in_features, self.block[1])
        else:
            count = check_fan_in(fan_out, out_features, self.block[0], "fan_out")
        shape = (self._stored_shape[0] // block_rows, count)
        device = torch.get_default_device() if device is None else torch.device(device)
        self.weight = nn.Parameter(
            torch.empty((*shape, block_rows, block_cols), device=device, dtype=dtype)
        )
        self.bias = (
            nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )
        self.register_buffer("indices", torch.empty(shape, device=device, dtype=torch.int32))
        self._layout: FanInLayout | None = None
        # The buffer and its version when it last agreed with the layout.
        self._seen = (self.indices, _version(self.indices))
        if device.type != "meta":
            self.reset_parameters(generator)

    @property
    def transpose(self) -> bool:
        """True for a fan-out layer, whose layout is that of `W^T`."""
        return self.fan_out is not None

    @property
    def _stored_shape(self) -> tuple[int, int]:
        shape = (self.out_features, self.in_features)
        return shape[::-1] if self.transpose else shape

    @property
    def _stored_block(self) -> tuple[int, int]:
        return self.block[::-1] if self.transpose else self.block

    @property
    def layout(self) -> FanInLayout:
        """The pattern in use.

        Raises:
            RuntimeError: the layer has none yet, see the class. ValueError: `indices` was written
                to and is no longer a valid pattern.
        """
        self._synchronize()
        if self._layout is None:
            raise RuntimeError(
                "this SparseLinear has no pattern yet: it was made on the meta device or emptied; "
                "call load_state_dict, or reset_parameters to draw a random one"
            )
        return self._layout

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws new weights, and a pattern if the layer has none yet."""
        if self.indices.is_meta:
            raise RuntimeError("a layer on the meta device holds no values: call to_empty first")
        if self._layout is None:
            layout = FanInLayout.random(
                *self._stored_shape,
                self.weight.shape[1] * self.weight.shape[3],
                self._stored_block,
                generator=generator,
                device=self.indices.device,
            )
            self._replace_pattern(layout)
        mean_fan_in = self.weight.numel() / self.out_features
        bound = mean_fan_in**-0.5
        with torch.no_grad():
            _uniform_(self.weight, bound, generator)
            if self.bias is not None:
                _uniform_(self.bias, bound, generator)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in_features)` to `(..., out_features)`; see `sparse_linear` for the errors."""
        return sparse_linear(
            x, self.weight, self.layout, self.bias, self.backend, transpose=self.transpose
        )

    def extra_repr(self) -> str:
        """What `print(layer)` shows."""
        fan = f"fan_out={self.fan_out}" if self.transpose else f"fan_in={self.fan_in}"
        density = self.weight.numel() / (self.in_features * self.out_features)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, {fan}, "
            f"block={self.block}, bias={self.bias is not None}, density={density:.3g}"
        )

    @classmethod
    def from_dense(
        cls,
        linear: nn.Linear,
        *,
        fan_in: int | None = None,
        fan_out: int | None = None,
        block: tuple[int, int] = (1, 1),
        backend: str | None = None,
    ) -> SparseLinear:
        """A layer with the largest-magnitude weights of `linear`, and a copy of its bias.

        Args:
            linear: a `torch.nn.Linear` without NaN.
            fan_in: as for the class; see `sparse_kernels.from_dense`.
            fan_out: as for the class.
            block: as for the class.
            backend: as for the class.

        Raises:
            TypeError, ValueError: an argument of the wrong type or size; the message names it.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be a torch.nn.Linear, got {type(linear).__name__}")
        layer = cls(
            linear.in_features,
            linear.out_features,
            fan_in=fan_in,
            fan_out=fan_out,
            block=block,
            bias=linear.bias is not None,
            device="meta",
            dtype=linear.weight.dtype,
            backend=backend,
        )
        weight = linear.weight.t() if layer.transpose else linear.weight
        kept = layer.weight.shape[1] * layer.weight.shape[3]
        layout, values = reference.from_dense(weight, kept, layer._stored_block)
        layer.weight = nn.Parameter(values, linear.weight.requires_grad)
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach().clone(), linear.bias.requires_grad)
        layer.indices = layout.indices.clone()
        layer._adopt(layout)
        return layer.train(linear.training)

    def to_dense(self) -> nn.Linear:
        """A `torch.nn.Linear` that computes the same, with copies of the weights."""
        weight = reference.to_dense(self.weight.detach(), self.layout)
        weight = weight.t().contiguous() if self.transpose else weight
        linear = nn.Linear(
            self.in_features,
            self.out_features,
            bias=self.bias is not None,
            device="meta",
            dtype=weight.dtype,
        )
        linear.weight = nn.Parameter(weight, self.weight.requires_grad)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad)
        return linear.train(self.training)

    @run_while_tracing
    def _synchronize(self) -> None:
        """Takes over a pattern that was written to `indices`; raises if it is not valid."""
        indices = self.indices
        if indices is self._seen[0] and _version(indices) == self._seen[1]:
            return
        # A tracer's stand-in has no content to look at, and stands for what was here before.
        if type(indices) is not Tensor or indices.is_meta:
            return
        layout = self._layout
        if (
            layout is None
            or indices.dtype != torch.int32
            or indices.device != layout.device
            or not torch.equal(indices, layout.indices)
        ):
            layout = self._validated(indices, "indices")
        self._adopt(layout)

    def _validated(self, indices: object, name: str) -> FanInLayout:
        """The layout that `indices` describes; raises and says `name` if it fits this layer not."""
        rows, columns = self._stored_shape
        try:
            if isinstance(indices, Tensor) and indices.shape != self.indices.shape:
                raise ValueError(
                    f"indices must have shape {tuple(self.indices.shape)}, "
                    f"got {tuple(indices.shape)}"
                )
            return FanInLayout(indices, columns, rows, self._stored_block)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name} of a SparseLinear: {error}") from error

    def _adopt(self, layout: FanInLayout) -> None:
        """Uses `layout` from now on; it has the same pattern as `indices`."""
        before = self._layout
        if before is not None and layout is not before and layout.device == before.device:
            # Whatever was derived from the old pattern was needed: a compiled graph reads it.
            for key in before.cache:
                ops.derive(layout, *key.split("."))
        self._layout = layout
        self._seen = (self.indices, _version(self.indices))

    def _replace_pattern(self, layout: FanInLayout) -> None:
        """Takes over `layout`, of the same matrix and block; the weights are left alone."""
        if layout.indices.shape == self.indices.shape:
            with torch.no_grad():
                self.indices.copy_(layout.indices)
        else:
            self.indices = layout.indices.clone()
            if self.transpose:
                self.fan_out = layout.fan_in
            else:
                self.fan_in = layout.fan_in
        self._adopt(layout)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        self._synchronize()
        super()._apply(fn, recurse)
        indices, layout = self.indices, self._layout
        if type(indices) is not Tensor or layout is None or indices.is_meta:
            self._layout = None if indices.is_meta else layout
            self._seen = (indices, _version(indices))
            return self
        layout = layout.to(indices.device)
        if indices.dtype != torch.int32:
            # Module.type() casts every tensor; a pattern does not follow.
            self.indices = layout.indices.clone()
        elif not torch.equal(indices, layout.indices):
            # `to_empty`: new memory, and no pattern in it.
            self._layout = None
            self._seen = (indices, _version(indices))
            return self
        self._adopt(layout)
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Validates everything that is to be loaded, then loads it: a failure loads nothing.

        Raises:
            TypeError, ValueError: the message names the key, what it holds and what it needs.
        """
        names = ["weight", "indices"] + (["bias"] if self.bias is not None else [])
        missing = [prefix + name for name in names if prefix + name not in state_dict]
        if strict and missing:
            missing_keys.extend(missing)
            return
        for name in names:
            if name != "indices" and prefix + name in state_dict:
                _check_loaded(prefix + name, state_dict[prefix + name], getattr(self, name))
        layout = None
        indices = state_dict.get(prefix + "indices")
        if prefix + "indices" in state_dict and not (
            isinstance(indices, Tensor) and indices.is_meta and self.indices.is_meta
        ):
            layout = self._validated(indices, prefix + "indices")
            state_dict = {**state_dict, prefix + "indices": layout.indices.clone()}
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )
        if layout is not None and not self.indices.is_meta:
            if layout == self._layout:
                layout = self._layout
            self._adopt(layout.to(self.indices.device))


def _version(tensor: Tensor) -> int:
    """Counts the writes to a tensor; -1 where torch does not count."""
    return -1 if tensor.is_inference() else tensor._version


def _uniform_(tensor: Tensor, bound: float, generator: torch.Generator | None) -> None:
    """Fills `tensor` uniformly in `+-bound`, drawing where the generator lives."""
    if generator is None or generator.device == tensor.device:
        tensor.uniform_(-bound, bound, generator=generator)
    else:
        drawn = torch.empty(tensor.shape, dtype=tensor.dtype, device=generator.device)
        tensor.copy_(drawn.uniform_(-bound, bound, generator=generator))


def _check_loaded(key: str, loaded: object, current: Tensor) -> None:
    if not isinstance(loaded, Tensor):
        raise TypeError(f"{key} must be a torch.Tensor, got {type(loaded).__name__}")
    if not loaded.is_floating_point():
        raise TypeError(f"{key} must have a floating-point dtype, got {loaded.dtype}")
    if loaded.shape != current.shape:
        raise ValueError(f"{key} must have shape {tuple(current.shape)}, got {tuple(loaded.shape)}")
