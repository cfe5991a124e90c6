"""The operations as PyTorch sees them: schemas, fakes for tracing, and the call into a backend.

A layout crosses a schema as plain tensors: `indices`, then `transposed` (offsets, rows, slots, or
nothing where the product walks the layout's own lists), then the backend's `schedule` of the lists
that it walks. None of these ops is differentiable: the autograd Functions above them are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd import forward_ad

from sparse_kernels import backends, cpu, reference
from sparse_kernels.layout import FanInLayout, Transposed

PRODUCTS = backends.PRODUCTS

_LAYOUT = "Tensor indices, Tensor[] transposed, Tensor[] schedule, int in_features, int[2] block"
_library = torch.library.Library("sparse_kernels", "DEF")


def _rebuild(
    indices: Tensor,
    transposed: list[Tensor],
    schedule: list[Tensor],
    in_features: int,
    block: list[int],
    backend: str,
) -> FanInLayout:
    key = f"{backend}.{'transposed' if transposed else 'own'}"
    return FanInLayout._wrap(
        indices,
        in_features,
        (block[0], block[1]),
        Transposed(*transposed) if transposed else None,
        {key: tuple(schedule)} if schedule else {},
    )


def _forward(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    indices: Tensor,
    transposed: list[Tensor],
    schedule: list[Tensor],
    in_features: int,
    block: list[int],
    backend: str,
) -> Tensor:
    layout = _rebuild(indices, transposed, schedule, in_features, block, backend)
    y: Tensor = backends.module(backend).forward(x, values, layout, bias)
    return y


def _forward_fake(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    indices: Tensor,
    transposed: list[Tensor],
    schedule: list[Tensor],
    in_features: int,
    block: list[int],
    backend: str,
) -> Tensor:
    return x.new_empty(x.shape[0], indices.shape[0] * block[0])


def _grad_input(
    grad_output: Tensor,
    values: Tensor,
    bias: Tensor | None,
    indices: Tensor,
    transposed: list[Tensor],
    schedule: list[Tensor],
    in_features: int,
    block: list[int],
    backend: str,
) -> Tensor:
    layout = _rebuild(indices, transposed, schedule, in_features, block, backend)
    grad: Tensor = backends.module(backend).grad_input(grad_output, values, layout, bias)
    return grad


def _grad_input_fake(
    grad_output: Tensor,
    values: Tensor,
    bias: Tensor | None,
    indices: Tensor,
    transposed: list[Tensor],
    schedule: list[Tensor],
    in_features: int,
    block: list[int],
    backend: str,
) -> Tensor:
    return grad_output.new_empty(grad_output.shape[0], in_features)


def _grad_weight(
    grad_output: Tensor,
    x: Tensor,
    indices: Tensor,
    transposed: list[Tensor],
    schedule: list[Tensor],
    in_features: int,
    block: list[int],
    backend: str,
) -> Tensor:
    layout = _rebuild(indices, transposed, schedule, in_features, block, backend)
    grad: Tensor = backends.module(backend).grad_weight(grad_output, x, layout)
    return grad


def _grad_weight_fake(
    grad_output: Tensor,
    x: Tensor,
    indices: Tensor,
    transposed: list[Tensor],
    schedule: list[Tensor],
    in_features: int,
    block: list[int],
    backend: str,
) -> Tensor:
    return x.new_empty(*indices.shape, *block)


def _schedule(
    indices: Tensor, transposed: list[Tensor], in_features: int, block: list[int], backend: str
) -> list[Tensor]:
    layout = _rebuild(indices, transposed, [], in_features, block, backend)
    lists = "transposed" if transposed else "own"
    return list(backends.module(backend).build_schedule(layout, lists))


def _schedule_fake(
    indices: Tensor, transposed: list[Tensor], in_features: int, block: list[int], backend: str
) -> list[Tensor]:
    lists = "transposed" if transposed else "own"
    shapes = backends.module(backend).schedule_shapes(
        indices.shape[0] * block[0], in_features, indices.shape[1], (block[0], block[1]), lists
    )
    return [indices.new_empty(shape, dtype=dtype) for shape, dtype in shapes]


def _sum_tokens(grad_output: Tensor, backend: str) -> Tensor:
    # PyTorch's own sum is as good on a GPU.
    chosen = cpu if backend == "cpu" else reference
    return chosen.sum_tokens(grad_output)


def _sum_tokens_fake(grad_output: Tensor, backend: str) -> Tensor:
    return grad_output.new_empty(grad_output.shape[1])


def _abs_topk(x: Tensor, k: int, backend: str) -> Tensor:
    y: Tensor = backends.module(backend).abs_topk(x, k)
    return y


def _abs_topk_fake(x: Tensor, k: int, backend: str) -> Tensor:
    return x.new_empty(x.shape)


def _abs_topk_backward(grad_output: Tensor, y: Tensor, backend: str) -> Tensor:
    grad: Tensor = backends.module(backend).abs_topk_backward(grad_output, y)
    return grad


def _abs_topk_backward_fake(grad_output: Tensor, y: Tensor, backend: str) -> Tensor:
    return grad_output.new_empty(grad_output.shape)


def _gelu_abs_topk(x: Tensor, k: int, backend: str) -> Tensor:
    y: Tensor = backends.module(backend).gelu_abs_topk(x, k)
    return y


def _gelu_abs_topk_backward(grad_output: Tensor, y: Tensor, x: Tensor, backend: str) -> Tensor:
    grad: Tensor = backends.module(backend).gelu_abs_topk_backward(grad_output, y, x)
    return grad


def _gelu_abs_topk_backward_fake(grad_output: Tensor, y: Tensor, x: Tensor, backend: str) -> Tensor:
    return grad_output.new_empty(grad_output.shape)


def _norm_abs_topk(
    x: Tensor, weight: Tensor, k: int, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    y, scales = backends.module(backend).norm_abs_topk(x, weight, k, eps)
    return y, scales


def _norm_abs_topk_fake(
    x: Tensor, weight: Tensor, k: int, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=wide)


def _norm_abs_topk_backward(
    grad_output: Tensor, y: Tensor, x: Tensor, weight: Tensor, scales: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    run = backends.module(backend).norm_abs_topk_backward
    grad, grad_weight = run(grad_output, y, x, weight, scales)
    return grad, grad_weight


def _norm_abs_topk_backward_fake(
    grad_output: Tensor, y: Tensor, x: Tensor, weight: Tensor, scales: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    y, lse = backends.module(backend).attention(q, k, v, sinks)
    return y, lse


def _attention_fake(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=wide)


def _attention_backward(
    qkv: Tensor, sinks: Tensor | None, y: Tensor, lse: Tensor, grad_y: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    run = backends.module(backend).attention_backward
    grad, grad_sinks = run(qkv, sinks, y, lse, grad_y)
    return grad, grad_sinks


def _attention_backward_fake(
    qkv: Tensor, sinks: Tensor | None, y: Tensor, lse: Tensor, grad_y: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), qkv.new_empty(0 if sinks is None else sinks.shape)


def _register(schema: str, run: Callable[..., object], fake: Callable[..., object]) -> OpOverload:
    """Defines one op; the backend is an argument, so every device enters through `run`."""
    _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
    name = schema.partition("(")[0]
    for key in ("CPU", "CUDA"):
        _library.impl(name, run, key)
    torch.library.register_fake(f"sparse_kernels::{name}", fake, lib=_library)
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


_forward_op = _register(
    f"forward(Tensor x, Tensor values, Tensor? bias, {_LAYOUT}, str backend) -> Tensor",
    _forward,
    _forward_fake,
)
_grad_input_op = _register(
    f"grad_input(Tensor grad_output, Tensor values, Tensor? bias, {_LAYOUT}, str backend)"
    " -> Tensor",
    _grad_input,
    _grad_input_fake,
)
_grad_weight_op = _register(
    f"grad_weight(Tensor grad_output, Tensor x, {_LAYOUT}, str backend) -> Tensor",
    _grad_weight,
    _grad_weight_fake,
)
_schedule_op = _register(
    "schedule(Tensor indices, Tensor[] transposed, int in_features, int[2] block, str backend)"
    " -> Tensor[]",
    _schedule,
    _schedule_fake,
)
_sum_tokens_op = _register(
    "sum_tokens(Tensor grad_output, str backend) -> Tensor", _sum_tokens, _sum_tokens_fake
)
_abs_topk_op = _register(
    "abs_topk(Tensor x, int k, str backend) -> Tensor", _abs_topk, _abs_topk_fake
)
_abs_topk_backward_op = _register(
    "abs_topk_backward(Tensor grad_output, Tensor y, str backend) -> Tensor",
    _abs_topk_backward,
    _abs_topk_backward_fake,
)
_gelu_abs_topk_op = _register(
    "gelu_abs_topk(Tensor x, int k, str backend) -> Tensor", _gelu_abs_topk, _abs_topk_fake
)
_gelu_abs_topk_backward_op = _register(
    "gelu_abs_topk_backward(Tensor grad_output, Tensor y, Tensor x, str backend) -> Tensor",
    _gelu_abs_topk_backward,
    _gelu_abs_topk_backward_fake,
)
_norm_abs_topk_op = _register(
    "norm_abs_topk(Tensor x, Tensor weight, int k, float eps, str backend) -> (Tensor, Tensor)",
    _norm_abs_topk,
    _norm_abs_topk_fake,
)
_norm_abs_topk_backward_op = _register(
    "norm_abs_topk_backward(Tensor grad_output, Tensor y, Tensor x, Tensor weight, Tensor scales,"
    " str backend) -> (Tensor, Tensor)",
    _norm_abs_topk_backward,
    _norm_abs_topk_backward_fake,
)
_attention_op = _register(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? sinks, str backend) -> (Tensor, Tensor)",
    _attention,
    _attention_fake,
)
_attention_backward_op = _register(
    "attention_backward(Tensor qkv, Tensor? sinks, Tensor y, Tensor lse, Tensor grad_y,"
    " str backend) -> (Tensor, Tensor)",
    _attention_backward,
    _attention_backward_fake,
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


def derive(layout: FanInLayout, backend: str, lists: str) -> tuple[list[Tensor], list[Tensor]]:
    """The lists that a product walks and the backend's schedule for them, cached in the layout.

    Args:
        lists: "own", the layout's inputs of each output, or "transposed", the outputs of each
            input; a product that walks its own lists leaves the transposed ones unbuilt.

    Returns:
        The transposed lists, or nothing, and the schedule. The latter is built by an op of its own,
        so that a layout that has none yet can be traced as well.
    """
    transposed = list(layout.transposed) if lists == "transposed" else []

    def build(layout: FanInLayout) -> tuple[Tensor, ...]:
        return tuple(
            _schedule_op(layout.indices, transposed, layout.in_features, layout.block, backend)
        )

    return transposed, list(layout.derive(f"{backend}.{lists}", build))


def _layout_arguments(
    layout: FanInLayout, backend: str, product: str
) -> tuple[Tensor, list[Tensor], list[Tensor], int, tuple[int, int]]:
    """A layout as `product` of `backend` takes it through its schema, `_LAYOUT`."""
    lists = backends.module(backend).lists(
        layout.block_cols, layout.num_blocks, layout.block, product
    )
    return layout.indices, *derive(layout, backend, lists), layout.in_features, layout.block


def prepare(layout: FanInLayout, backend: str, *products: str) -> None:
    """Derives what the products of `backend` read, so that the first call finds it cached."""
    for product in products:
        _layout_arguments(layout, backend, product)


def forward(
    x: Tensor, values: Tensor, layout: FanInLayout, bias: Tensor | None, backend: str
) -> Tensor:
    """`Y = X W^T (+ b)`: x `(M, K)` -> `(M, N)`; see `reference.forward`."""
    arguments = _layout_arguments(layout, backend, "forward")
    y: Tensor = _forward_op(x, values, bias, *arguments, backend)
    return y


def grad_input(
    grad_output: Tensor, values: Tensor, layout: FanInLayout, bias: Tensor | None, backend: str
) -> Tensor:
    """`dX = dY W (+ b)`: grad_output `(M, N)` -> `(M, K)`; see `reference.grad_input`."""
    arguments = _layout_arguments(layout, backend, "grad_input")
    grad: Tensor = _grad_input_op(grad_output, values, bias, *arguments, backend)
    return grad


def grad_weight(grad_output: Tensor, x: Tensor, layout: FanInLayout, backend: str) -> Tensor:
    """`dW = dY^T X` at the kept blocks: `(M, N)`, `(M, K)` -> values' shape."""
    arguments = _layout_arguments(layout, backend, "grad_weight")
    grad: Tensor = _grad_weight_op(grad_output, x, *arguments, backend)
    return grad


