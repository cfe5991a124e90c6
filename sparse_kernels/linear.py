"""SparseLinear: the layer. Its weight is an ordinary Parameter, its pattern an ordinary buffer."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from sparse_kernels import backends, checks, ops, ranks, reference
from sparse_kernels.layout import FanInLayout, Pattern
from sparse_kernels.matmul import linear, try_linear

_NO_PATTERN = -1  # what `indices` is filled with while a layer has no pattern
_OVERWRITTEN = (
    "indices of a SparseLinear was overwritten where no GPU stream sees it: by a collective "
    "or .data; read the layer's `layout` after such a write"
)
# Every layer that exists, to find those that share a weight.
layers: weakref.WeakSet[SparseLinear] = weakref.WeakSet()


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
        bias: whether to add a learned bias `(N,)`; None is False, as for `torch.nn.Linear`.
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

    Kernels read the layout, a validated copy of `indices`. Every forward compares the two by a
    checksum: a pattern written to `indices` in any way (a collective, `.data`, a load hook) is
    validated and used, or refused with a ValueError. On a GPU the comparison does not wait for the
    device: a write that torch does not count, such as a collective's, raises a device-side assert.
    To change the pattern during training use `rewire_`. Do not average patterns: with
    `use_buffers=True`, `torch.optim.swa_utils.AveragedModel` rounds means of indices, which may be
    another valid pattern; by default it copies them.

    Under DistributedDataParallel that does not broadcast buffers, the first forward with gradients
    enabled compares the patterns of all ranks and raises a RuntimeError if they differ; a forward
    under `torch.no_grad` or in `join` does not, and compiled code never does. `reset_parameters` of
    a layer whose weight is sharded (FSDP2) gives all ranks the pattern of the first. Later changes
    are not compared: call `check_ranks` after rewiring or loading on several ranks, and where the
    model is compiled.

    On the meta device, and after `to_empty`, the layer has no pattern: `load_state_dict` brings
    one, `reset_parameters` draws one, forward raises RuntimeError until then. Under a
    FakeTensorMode forward and backward give shapes.

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
        bias: bool | None = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        layers.add(self)
        self.block = checks.check_geometry(out_features, in_features, block)
        self.in_features, self.out_features = int(in_features), int(out_features)
        if (fan_in is None) == (fan_out is None):
            raise ValueError(
                f"exactly one of fan_in and fan_out must be given, "
                f"got fan_in={fan_in} and fan_out={fan_out}"
            )
        checks.check_type("bias", bias, (bool, type(None)), "a bool or None")
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in checks.FLOAT_DTYPES:
            raise TypeError(f"dtype must be float32, bfloat16, float64 or float16, got {dtype}")
        backends.check_name(backend)
        self.backend = backend
        self.fan_in, self.fan_out = fan_in, fan_out
        block_rows, block_cols = self._stored_block
        name, fan = ("fan_in", fan_in) if fan_out is None else ("fan_out", fan_out)
        count = checks.check_fan_in(fan, self._stored_shape[1], block_cols, name)
        setattr(self, name, count * block_cols)
        shape = (self._stored_shape[0] // block_rows, count)
        checks.check_num_blocks(*shape)
        device = torch.get_default_device() if device is None else torch.device(device)
        self.weight = nn.Parameter(
            torch.empty((*shape, block_rows, block_cols), device=device, dtype=dtype)
        )
        own = torch.empty(self.out_features, device=device, dtype=dtype) if bias else None
        # Registered also where it is None, as in `torch.nn.Linear`.
        self.register_parameter("bias", None if own is None else nn.Parameter(own))
        self.register_buffer(
            "indices", torch.full(shape, _NO_PATTERN, device=device, dtype=torch.int32)
        )
        self._layout: FanInLayout | None = None
        # On a GPU: `indices` and its version at the last comparison with the layout.
        self._seen: tuple[Tensor, int] | None = None
        if device.type != "meta":
            self.reset_parameters(generator)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        layers.add(self)  # copies and unpickled layers skip `__init__`

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
            RuntimeError: the layer has none yet. ValueError: `indices` was written to and is not a
                valid pattern.
        """
        self._refresh()
        if self._layout is None or self.indices.is_meta:
            raise RuntimeError(
                "this SparseLinear has no pattern yet: it was made on the meta device or in a "
                "FakeTensorMode, or emptied; call load_state_dict, or reset_parameters to draw a "
                "random one"
            )
        return self._layout

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws new weights, and a pattern if the layer has none yet.

        Use this instead of `torch.nn.init.kaiming_uniform_` and the like, which compute the fan-in
        from the shape of a dense weight.

        Raises:
            RuntimeError: the layer is on the meta device, or its weight or bias is computed from
                others (parametrized, pruned).
        """
        if self.indices.is_meta:
            raise RuntimeError("a layer on the meta device holds no values: call to_empty first")
        if not {"weight", "bias"} <= self._parameters.keys():
            raise RuntimeError(
                "reset_parameters cannot write to a weight or bias that is computed, and one of "
                "them is parametrized or pruned: reset the layer before that"
            )
        self._refresh()
        if self._layout is None and not isinstance(self.indices, FakeTensor):
            layout = FanInLayout.random(
                *self._stored_shape,
                self.weight.shape[1] * self.weight.shape[3],
                self._stored_block,
                generator=generator,
                device=self.indices.device,
            )
            ranks.broadcast(layout.indices, self.weight)
            self._replace_pattern(layout)
        mean_fan_in = self.weight.numel() / self.out_features
        bound = mean_fan_in**-0.5
        with torch.no_grad():
            _uniform_(self.weight, bound, generator)
            if self.bias is not None:
                _uniform_(self.bias, bound, generator)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in_features)` to `(..., out_features)`; see `sparse_linear` for the errors."""
        indices = self._buffers.get("indices")
        if indices is None:
            raise RuntimeError("a SparseLinear needs its buffer `indices`, which was removed")
        transpose = self.fan_out is not None
        if not (torch.compiler.is_dynamo_compiling() or torch.is_grad_enabled()):
            # torch's lookup of a Parameter takes long beside a product of one token.
            own, layout = self._parameters, self._layout
            if "weight" in own and "bias" in own:  # neither parametrized nor pruned
                weight, bias = own["weight"], own["bias"]
                made = try_linear(x, weight, layout, bias, self.backend, transpose, indices)
                if made is not None:
                    return made
        if not (torch.compiler.is_compiling() or isinstance(indices, FakeTensor)):
            ranks.check_once(SparseLinear)
        if torch.compiler.is_compiling() or not ops.is_plain(indices):
            # A trace keeps the buffer, so that it uses a pattern that is loaded later, and equal
            # layers share a graph. A transform may map over patterns.
            pattern = Pattern(indices, self._stored_shape[1], self._stored_block)
            return linear(x, self.weight, pattern, self.bias, self.backend, transpose)
        layout = self._layout
        if layout is None or not indices.is_cpu or not layout.is_held_by(indices):
            layout = self.layout
        if not indices.is_cpu:
            torch._assert_async(torch.all(indices == layout.indices), _OVERWRITTEN)
        return linear(x, self.weight, layout, self.bias, self.backend, transpose)

    def __prepare_scriptable__(self) -> SparseLinear:
        """What torch.jit.script calls first."""
        raise RuntimeError("torch.jit.script cannot compile a SparseLinear: use torch.export")

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
        checks.check_type("linear", linear, nn.Linear, "a torch.nn.Linear")
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

    def _refresh(self) -> None:
        """Takes over a pattern that was written to `indices`; raises if it is not valid."""
        indices, layout = self._buffers["indices"], self._layout
        # What tracers put in its place has no content.
        if type(indices) is not Tensor or indices.is_meta:
            return
        if layout is None:
            if not bool((indices == _NO_PATTERN).all()):
                self._adopt(self._validated(indices, "indices"))
        elif (indices.is_cpu or not self._is_counted_unchanged(indices)) and not (
            layout.is_held_by(indices)
        ):
            self._adopt(self._validated(indices, "indices"))

    # torch.compile executes it while it traces code that reads `layout`. This is the attribute that
    # `torch.compiler.assume_constant_result` sets, which imports all of torch._dynamo.
    _refresh._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _is_counted_unchanged(self, indices: Tensor) -> bool:
        """Whether torch counted no write since the last comparison."""
        seen, self._seen = self._seen, (indices, _version(indices))
        return seen is not None and seen[0] is indices and seen[1] == self._seen[1]

    def _validated(self, indices: object, name: str) -> FanInLayout:
        """The layout that `indices` describes; raises with `name` if it does not fit this layer."""
        rows, columns = self._stored_shape
        fan = self.fan_out if self.transpose else self.fan_in
        shape = (rows // self._stored_block[0], fan // self._stored_block[1])  # type: ignore[operator]
        try:
            if isinstance(indices, Tensor) and indices.shape != shape:
                raise ValueError(f"indices must have shape {shape}, got {tuple(indices.shape)}")
            return FanInLayout(indices, columns, rows, self._stored_block)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name} of a SparseLinear: {error}") from error

    def _adopt(self, layout: FanInLayout) -> None:
        """Uses `layout` from now on; it has the same pattern as `indices`."""
        self._layout = layout
        self._seen = None

    def _replace_pattern(self, layout: FanInLayout) -> None:
        """Takes over `layout`, of the same matrix and block; the weights are left alone."""
        if layout.indices.shape == self.indices.shape:
            with torch.no_grad():
                self.indices.copy_(layout.indices)
        else:
            self.indices = layout.indices.clone()
            setattr(self, "fan_out" if self.transpose else "fan_in", layout.fan_in)
        self._adopt(layout)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        self._refresh()
        super()._apply(fn, recurse)
        indices, layout = self.indices, self._layout
        if indices.is_meta:
            self._layout = None
        elif type(indices) is Tensor:
            if layout is not None and indices.dtype != torch.int32:
                # Module.type() casts every tensor; a pattern does not follow.
                indices = self.indices = layout.indices.to(indices.device, copy=True)
            moved = None if layout is None else layout.to(indices.device)
            if moved is not None and moved.is_held_by(indices):
                self._adopt(moved)
            else:  # `to_empty`: new memory, and no pattern in it
                self._layout = None
                indices.fill_(_NO_PATTERN)
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        """Adds the orientation, which shapes do not tell, to the metadata that torch keeps."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]]["transpose"] = self.transpose

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
        """Loads this layer's tensors, or none of them if one is refused.

        Errors are appended to the lists; `load_state_dict` raises one error for all layers.
        """
        before, buffers = {**self._parameters, **self._buffers}, set(self._buffers)
        content = {name: None if t is None else t.detach().clone() for name, t in before.items()}
        assign = bool(local_metadata.get("assign_to_params_buffers"))
        missing: list[str] = []
        unexpected: list[str] = []
        errors: list[str] = []
        accepted = False
        try:
            # First calls the hooks, which may change the keys of `state_dict`.
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing, unexpected, errors
            )
            layout, refusals = self._examine(state_dict, prefix, before, assign)
            if local_metadata.get("transpose", self.transpose) != self.transpose:
                saved, own = ("in", "out") if self.transpose else ("out", "in")
                refusals.append(
                    f"{prefix}indices must be those of a layer with fan_{own}, got those of one "
                    f"with fan_{saved}"
                )
            errors = refusals or errors
            accepted = not errors and not (strict and (missing or unexpected))
        finally:
            for name in buffers & set(self._parameters):  # assigned from a Parameter
                self._buffers[name] = self._parameters.pop(name)
            if not accepted:
                self._restore(before, content)
        if accepted and layout is not None:
            if assign:
                self.indices = layout.indices.clone()
            self._adopt(layout.to(self.indices.device))
        missing_keys += missing
        unexpected_keys += unexpected
        error_msgs += errors

    def _examine(
        self, state_dict: dict[str, Any], prefix: str, before: dict[str, Any], assign: bool
    ) -> tuple[FanInLayout | None, list[str]]:
        """The pattern in `state_dict`, if any, and what is wrong with its tensors."""
        layout, refusals = None, []
        for name, current in before.items():
            loaded = state_dict.get(prefix + name)
            if current is None or prefix + name not in state_dict:
                continue
            try:
                if name != "indices":
                    _check_loaded(prefix + name, loaded, current, assign)
                elif checks.has_values(current) or checks.has_values(loaded):
                    layout = self._validated(loaded, prefix + name)
            except (TypeError, ValueError) as error:
                refusals.append(str(error))
        return layout if checks.has_values(before["indices"]) or assign else None, refusals

    def _restore(self, before: dict[str, Any], content: dict[str, Any]) -> None:
        """Puts the tensors `before` back, with the `content` that they had."""
        for name, tensor in before.items():
            owner = self._parameters if name in self._parameters else self._buffers
            owner[name] = tensor
            if tensor is not None and not tensor.is_meta:
                with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                    tensor.copy_(content[name])


def check_ranks(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Raises RuntimeError on every rank if the ranks' SparseLinear layers or patterns differ.

    A collective: every rank of `group` must call it. Call it after `rewire_` or `load_state_dict`
    in a distributed run: a rank with another pattern trains another model, and the averages of
    gradients mean nothing. Costs one checksum of each layer and two small all_gathers. Layers on
    the meta device have no pattern to compare.

    Args:
        model: any module, also wrapped in DistributedDataParallel or sharded by FSDP2.
        group: the ranks to compare, by default all.

    Raises:
        TypeError: `model` is not a Module.
        RuntimeError: the layers differ in number, name, shape, block or direction, or in their
            patterns; the message says in what, and names the layers whose patterns differ.
    """
    checks.check_type("model", model, nn.Module, "a torch.nn.Module")
    ranks.compare(model, SparseLinear, group)


