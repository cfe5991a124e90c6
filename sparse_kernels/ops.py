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
from sparse_kernels.layout import FanInLayout, Pattern


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
        functools.partial(checks.check_matrices, transpose=False),
        lambda x, values, bias, indices, width, block, name: x.new_empty(
            x.shape[0], indices.shape[0] * block[0]
        ),
    ),
    Op(
        f"grad_input(Tensor grad_output, Tensor values, Tensor? bias, {_PATTERN}) -> Tensor",
        functools.partial(checks.check_matrices, transpose=True),
        lambda grad, values, bias, indices, width, *_: grad.new_empty(grad.shape[0], width),
    ),
    Op(
        f"grad_weight(Tensor grad_output, Tensor x, {_PATTERN}) -> Tensor",
        checks.check_grad_weight,
        lambda grad, x, indices, width, block, name: x.new_empty(*indices.shape, *block),
    ),
    Op(
        "bias_grad(Tensor grad_output, str backend) -> Tensor",
        lambda grad: checks.check_rows(grad_output=grad),
        lambda grad, name: grad.new_empty(grad.shape[1]),
    ),
    Op(
        "pack(Tensor y, Tensor x, int room, str backend) -> (Tensor, Tensor)",
        checks.check_pack,
        lambda y, x, room, name: _packed_like(x, room),
    ),
    Op(
        "unpack(Tensor values, Tensor bits, int width, bool of_gelu, str backend) -> Tensor",
        checks.check_unpack,
        lambda values, bits, width, *_: values.new_empty(values.shape[0], width),
    ),
    Op("abs_topk(Tensor x, int k, str backend) -> Tensor", checks.check_topk, _like_first),
    Op(
        "abs_topk_packed(Tensor x, int k, str backend) -> (Tensor, Tensor)",
        checks.check_topk,
        lambda x, k, name: (_like_first(x), _packed_like(x, 0)[0]),
    ),
    Op(
        "abs_topk_backward(Tensor grad_output, Tensor y, str backend) -> Tensor",
        checks.check_topk_backward,
        _like_first,
    ),
    Op("gelu_abs_topk(Tensor x, int k, str backend) -> Tensor", checks.check_topk, _like_first),
    Op(
        "gelu_abs_topk_packed(Tensor x, int k, str backend) -> (Tensor, Tensor, Tensor)",
        checks.check_topk,
        lambda x, k, name: (_like_first(x), *_packed_like(x, k)),
    ),
    Op(
        "gelu_abs_topk_backward(Tensor grad_output, Tensor y, Tensor x, str backend) -> Tensor",
        lambda grad, y, x: checks.check_rows(grad_output=grad, y=y, x=x),
        _like_first,
    ),
    Op(
        "gelu_abs_topk_packed_backward(Tensor grad_output, Tensor bits, Tensor values,"
        " str backend) -> Tensor",
        checks.check_gelu_packed_backward,
        _like_first,
    ),
    Op(
        "norm_abs_topk(Tensor x, Tensor weight, int k, float eps, str backend) -> (Tensor, Tensor)",
        checks.check_norm,
        lambda x, *_: (_like_first(x), _row_sums(x, x.shape[0])),
    ),
    Op(
        "norm_abs_topk_packed(Tensor x, Tensor weight, int k, float eps, str backend)"
        " -> (Tensor, Tensor, Tensor, Tensor)",
        checks.check_norm,
        lambda x, weight, k, *_: (
            _like_first(x),
            _row_sums(x, x.shape[0]),
            *_packed_like(x, k),
        ),
    ),
    Op(
        "norm_abs_topk_backward(Tensor grad_output, Tensor y, Tensor x, Tensor weight,"
        " Tensor scales, str backend) -> (Tensor, Tensor)",
        checks.check_norm_backward,
        lambda grad, y, x, weight, *_: (_like_first(x), _like_first(weight)),
    ),
    Op(
        "norm_abs_topk_packed_backward(Tensor grad_output, Tensor bits, Tensor x, Tensor weight,"
        " Tensor scales, str backend) -> (Tensor, Tensor)",
        checks.check_norm_packed_backward,
        lambda grad, bits, x, weight, *_: (_like_first(x), _like_first(weight)),
    ),
    Op(
        "attention(Tensor q, Tensor k, Tensor v, Tensor? sinks, str backend) -> (Tensor, Tensor)",
        checks.check_attention,
        lambda q, *_: (_like_first(q), _row_sums(q, q.shape[0], q.shape[2], q.shape[1])),
    ),
    Op(
        "attention_backward(Tensor qkv, Tensor? sinks, Tensor y, Tensor lse, Tensor grad_y,"
        " str backend) -> (Tensor, Tensor)",
        checks.check_attention_backward,
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


_active_keys = torch._C._dispatch_tls_local_include_set
# The dispatch keys of a thread in which no mode, transform or tracer is active.
with torch.inference_mode():
    _IDLE_KEYS = {_active_keys().raw_repr()}
_IDLE_KEYS.add(_active_keys().raw_repr())
_is_profiled = torch._C._autograd._profiler_enabled
_PLAIN = frozenset((Tensor, torch.nn.Parameter))


def is_idle() -> bool:
    """Whether nothing watches what a call does: no mode, transform, tracer or profiler."""
    return not (
        torch.compiler.is_dynamo_compiling()
        or _active_keys().raw_repr() not in _IDLE_KEYS
        or _is_profiled()
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


# Saved tensors can change before a backward, hence the checks; a compiled graph has the ops' own.


def spmm(
    x: Tensor, values: Tensor, layout: Any, bias: Tensor | None, backend: str, transpose: bool
) -> Tensor:
    """`forward`, or `grad_input` if `transpose`; x is a matrix."""
    if backend == "cpu" and isinstance(layout, FanInLayout) and x.dim() == 2 and is_idle():
        made = cpu.try_spmm(x, values, layout, bias, transpose)
        if made is not None:
            return made
    if not torch.compiler.is_dynamo_compiling():
        checks.check_matrices(x, values, layout, bias, transpose)
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
        checks.check_grad_weight(grad_output, x, layout)
    if isinstance(layout, FanInLayout) and is_plain(grad_output, x):
        return backends.BACKENDS[backend].grad_weight(grad_output, x, layout)
    pattern = layout.indices, layout.in_features, layout.block
    grad: Tensor = _grad_weight(grad_output, x, *pattern, backend)
    return grad


def is_transformed() -> bool:
    """Whether forward-mode differentiation or a transform of `torch.func` is active.

    Tensors are then differentiated although they do not require a gradient. Raises RuntimeError
    inside torch.compile, whose graph would drop the derivative; unless `fullgraph`, it then runs
    the code uncompiled.
    """
    active = _is_transform_active()
    if active and torch.compiler.is_dynamo_compiling():
        raise RuntimeError(
            "torch.compile cannot trace derivatives by torch.func of the operations of "
            "sparse_kernels: transform compiled code, as in torch.func.grad(torch.compile(f))"
        )
    return active


def _is_transform_active() -> bool:
    active: bool = torch._C._are_functorch_transforms_active()
    return active or forward_ad._current_level >= 0


def _is_exporting() -> bool:
    """Whether torch.export traces; in `torch.compiler.is_exporting` 2.11 calls all tracing so."""
    return torch.compiler._is_exporting_flag


# torch.compile executes them while it traces; see `SparseLinear._refresh`.
for _read in (_is_transform_active, _is_exporting):
    _read._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_differentiated(*tensors: Tensor | None) -> bool:
    """Whether autograd must record an operation on `tensors`.

    An exported program only computes. Exported strictly, a Function would become a region without
    gradients, which an error inside leaves switched off.
    """
    if is_transformed():
        return True
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return learns and not _is_exporting()


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
                _of_sample(argument, dim, sample)
                for argument, dim in zip(arguments, in_dims, strict=True)
            )
        )
        for sample in range(info.batch_size)
    )
    return torch.stack(list(calls)), 0


