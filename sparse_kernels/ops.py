"""The operations as PyTorch sees them: one table of (schema, checks, fake results).

A schema has a pattern's `indices`; `layout_of` finds the layout that caches what backends derive
from them. The ops are not differentiable: the autograd Functions that call them are.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd import Function, forward_ad
from torch.multiprocessing.reductions import StorageWeakRef

from sparse_kernels import backends, checks, cpu
from sparse_kernels.layout import FanInLayout, Layout


class _Known(NamedTuple):
    storage: StorageWeakRef  # while it exists, no other storage has the same address
    version: int
    layout: FanInLayout


_known: dict[tuple[object, ...], _Known] = {}


def layout_of(indices: Tensor, in_features: int, block: Sequence[int]) -> FanInLayout:
    """The layout with these `indices`: validated when they are new, cached until they change.

    On a CPU their content is compared. On a GPU that would mean waiting for the device: there,
    writes that PyTorch does not count (collectives, `.data`) are not seen.
    """
    storage = checks.check_strided("indices", indices).untyped_storage()
    place = (storage._cdata, indices.storage_offset(), indices.shape, in_features, *block)
    version = -1 if indices.is_inference() else indices._version
    known = _known.get(place)
    if known is not None and (
        known.layout.is_held_by(indices) if indices.is_cpu else known.version == version
    ):
        return known.layout
    checks.refuse_capture(indices.device)
    layout = FanInLayout(indices, in_features, block=checks.check_block(block))
    checks.finish(indices.device)
    for old in [old for old, known in _known.items() if known.storage.expired()]:
        del _known[old]
    _known[place] = _Known(StorageWeakRef(storage), version, layout)
    return layout


class Op(NamedTuple):
    """A row of the table: what the dispatcher needs to know of an op."""

    # The name of the op is that of the backends' function; its last argument names the backend.
    schema: str
    # Takes the arguments of the backends' function, and raises if kernels cannot run with them.
    check: Callable[..., None]
    # Takes the arguments of the schema, and returns tensors of the shapes of the results.
    fake: Callable[..., Any]


def _check_features(name: str, x: Tensor, layout: Layout, side: str) -> None:
    """x is `(..., side of the layout)`, on its device."""
    checks.check_float(name, x)
    device = layout.indices.device
    if x.device != device:
        raise ValueError(f"{name} must be on the layout's device {device}, got {x.device}")
    width = getattr(layout, side)
    if x.dim() == 0 or x.shape[-1] != width:
        raise ValueError(
            f"{name} must have the layout's {side} = {width} as its last dimension, "
            f"got shape {tuple(x.shape)}"
        )


def check_spmm(
    x: Tensor,
    values: Tensor,
    layout: Layout,
    bias: Tensor | None,
    transpose: bool,
    name: str = "x",
) -> None:
    """The operands of `Y = X W^T (+ b)`, or of `Y = X W (+ b)` if `transpose`; x is `(..., K)`."""
    _check_features(name, x, layout, "out_features" if transpose else "in_features")
    checks.check_tensor("values", values, layout.values_shape, x.dtype, x.device)
    if bias is not None:
        width = layout.in_features if transpose else layout.out_features
        checks.check_tensor("bias", bias, (width,), x.dtype, x.device)


def check_sddmm(grad_output: Tensor, x: Tensor, layout: Layout) -> None:
    """The operands of `dW = dY^T X`, with any leading dimensions."""
    _check_features("grad_output", grad_output, layout, "out_features")
    _check_features("x", x, layout, "in_features")
    shape = (*grad_output.shape[:-1], layout.in_features)
    checks.check_tensor("x", x, shape, grad_output.dtype, grad_output.device)


def _check_rows(**tensors: Tensor) -> None:
    """Matrices of the shape, dtype and device of the first."""
    (first, like), *others = tensors.items()
    checks.check_strided(first, like)
    if like.dim() != 2:
        raise ValueError(f"{first} must have two dimensions, got shape {tuple(like.shape)}")
    for name, tensor in others:
        checks.check_tensor(name, tensor, like.shape, like.dtype, like.device)


def _check_matrices(
    x: Tensor, values: Tensor, layout: Layout, bias: Tensor | None, transpose: bool
) -> None:
    name = "grad_output" if transpose else "x"
    _check_rows(**{name: x})
    check_spmm(x, values, layout, bias, transpose, name)


def _check_grad_weight(grad_output: Tensor, x: Tensor, layout: Layout) -> None:
    _check_rows(grad_output=grad_output)
    check_sddmm(grad_output, x, layout)


def _check_topk(x: Tensor, k: int) -> None:
    _check_rows(x=x)
    checks.check_kept(k, x.shape[1])


def _check_norm(x: Tensor, weight: Tensor, k: int, eps: float) -> None:
    _check_topk(x, k)
    checks.check_tensor("weight", weight, x.shape[1:], x.dtype, x.device)


def _check_bits(bits: Tensor, rows: Tensor, width: int) -> None:
    shape = (rows.shape[0], -(-width // 64))
    checks.check_tensor("bits", bits, shape, torch.int64, rows.device)


def _check_topk_backward(grad_output: Tensor, y: Tensor) -> None:
    _check_rows(grad_output=grad_output)
    if checks.check_strided("y", y).dtype == torch.int64:
        _check_bits(y, grad_output, grad_output.shape[1])
    else:
        _check_rows(grad_output=grad_output, y=y)


def _check_unpack(values: Tensor, bits: Tensor, width: int, of_gelu: bool) -> None:
    _check_rows(values=values)
    checks.check_size("width", width)
    _check_bits(bits, values, width)


def _check_pack(y: Tensor, x: Tensor, room: int) -> None:
    _check_rows(y=y, x=x)
    checks.check_size("room", room)


def _check_gelu_packed_backward(grad: Tensor, bits: Tensor, values: Tensor) -> None:
    _check_rows(grad_output=grad)
    _check_rows(values=values)
    shape = grad.shape[0], values.shape[1]
    checks.check_tensor("values", values, shape, grad.dtype, grad.device)
    _check_bits(bits, grad, grad.shape[1])


def _check_norm_backward(
    grad: Tensor, y: Tensor, x: Tensor, weight: Tensor, scales: Tensor
) -> None:
    _check_rows(grad_output=grad, y=y, x=x)
    checks.check_tensor("weight", weight, x.shape[1:], x.dtype, x.device)
    checks.check_tensor("scales", scales, x.shape[:1], checks.wide_dtype(x.dtype), x.device)


def _check_norm_packed_backward(
    grad: Tensor, bits: Tensor, x: Tensor, weight: Tensor, scales: Tensor
) -> None:
    _check_norm_backward(grad, grad, x, weight, scales)
    _check_bits(bits, grad, grad.shape[1])


def check_attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> None:
    """q `(B, T, H, d)`, k and v `(B, S, H, d)` with S at least T and d at least 1, sinks `(H,)`."""
    checks.check_strided("q", q)
    checks.check_is_tensor("k", k)
    if q.dim() != 4 or k.dim() != 4 or q.shape[1] > k.shape[1] or q.shape[3] == 0:
        raise ValueError(
            f"q must be (B, T, H, d) and k (B, S, H, d) with S at least T and d at least 1, got "
            f"{tuple(q.shape)} and {tuple(k.shape)}"
        )
    shape = (q.shape[0], k.shape[1], *q.shape[2:])
    checks.check_tensor("k", k, shape, q.dtype, q.device)
    checks.check_tensor("v", v, shape, q.dtype, q.device)
    if sinks is not None:
        checks.check_tensor("sinks", sinks, q.shape[2:3], q.dtype, q.device)


def split_heads(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v `(B, T, H, d)`; raises ValueError unless qkv is `(B, T, 3, H, d)`."""
    checks.check_strided("qkv", qkv)
    if qkv.dim() != 5 or qkv.shape[2] != 3 or qkv.shape[4] == 0:
        raise ValueError(f"qkv must be (B, T, 3, H, d), d at least 1, got {tuple(qkv.shape)}")
    q, k, v = qkv.unbind(2)
    return q, k, v