def _version(tensor: Tensor) -> int:
    """Torch's count of writes to a tensor; -1 if torch does not count."""
    return -1 if tensor.is_inference() else tensor._version


def _uniform_(tensor: Tensor, bound: float, generator: torch.Generator | None) -> None:
    """Fills `tensor` uniformly in `+-bound`, drawing where the generator lives."""
    if generator is None or generator.device == tensor.device:
        tensor.uniform_(-bound, bound, generator=generator)
    else:
        drawn = torch.empty(tensor.shape, dtype=tensor.dtype, device=generator.device)
        tensor.copy_(drawn.uniform_(-bound, bound, generator=generator))


def _check_loaded(key: str, loaded: object, current: Tensor, assign: bool) -> None:
    """Raises TypeError or ValueError if `loaded` cannot take the place of a floating `current`."""
    if not current.is_floating_point():
        return
    loaded = checks.check_strided(key, loaded)
    if not loaded.is_floating_point() or (assign and loaded.dtype not in checks.FLOAT_DTYPES):
        needs = "float32, bfloat16, float64 or float16" if assign else "a floating-point dtype"
        raise TypeError(f"{key} must have {needs}, got {loaded.dtype}")
    if checks.has_values(current):
        checks.check_has_values(key, loaded)
    if loaded.shape != current.shape:
        raise ValueError(f"{key} must have shape {tuple(current.shape)}, got {tuple(loaded.shape)}")