def _of_sample(argument: Any, dim: Any, sample: int) -> Any:
    """What one sample has of an argument with a batch dimension, or None, for each of its parts."""
    if isinstance(argument, Pattern):
        return argument._replace(indices=_of_sample(argument.indices, dim.indices, sample))
    return argument if dim is None else argument.select(dim, sample)


def apply(function: Any, *arguments: Any) -> Any:
    """`function.apply`, under forward mode and transforms with the rules that it has for them.

    The rules are its `jvp_rule`, and its `vmap_rule` unless `map_samples` is as good.
    """
    if is_transformed():
        return _with_rules(function).apply(*arguments)
    if torch.compiler.is_dynamo_compiling():
        return function.apply(*arguments)
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

    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        # Torch switches forward mode off here, and with it that of an enclosing jvp.
        with forward_ad._set_fwd_grad_enabled(True):
            saved = [forward_ad.unpack_dual(tensor).primal for tensor in ctx.saved_tensors]
            tangent: Tensor = function.jvp_rule(ctx, saved, *tangents)
        return tangent

    rules = {"jvp": jvp, "vmap": getattr(function, "vmap_rule", vmap)}
    named = {name: staticmethod(rule) for name, rule in rules.items()}
    made: type[Function] = type(function)(function.__name__, (function,), named)
    return made