def _check_attention_backward(
    qkv: Tensor, sinks: Tensor | None, y: Tensor, lse: Tensor, grad_y: Tensor
) -> None:
    q, k, v = split_heads(qkv)
    check_attention(q, k, v, sinks)
    for name, tensor in (("y", y), ("grad_y", grad_y)):
        checks.check_tensor(name, tensor, q.shape, q.dtype, q.device)
    B, T, H, _ = q.shape
    checks.check_tensor("lse", lse, (B, H, T), checks.wide_dtype(q.dtype), q.device)


def _like_first(first: Tensor, *_: object) -> Tensor:
    return first.new_empty(first.shape)


def _packed_like(x: Tensor, room: int) -> tuple[Tensor, Tensor]:
    rows, width = x.shape
    return x.new_empty((rows, (width + 63) // 64), dtype=torch.int64), x.new_empty(rows, room)


def _row_sums(x: Tensor, *sizes: int) -> Tensor:
    return x.new_empty(sizes, dtype=checks.wide_dtype(x.dtype))


_PATTERN = "Tensor indices, int in_features, int[2] block, str backend"
TABLE = (
    Op(
        f"forward(Tensor x, Tensor values, Tensor? bias, {_PATTERN}) -> Tensor",
        functools.partial(_check_matrices, transpose=False),
        lambda x, values, bias, indices, width, block, name: x.new_empty(
            x.shape[0], indices.shape[0] * block[0]
        ),
    ),
    Op(
        f"grad_input(Tensor grad_output, Tensor values, Tensor? bias, {_PATTERN}) -> Tensor",
        functools.partial(_check_matrices, transpose=True),
        lambda grad, values, bias, indices, width, *_: grad.new_empty(grad.shape[0], width),
    ),
    Op(
        f"grad_weight(Tensor grad_output, Tensor x, {_PATTERN}) -> Tensor",
        _check_grad_weight,
        lambda grad, x, indices, width, block, name: x.new_empty(*indices.shape, *block),
    ),
    Op(
        "bias_grad(Tensor grad_output, str backend) -> Tensor",
        lambda grad: _check_rows(grad_output=grad),
        lambda grad, name: grad.new_empty(grad.shape[1]),
    ),
    Op(
        "pack(Tensor y, Tensor x, int room, str backend) -> (Tensor, Tensor)",
        _check_pack,
        lambda y, x, room, name: _packed_like(x, room),
    ),
    Op(
        "unpack(Tensor values, Tensor bits, int width, bool of_gelu, str backend) -> Tensor",
        _check_unpack,
        lambda values, bits, width, *_: values.new_empty(values.shape[0], width),
    ),
    Op("abs_topk(Tensor x, int k, str backend) -> Tensor", _check_topk, _like_first),
    Op(
        "abs_topk_packed(Tensor x, int k, str backend) -> (Tensor, Tensor)",
        _check_topk,
        lambda x, k, name: (_like_first(x), _packed_like(x, 0)[0]),
    ),
    Op(
        "abs_topk_backward(Tensor grad_output, Tensor y, str backend) -> Tensor",
        _check_topk_backward,
        _like_first,
    ),
    Op("gelu_abs_topk(Tensor x, int k, str backend) -> Tensor", _check_topk, _like_first),
    Op(
        "gelu_abs_topk_packed(Tensor x, int k, str backend) -> (Tensor, Tensor, Tensor)",
        _check_topk,
        lambda x, k, name: (_like_first(x), *_packed_like(x, k)),
    ),
    Op(
        "gelu_abs_topk_backward(Tensor grad_output, Tensor y, Tensor x, str backend) -> Tensor",
        lambda grad, y, x: _check_rows(grad_output=grad, y=y, x=x),
        _like_first,
    ),
    Op(
        "gelu_abs_topk_packed_backward(Tensor grad_output, Tensor bits, Tensor values,"
        " str backend) -> Tensor",
        _check_gelu_packed_backward,
        _like_first,
    ),
    Op(
        "norm_abs_topk(Tensor x, Tensor weight, int k, float eps, str backend) -> (Tensor, Tensor)",
        _check_norm,
        lambda x, *_: (_like_first(x), _row_sums(x, x.shape[0])),
    ),
    Op(
        "norm_abs_topk_packed(Tensor x, Tensor weight, int k, float eps, str backend)"
        " -> (Tensor, Tensor, Tensor, Tensor)",
        _check_norm,
        lambda x, weight, k, *_: (
            _like_first(x),
            _row_sums(x, x.shape[0]),
            *_packed_like(x, k),
        ),
    ),
    Op(
        "norm_abs_topk_backward(Tensor grad_output, Tensor y, Tensor x, Tensor weight,"
        " Tensor scales, str backend) -> (Tensor, Tensor)",
        _check_norm_backward,
        lambda grad, y, x, weight, *_: (_like_first(x), _like_first(weight)),
    ),
    Op(
        "norm_abs_topk_packed_backward(Tensor grad_output, Tensor bits, Tensor x, Tensor weight,"
        " Tensor scales, str backend) -> (Tensor, Tensor)",
        _check_norm_packed_backward,
        lambda grad, bits, x, weight, *_: (_like_first(x), _like_first(weight)),
    ),
    Op(
        "attention(Tensor q, Tensor k, Tensor v, Tensor? sinks, str backend) -> (Tensor, Tensor)",
        check_attention,
        lambda q, *_: (_like_first(q), _row_sums(q, q.shape[0], q.shape[2], q.shape[1])),
    ),
    Op(
        "attention_backward(Tensor qkv, Tensor? sinks, Tensor y, Tensor lse, Tensor grad_y,"
        " str backend) -> (Tensor, Tensor)",
        _check_attention_backward,
        lambda qkv, sinks, *_: (
            _like_first(qkv),
            qkv.new_empty(0 if sinks is None else sinks.shape),
        ),
    ),
)

_library = torch.library.Library("sparse_kernels", "DEF")
# Those of tensors that are not strided only lead to the checks, which refuse them by name.
_KEYS = ("CPU", "CUDA", "MkldnnCPU", "SparseCPU", "SparseCUDA", "SparseCsrCPU", "SparseCsrCUDA")


def _refuse_derivative(name: str, *_: Any) -> None:
    """The derivatives are those of the autograd Functions; an op by itself would drop them."""
    raise RuntimeError(
        f"torch.ops.sparse_kernels.{name} has no derivative by itself, as in an exported program: "
        f"differentiate the layer that was exported"
    )


def _register(op: Op) -> Callable[..., Any]:
    """Defines one op, and returns a function that calls it: at once, or through the dispatcher.

    All devices share an implementation: the backend is an argument.
    """
    name = op.schema.partition("(")[0]

    def run(*arguments: Any) -> Any:
        *arguments, backend = arguments  # type: ignore[assignment]
        layout = None
        if _PATTERN in op.schema:
            *tensors, indices, in_features, block = arguments
            layout = layout_of(indices, in_features, block)
            arguments = (*tensors[:2], layout, *tensors[2:])
        backends.choose_for(arguments[0], name, backend, layout)
        op.check(*arguments)
        return getattr(backends.BACKENDS[backend], name)(*arguments)

    _library.define(op.schema, tags=torch.Tag.pt2_compliant_tag)
    for key in _KEYS:
        _library.impl(name, run, key)
    torch.library.register_fake(f"sparse_kernels::{name}", op.fake, lib=_library)
    refuse = functools.partial(_refuse_derivative, name)
    torch.library.register_autograd(f"sparse_kernels::{name}", refuse, lib=_library)
    overload: OpOverload = getattr(torch.ops.sparse_kernels, name).default

    def call(*arguments: Any) -> Any:
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        at_once = is_plain(*tensors) and not is_differentiated(*tensors)
        return (run if at_once else overload)(*arguments)

    return call


(
    _forward,
    _grad_input,
    _grad_weight,
    bias_grad,
    pack,
    unpack,
    abs_topk,
    abs_topk_packed,
    abs_topk_backward,
    gelu_abs_topk,
    gelu_abs_topk_packed,
    gelu_abs_topk_backward,
    gelu_abs_topk_packed_backward,
    norm_abs_topk,
    norm_abs_topk_packed,
    norm_abs_topk_backward,
    norm_abs_topk_packed_backward,
    attention,
    attention_backward,
) = map(_register, TABLE)


def _register_flops(counter: Any) -> None:
    """Two operations for each token and kept weight, for `FlopCounterMode`."""

    def count(x: Sequence[int], values: Sequence[int], *_: object, **__: object) -> int:
        return 2 * x[0] * math.prod(values)

    def count_grad_weight(x: Sequence[int], *_: object, out_shape: Any, **__: object) -> int:
        return count(x, out_shape)

    library = torch.ops.sparse_kernels
    counter.register_flop_formula([library.forward, library.grad_input])(count)
    counter.register_flop_formula(library.grad_weight)(count_grad_weight)


class _FlopCounterFinder(importlib.abc.MetaPathFinder):
    """Registers the formulas when the counter is imported, which takes a second."""

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


def is_idle() -> bool:
    """Whether nothing watches what a call does: no mode, transform, tracer or profiler."""
    return not (
        torch.compiler.is_dynamo_compiling()
        or _active_keys() not in _IDLE_KEYS
        or torch._C._autograd._profiler_enabled()
    )


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether a call may skip the dispatcher: nothing watches, and strided tensors are ordinary."""
    return is_idle() and all(
        tensor is None
        or (
            type(tensor) in _PLAIN
            and not tensor.is_neg()
            and not tensor._is_zerotensor()
            and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # a transform's, leaked
        )
        for tensor in tensors
    )


def try_spmm(
    x: Tensor, values: Tensor, layout: Any, bias: Tensor | None, transpose: bool
) -> Tensor | None:
    """`cpu.try_spmm` unless something watches: the product, if nothing about the call is special.

    The checks in Python and the dispatcher take longer than the product of one token.
    """
    if isinstance(layout, FanInLayout) and is_idle():
        return cpu.try_spmm(x, values, layout, bias, transpose)
    return None


# Saved tensors can change before a backward, hence the checks; a compiled graph has the ops' own.


def spmm(
    x: Tensor, values: Tensor, layout: Any, bias: Tensor | None, backend: str, transpose: bool
) -> Tensor:
    """`forward`, or `grad_input` if `transpose`; x is a matrix."""
    if backend == "cpu" and x.dim() == 2:
        made = try_spmm(x, values, layout, bias, transpose)
        if made is not None:
            return made
    if not torch.compiler.is_dynamo_compiling():
        _check_matrices(x, values, layout, bias, transpose)
    if isinstance(layout, FanInLayout) and is_plain(x, values, bias):
        run = backends.BACKENDS[backend]
        return (run.grad_input if transpose else run.forward)(x, values, layout, bias)
    pattern = layout.indices, layout.in_features, layout.block
    y: Tensor = (_grad_input if transpose else _forward)(x, values, bias, *pattern, backend)
    return y


# (x, values, layout, bias, backend), where layout is a `Layout`, as `reference` specifies.
forward = functools.partial(spmm, transpose=False)
grad_input = functools.partial(spmm, transpose=True)


def grad_weight(grad_output: Tensor, x: Tensor, layout: Any, backend: str) -> Tensor:
    """`dW = dY^T X` at the kept blocks: `(M, N)`, `(M, K)` -> values' shape."""
    if backend == "cpu" and isinstance(layout, FanInLayout) and is_idle():
        made = cpu.try_grad_weight(grad_output, x, layout)
        if made is not None:
            return made
    if not torch.compiler.is_dynamo_compiling():
        _check_grad_weight(grad_output, x, layout)
    if isinstance(layout, FanInLayout) and is_plain(grad_output, x):
        return backends.BACKENDS[backend].grad_weight(grad_output, x, layout)
    pattern = layout.indices, layout.in_features, layout.block
    grad: Tensor = _grad_weight(grad_output, x, *pattern, backend)
    return grad


def is_transformed() -> bool:
    """Whether forward-mode differentiation or a transform of `torch.func` is active.

    Tensors are then differentiated although they do not require a gradient.
    """
    if torch.compiler.is_dynamo_compiling():
        return False
    active: bool = torch._C._are_functorch_transforms_active()
    return active or forward_ad._current_level >= 0


def is_differentiated(*tensors: Tensor | None) -> bool:
    """Whether autograd must record an operation on `tensors`.

    An exported program only computes. Exported strictly, a Function would become a region without
    gradients, which an error inside leaves switched off.
    """
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return not torch.compiler.is_exporting()
    return is_transformed()


def map_samples(
    function: Callable[..., Tensor], info: Any, in_dims: Sequence[int | None], *arguments: Any
) -> tuple[Tensor, int]:
    """`torch.vmap`'s rule for a Function without a better one: one call per sample, stacked.

    Args:
        function: what is called.
        info: torch's, with `batch_size`.
        in_dims: the batch dimension of each argument, or None.
        arguments: those of `function`, with a batch dimension each where `in_dims` says so.
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


def apply(function: Any, *arguments: Any) -> Any:
    """`function.apply`, under forward mode and transforms with the rules that it has for them.

    The rules are its `jvp_rule`, and its `vmap_rule` unless `map_samples` is as good.
    """
    if torch.compiler.is_dynamo_compiling():
        return function.apply(*arguments)
    if is_transformed():
        return _with_rules(function).apply(*arguments)
    if torch.is_grad_enabled():
        return _with_context(function).apply(*arguments)
    return function.forward(*arguments)  # nothing is recorded, as in the backward of most steps


@functools.cache
def _with_context(function: Any) -> Any:
    """A subclass whose forward gets the context.

    Where that is left to `setup_context`, torch inspects the signature of `forward` at each call,
    which takes longer than a small product.
    """

    def forward(ctx: Any, *arguments: Any) -> Any:
        result = function.forward(*arguments)
        function.setup_context(ctx, arguments, result)
        return result

    named = {"forward": staticmethod(forward), "setup_context": Function.setup_context}
    return type(function)(function.__name__, (function,), named)


@functools.cache
def _with_rules(function: Any) -> type[Function]:
    """A subclass that has the rules by the names that torch knows.

    torch.compile does not trace a Function that has a jvp, hence two classes.
    """

    def vmap(info: Any, in_dims: Sequence[int | None], *arguments: Any) -> tuple[Tensor, int]:
        return map_samples(made.apply, info, in_dims, *arguments)

    rules = {"jvp": function.jvp_rule, "vmap": getattr(function, "vmap_rule", vmap)}
    named = {name: staticmethod(rule) for name, rule in rules.items()}
    made: type[Function] = type(function)(function.__name__, (function,), named)
    return made
