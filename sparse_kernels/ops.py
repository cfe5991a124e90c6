"""The operations as PyTorch sees them: one table of (schema, what runs it, fake results).

A pattern crosses a schema as its `indices`; what a backend derives from it stays outside, in the
layout that `layout_of` finds for them. None of these ops is differentiable: the autograd Functions
above them are.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef

from sparse_kernels import backends, checks
from sparse_kernels.layout import FanInLayout


class Pattern(NamedTuple):
    """What an op needs of a layout, for tracers: they see a tensor where a layout is an object."""

    indices: Tensor
    in_features: int
    block: tuple[int, int]

    @property
    def out_features(self) -> int:
        """`N`."""
        return self.indices.shape[0] * self.block[0]

    @property
    def values_shape(self) -> tuple[int, int, int, int]:
        """`(R, F, block_out, block_in)`."""
        return (self.indices.shape[0], self.indices.shape[1], *self.block)

    @property
    def device(self) -> torch.device:
        """Where `indices` lives."""
        return self.indices.device


class _Known(NamedTuple):
    storage: StorageWeakRef  # while it exists, no other storage has the same address
    version: int
    layout: FanInLayout


_known: dict[tuple[int, ...], _Known] = {}


def layout_of(indices: Tensor, in_features: int, block: Sequence[int]) -> FanInLayout:
    """The layout with these `indices`: validated when they are new, remembered until they change.

    On the CPU they are compared by content. A GPU would have to wait for that: there, writes that
    PyTorch does not count (collectives, `.data`) are not seen.
    """
    storage = indices.untyped_storage()
    place = (storage._cdata, indices.storage_offset(), *indices.shape, in_features, *block)
    version = -1 if indices.is_inference() else indices._version
    known = _known.get(place)
    if known is not None and (
        known.layout.is_held_by(indices) if indices.is_cpu else known.version == version
    ):
        return known.layout
    checks.refuse_capture(indices.device)
    layout = FanInLayout(indices, in_features, indices.shape[0] * block[0], (block[0], block[1]))
    for old in [old for old, known in _known.items() if known.storage.expired()]:
        del _known[old]
    _known[place] = _Known(StorageWeakRef(storage), version, layout)
    return layout


class Op(NamedTuple):
    """A row of the table: what the dispatcher needs to know of an op."""

    schema: str
    run: Callable[..., Any]
    fake: Callable[..., Any]


_PATTERN = "Tensor indices, int in_features, int[2] block, str backend"
_get, _fused = backends.get, backends.get_fused


def _like_first(first: Tensor, *_: object) -> Tensor:
    return first.new_empty(first.shape)


def _row_sums(x: Tensor, *sizes: int) -> Tensor:
    return x.new_empty(sizes, dtype=checks.wide_dtype(x.dtype))


TABLE = (
    Op(
        f"forward(Tensor x, Tensor values, Tensor? bias, {_PATTERN}) -> Tensor",
        lambda x, values, bias, indices, width, block, name: _get(name).forward(
            x, values, layout_of(indices, width, block), bias
        ),
        lambda x, values, bias, indices, width, block, name: x.new_empty(
            x.shape[0], indices.shape[0] * block[0]
        ),
    ),
    Op(
        f"grad_input(Tensor grad_output, Tensor values, Tensor? bias, {_PATTERN}) -> Tensor",
        lambda grad, values, bias, indices, width, block, name: _get(name).grad_input(
            grad, values, layout_of(indices, width, block), bias
        ),
        lambda grad, values, bias, indices, width, block, name: grad.new_empty(
            grad.shape[0], width
        ),
    ),
    Op(
        f"grad_weight(Tensor grad_output, Tensor x, {_PATTERN}) -> Tensor",
        lambda grad, x, indices, width, block, name: _get(name).grad_weight(
            grad, x, layout_of(indices, width, block)
        ),
        lambda grad, x, indices, width, block, name: x.new_empty(*indices.shape, *block),
    ),
    Op(
        "sum_tokens(Tensor grad_output, str backend) -> Tensor",
        lambda grad, name: _get(name).sum_tokens(grad),
        lambda grad, name: grad.new_empty(grad.shape[1]),
    ),
    Op(
        "abs_topk(Tensor x, int k, str backend) -> Tensor",
        lambda x, k, name: _get(name).abs_topk(x, k),
        _like_first,
    ),
    Op(
        "abs_topk_backward(Tensor grad_output, Tensor y, str backend) -> Tensor",
        lambda grad, y, name: _get(name).abs_topk_backward(grad, y),
        _like_first,
    ),
    Op(
        "gelu_abs_topk(Tensor x, int k, str backend) -> Tensor",
        lambda x, k, name: _fused(name).gelu_abs_topk(x, k),
        _like_first,
    ),
    Op(
        "gelu_abs_topk_backward(Tensor grad_output, Tensor y, Tensor x, str backend) -> Tensor",
        lambda grad, y, x, name: _fused(name).gelu_abs_topk_backward(grad, y, x),
        _like_first,
    ),
    Op(
        "norm_abs_topk(Tensor x, Tensor weight, int k, float eps, str backend) -> (Tensor, Tensor)",
        lambda x, weight, k, eps, name: _fused(name).norm_abs_topk(x, weight, k, eps),
        lambda x, *_: (_like_first(x), _row_sums(x, x.shape[0])),
    ),
    Op(
        "norm_abs_topk_backward(Tensor grad_output, Tensor y, Tensor x, Tensor weight,"
        " Tensor scales, str backend) -> (Tensor, Tensor)",
        lambda grad, y, x, weight, scales, name: _fused(name).norm_abs_topk_backward(
            grad, y, x, weight, scales
        ),
        lambda grad, y, x, weight, *_: (_like_first(x), _like_first(weight)),
    ),
    Op(
        "attention(Tensor q, Tensor k, Tensor v, Tensor? sinks, str backend) -> (Tensor, Tensor)",
        lambda q, k, v, sinks, name: _fused(name).attention(q, k, v, sinks),
        lambda q, *_: (_like_first(q), _row_sums(q, q.shape[0], q.shape[2], q.shape[1])),
    ),
    Op(
        "attention_backward(Tensor qkv, Tensor? sinks, Tensor y, Tensor lse, Tensor grad_y,"
        " str backend) -> (Tensor, Tensor)",
        lambda qkv, sinks, y, lse, grad_y, name: _fused(name).attention_backward(
            qkv, sinks, y, lse, grad_y
        ),
        lambda qkv, sinks, *_: (
            _like_first(qkv),
            qkv.new_empty(0 if sinks is None else sinks.shape),
        ),
    ),
)

_library = torch.library.Library("sparse_kernels", "DEF")


def _register(op: Op) -> OpOverload:
    """Defines one op; the backend is an argument, so every device enters through `op.run`."""
    _library.define(op.schema, tags=torch.Tag.pt2_compliant_tag)
    name = op.schema.partition("(")[0]
    for key in ("CPU", "CUDA"):
        _library.impl(name, op.run, key)
    torch.library.register_fake(f"sparse_kernels::{name}", op.fake, lib=_library)
    overload: OpOverload = getattr(torch.ops.sparse_kernels, name).default
    _library.impl(name, functools.partial(_run_batched_grads, overload), "Batched")
    return overload


def _run_batched_grads(op: OpOverload, *arguments: Any) -> Any:
    """One call per sample of what `torch.autograd.grad(is_grads_batched=True)` brings.

    Its batches are not those of `torch.vmap`, which autograd Functions are told of.
    """
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    is_batched = torch._C._functorch.is_legacy_batchedtensor
    batches = {
        place: torch._remove_batch_dim(argument, level, 0, 0)
        for place, argument in enumerate(arguments)
        if isinstance(argument, Tensor) and is_batched(argument)
    }
    results = []
    for sample in zip(*batches.values(), strict=True):
        replaced = dict(zip(batches, sample, strict=True))
        results.append(op(*(replaced.get(i, argument) for i, argument in enumerate(arguments))))
    if isinstance(results[0], Tensor):
        return torch._add_batch_dim(torch.stack(results), 0, level)
    return tuple(torch._add_batch_dim(torch.stack(r), 0, level) for r in zip(*results, strict=True))


(
    _forward,
    _grad_input,
    _grad_weight,
    sum_tokens,
    abs_topk,
    abs_topk_backward,
    gelu_abs_topk,
    gelu_abs_topk_backward,
    norm_abs_topk,
    norm_abs_topk_backward,
    attention,
    attention_backward,
) = map(_register, TABLE)


def _count_linear(
    x: Sequence[int], values: Sequence[int], *_: object, out_shape: object = None, **__: object
) -> int:
    rows, per_row, block_out, block_in = values
    return 2 * x[0] * rows * per_row * block_out * block_in


def _count_sampled(
    grad_output: Sequence[int], x: Sequence[int], *_: object, out_shape: Any = None, **__: object
) -> int:
    return _count_linear(x, out_shape)


def _register_flops(counter: Any) -> None:
    """Two operations for each token and kept weight, for `FlopCounterMode`."""
    for op in (_forward, _grad_input):
        counter.register_flop_formula(op._overloadpacket)(_count_linear)
    counter.register_flop_formula(_grad_weight._overloadpacket)(_count_sampled)


class _FlopCounterFinder(importlib.abc.MetaPathFinder):
    """Registers the formulas once the counter is imported: that takes a second, and few want it."""

    name = "torch.utils.flop_counter"

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register_flops(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if _FlopCounterFinder.name in sys.modules:
    _register_flops(sys.modules[_FlopCounterFinder.name])
else:
    sys.meta_path.insert(0, _FlopCounterFinder())


def _active_keys() -> int:
    keys: int = torch._C._dispatch_tls_local_include_set().raw_repr()
    return keys


def _idle_keys() -> frozenset[int]:
    """The dispatch keys of a thread in which no mode, transform or tracer is active."""
    with torch.inference_mode():
        inference = _active_keys()
    return frozenset((_active_keys(), inference))


_IDLE_KEYS = _idle_keys()
_PLAIN = frozenset((Tensor, torch.nn.Parameter))


def _is_direct(*tensors: Tensor | None) -> bool:
    """Whether a call may skip the dispatcher: nobody watches, and the tensors are ordinary.

    The dispatcher takes longer than the product of one token.
    """
    if (
        torch.compiler.is_compiling()
        or _active_keys() not in _IDLE_KEYS
        or torch._C._autograd._profiler_enabled()
    ):
        return False
    for tensor in tensors:
        if tensor is not None and (
            type(tensor) not in _PLAIN or tensor.is_neg() or tensor._is_zerotensor()
        ):
            return False
    return True


def forward(
    x: Tensor, values: Tensor, layout: FanInLayout | Pattern, bias: Tensor | None, backend: str
) -> Tensor:
    """`Y = X W^T (+ b)`: x `(M, K)` -> `(M, N)`; see `reference.forward`."""
    if _is_direct(x, values, bias) and isinstance(layout, FanInLayout):
        return _get(backend).forward(x, values, layout, bias)
    y: Tensor = _forward(x, values, bias, layout.indices, layout.in_features, layout.block, backend)
    return y


def grad_input(
    grad_output: Tensor,
    values: Tensor,
    layout: FanInLayout | Pattern,
    bias: Tensor | None,
    backend: str,
) -> Tensor:
    """`dX = dY W (+ b)`: grad_output `(M, N)` -> `(M, K)`; see `reference.grad_input`."""
    if _is_direct(grad_output, values, bias) and isinstance(layout, FanInLayout):
        return _get(backend).grad_input(grad_output, values, layout, bias)
    grad: Tensor = _grad_input(
        grad_output, values, bias, layout.indices, layout.in_features, layout.block, backend
    )
    return grad


def grad_weight(
    grad_output: Tensor, x: Tensor, layout: FanInLayout | Pattern, backend: str
) -> Tensor:
    """`dW = dY^T X` at the kept blocks: `(M, N)`, `(M, K)` -> values' shape."""
    if _is_direct(grad_output, x) and isinstance(layout, FanInLayout):
        return _get(backend).grad_weight(grad_output, x, layout)
    grad: Tensor = _grad_weight(
        grad_output, x, layout.indices, layout.in_features, layout.block, backend
    )
    return grad