def sum_tokens(grad_output: Tensor, backend: str) -> Tensor:
    """The gradient of a bias: `(M, N)` -> `(N,)`; see `reference.sum_tokens`."""
    grad: Tensor = _sum_tokens_op(grad_output, backend)
    return grad


def abs_topk(x: Tensor, k: int, backend: str) -> Tensor:
    """The `k` largest `|x|` of each row of x `(M, D)`, zero elsewhere; see `reference.abs_topk`."""
    y: Tensor = _abs_topk_op(x, k, backend)
    return y


def abs_topk_backward(grad_output: Tensor, y: Tensor, backend: str) -> Tensor:
    """The gradient of `abs_topk` from its result `y`; see `reference.abs_topk_backward`."""
    grad: Tensor = _abs_topk_backward_op(grad_output, y, backend)
    return grad


def gelu_abs_topk(x: Tensor, k: int, backend: str) -> Tensor:
    """`abs_topk(gelu(x), k)`: x `(M, D)` -> `(M, D)`; see `reference.gelu_abs_topk`."""
    y: Tensor = _gelu_abs_topk_op(x, k, backend)
    return y


def gelu_abs_topk_backward(grad_output: Tensor, y: Tensor, x: Tensor, backend: str) -> Tensor:
    """The gradient of `gelu_abs_topk` from its result y and x."""
    grad: Tensor = _gelu_abs_topk_backward_op(grad_output, y, x, backend)
    return grad


def norm_abs_topk(
    x: Tensor, weight: Tensor, k: int, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    """x `(M, D)`, weight `(D,)` -> `(M, D)`, scales `(M,)`; see `reference.norm_abs_topk`."""
    y, scales = _norm_abs_topk_op(x, weight, k, eps, backend)
    return y, scales


def norm_abs_topk_backward(
    grad_output: Tensor, y: Tensor, x: Tensor, weight: Tensor, scales: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    """The gradients of x and weight; see `reference.norm_abs_topk_backward`."""
    arguments = (grad_output, y, x, weight, scales, backend)
    grad, grad_weight = _norm_abs_topk_backward_op(*arguments)
    return grad, grad_weight


def attention(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    """`(B, T, H, d)`, `(B, S, H, d)` twice -> `(B, T, H, d)`, lse; see `reference.attention`."""
    y, lse = _attention_op(q, k, v, sinks, backend)
    return y, lse


def attention_backward(
    qkv: Tensor, sinks: Tensor | None, y: Tensor, lse: Tensor, grad_y: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    """The gradients of qkv and of sinks, if any; see `reference.attention_backward`."""
    grad, grad_sinks = _attention_backward_op(qkv, sinks, y, lse, grad_y, backend)
    return grad, grad_sinks