def derive(layout: FanInLayout, backend: str, lists: Any) -> tuple[Tensor, ...]:
    """What the backend's products want of these lists, an `Orientation`, cached in `layout`."""
    return layout.derive(
        f"{backend}.{lists}", lambda this: _get(backend).build_schedule(this, lists)
    )


def is_transformed() -> bool:
    """Whether forward-mode differentiation or a transform of `torch.func` is under way.

    Its tensors need not require a gradient to be differentiated, and kernels see through none.
    """
    if torch.compiler.is_compiling():
        return False
    active: bool = torch._C._are_functorch_transforms_active()
    return active or forward_ad._current_level >= 0


def is_differentiated(*tensors: Tensor | None) -> bool:
    """Whether autograd has to know of an operation on `tensors`."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return True
    return is_transformed()


def add_up(terms: Sequence[Tensor]) -> Tensor:
    """The sum of the parts of a forward-mode derivative, at least one."""
    return functools.reduce(torch.add, terms)


def map_samples(
    function: Callable[..., Tensor], info: Any, in_dims: Sequence[int | None], *arguments: Any
) -> tuple[Tensor, int]:
    """`torch.vmap`'s rule for a Function without a better one: one call per sample, stacked.

    Args:
        info: torch's, with `batch_size`.
        in_dims: the batch dimension of each argument, or None.
    """
    calls = (
        function(
            *(
                argument if dim is None else argument.select(dim, sample)
                for argument, dim in zip(arguments, in_dims, strict=True)
            )
        )
        for sample in range(info.batch_size)
    )
    return torch.stack(list(calls)), 0
