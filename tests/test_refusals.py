"""Bad input is refused with ValueError or TypeError that names the argument, what it got and needs.

Each row: the call, the exception, and words that the message must hold (the argument's name first).
"""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from oracle import TARGETS

import sparse_kernels as sk
from sparse_kernels import backends, ops
from sparse_kernels.transformer_ops import cached_attention, causal_attention, rms_norm_abs_topk


def check_refusal(call, kind, words):
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    assert type(caught.value) is kind
    message = str(caught.value)
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"


def table(*rows, dtype=torch.int32):
    return torch.tensor(rows, dtype=dtype)


GOOD = table([0, 1], [1, 3])

LAYOUT = {
    # indices
    "list": (lambda: sk.FanInLayout([[0, 1]], 4), TypeError, ["indices", "Tensor", "list"]),
    "numpy": (lambda: sk.FanInLayout(np.zeros((1, 1), np.int32), 4), TypeError, ["indices"]),
    "float": (lambda: sk.FanInLayout(GOOD.float(), 4), TypeError, ["indices", "int32", "float32"]),
    "bool": (lambda: sk.FanInLayout(GOOD.bool(), 4), TypeError, ["indices", "int32", "bool"]),
    "int16": (lambda: sk.FanInLayout(GOOD.short(), 4), TypeError, ["indices", "int32", "int16"]),
    "1-d": (lambda: sk.FanInLayout(GOOD[0], 4), ValueError, ["indices", "(2,)", "two"]),
    "3-d": (lambda: sk.FanInLayout(GOOD[None], 4), ValueError, ["indices", "(1, 2, 2)"]),
    "meta": (lambda: sk.FanInLayout(GOOD.to("meta"), 4), ValueError, ["indices", "meta"]),
    "negative": (lambda: sk.FanInLayout(table([-1, 1]), 4), ValueError, ["indices", "-1", "4"]),
    "too large": (lambda: sk.FanInLayout(table([0, 4]), 4), ValueError, ["indices", "4", "[0, 1]"]),
    "past the block columns": (
        lambda: sk.FanInLayout(table([0, 2]), 4, block=(1, 2)),
        ValueError,
        ["indices", "got 2"],
    ),
    "past int32": (
        lambda: sk.FanInLayout(table([0, 2**32], dtype=torch.int64), 4),
        ValueError,
        ["indices", str(2**32)],
    ),
    "past int32 and negative": (
        lambda: sk.FanInLayout(table([-(2**63), 1], dtype=torch.int64), 4),
        ValueError,
        ["indices", str(-(2**63))],
    ),
    "duplicate": (lambda: sk.FanInLayout(table([1, 1]), 4), ValueError, ["indices", "duplicate"]),
    "unsorted": (
        lambda: sk.FanInLayout(table([0, 1], [3, 1]), 4),
        ValueError,
        ["indices", "increasing", "3", "1"],
    ),
    "no rows": (
        lambda: sk.FanInLayout(torch.empty(0, 2, dtype=torch.int32), 4),
        ValueError,
        ["indices", "(0, 2)"],
    ),
    "no columns": (
        lambda: sk.FanInLayout(torch.empty(2, 0, dtype=torch.int32), 4),
        ValueError,
        ["indices", "(2, 0)"],
    ),
    "more columns than there are": (
        lambda: sk.FanInLayout(table([0, 1, 2]), 2),
        ValueError,
        ["indices", "(1, 3)", "2"],
    ),
    # sizes
    "wrong rows": (lambda: sk.FanInLayout(GOOD, 4, 3), ValueError, ["indices", "3", "(2, 2)"]),
    "in_features 0": (lambda: sk.FanInLayout(GOOD, 0), ValueError, ["in_features", "0"]),
    "in_features negative": (lambda: sk.FanInLayout(GOOD, -4), ValueError, ["in_features", "-4"]),
    "in_features float": (lambda: sk.FanInLayout(GOOD, 4.0), TypeError, ["in_features", "4.0"]),
    "in_features bool": (lambda: sk.FanInLayout(GOOD, True), TypeError, ["in_features", "True"]),
    "in_features None": (lambda: sk.FanInLayout(GOOD, None), TypeError, ["in_features", "None"]),
    "out_features 0": (lambda: sk.FanInLayout(GOOD, 4, 0), ValueError, ["out_features", "0"]),
    "out_features str": (lambda: sk.FanInLayout(GOOD, 4, "2"), TypeError, ["out_features", "2"]),
    # block
    "block int": (lambda: sk.FanInLayout(GOOD, 4, block=2), TypeError, ["block", "2"]),
    "block of one": (lambda: sk.FanInLayout(GOOD, 4, block=(2,)), TypeError, ["block", "(2,)"]),
    "block of three": (
        lambda: sk.FanInLayout(GOOD, 4, block=(1, 1, 1)),
        TypeError,
        ["block", "(1, 1, 1)"],
    ),
    "block str": (lambda: sk.FanInLayout(GOOD, 4, block="11"), TypeError, ["block", "11"]),
    "block 0": (lambda: sk.FanInLayout(GOOD, 4, block=(0, 1)), ValueError, ["block", "0"]),
    "block negative": (lambda: sk.FanInLayout(GOOD, 4, block=(1, -1)), ValueError, ["block", "-1"]),
    "block float": (lambda: sk.FanInLayout(GOOD, 4, block=(1, 2.0)), TypeError, ["block", "2.0"]),
    "block bool": (lambda: sk.FanInLayout(GOOD, 4, block=(True, 1)), TypeError, ["block", "True"]),
    "block_in does not divide": (
        lambda: sk.FanInLayout(GOOD, 7, block=(1, 2)),
        ValueError,
        ["block", "in_features", "2", "7"],
    ),
    "block_out does not divide": (
        lambda: sk.FanInLayout(GOOD, 8, 5, block=(2, 1)),
        ValueError,
        ["block", "out_features", "2", "5"],
    ),
    # random
    "fan_in 0": (lambda: sk.FanInLayout.random(4, 4, 0), ValueError, ["fan_in", "0"]),
    "fan_in negative": (lambda: sk.FanInLayout.random(4, 4, -1), ValueError, ["fan_in", "-1"]),
    "fan_in float": (lambda: sk.FanInLayout.random(4, 4, 2.0), TypeError, ["fan_in", "2.0"]),
    "fan_in bool": (lambda: sk.FanInLayout.random(4, 4, True), TypeError, ["fan_in", "True"]),
    "fan_in > K": (lambda: sk.FanInLayout.random(4, 4, 5), ValueError, ["fan_in", "5", "4"]),
    "fan_in not in blocks": (
        lambda: sk.FanInLayout.random(4, 8, 3, (1, 2)),
        ValueError,
        ["fan_in", "3", "2"],
    ),
    "random out 0": (lambda: sk.FanInLayout.random(0, 4, 1), ValueError, ["out_features", "0"]),
    "random in 0": (lambda: sk.FanInLayout.random(4, 0, 1), ValueError, ["in_features", "0"]),
    "random block": (
        lambda: sk.FanInLayout.random(4, 6, 4, (1, 4)),
        ValueError,
        ["block", "in_features", "4", "6"],
    ),
    "random on meta": (
        lambda: sk.FanInLayout.random(4, 4, 2, device="meta"),
        ValueError,
        ["device", "meta"],
    ),
    "sizes past int64": (
        lambda: sk.FanInLayout.random(2**64, 4, 2),
        ValueError,
        ["out_features", str(2**64)],
    ),
}


@pytest.mark.parametrize("name", LAYOUT)
def test_layout_refuses(name):
    check_refusal(*LAYOUT[name])


M, K, N = 5, 8, 6
BLOCK = (3, 2)
MADE = sk.FanInLayout.random(N, K, 4, BLOCK, generator=torch.Generator().manual_seed(0))


def linear(**changed):
    """`sparse_linear` with one argument of a good call replaced."""
    arguments = {
        "x": torch.ones(M, K),
        "values": torch.ones(MADE.values_shape),
        "layout": MADE,
        "bias": torch.ones(N),
        **changed,
    }
    return lambda: sk.sparse_linear(**arguments)


VALUES = torch.ones(MADE.values_shape)
SPARSE_LINEAR = {
    "x list": (linear(x=[[1.0] * K]), TypeError, ["x", "Tensor", "list"]),
    "x numpy": (linear(x=np.ones((M, K), np.float32)), TypeError, ["x", "Tensor", "ndarray"]),
    "x None": (linear(x=None), TypeError, ["x", "Tensor", "None"]),
    "x scalar": (linear(x=torch.tensor(1.0)), ValueError, ["x", "()", str(K)]),
    "x width": (linear(x=torch.ones(M, K + 1)), ValueError, ["x", f"({M}, {K + 1})", str(K)]),
    "x transposed": (linear(x=torch.ones(K, M)), ValueError, ["x", f"({K}, {M})", str(K)]),
    "x no width": (linear(x=torch.ones(M, 0)), ValueError, ["x", f"({M}, 0)", str(K)]),
    "x for transpose": (
        linear(transpose=True, bias=None),
        ValueError,
        ["x", f"({M}, {K})", "out_features", str(N)],
    ),
    "x int64": (linear(x=torch.ones(M, K).long()), TypeError, ["x", "int64", "float"]),
    "x bool": (linear(x=torch.ones(M, K).bool()), TypeError, ["x", "bool", "float"]),
    "x complex": (linear(x=torch.ones(M, K).cfloat()), TypeError, ["x", "complex64", "float"]),
    "x float16": (
        linear(x=torch.ones(M, K).half(), values=VALUES.half(), bias=None),
        TypeError,
        ["x", "float16", "float32", "bfloat16", "float64"],
    ),
    "x float8": (
        linear(x=torch.ones(M, K).to(torch.float8_e5m2)),
        TypeError,
        ["x", "float8_e5m2", "float32"],
    ),
    "x on meta": (linear(x=torch.ones(M, K, device="meta")), ValueError, ["x", "cpu", "meta"]),
    "x sparse": (linear(x=torch.ones(M, K).to_sparse()), (TypeError), ["x", "strided", "sparse"]),
    "x mkldnn": (linear(x=torch.ones(M, K).to_mkldnn()), (TypeError), ["x", "strided", "mkldnn"]),
    "values list": (linear(values=[1.0]), TypeError, ["values", "Tensor", "list"]),
    "values None": (linear(values=None), TypeError, ["values", "Tensor", "None"]),
    "values dtype": (linear(values=VALUES.double()), TypeError, ["values", "float64", "float32"]),
    "values int": (linear(values=VALUES.int()), TypeError, ["values", "int32"]),
    "values flat": (
        linear(values=VALUES.flatten()),
        ValueError,
        ["values", str(MADE.values_shape), f"({VALUES.numel()},)"],
    ),
    "values shape": (
        linear(values=VALUES.transpose(2, 3)),
        ValueError,
        ["values", str(MADE.values_shape), str(tuple(VALUES.transpose(2, 3).shape))],
    ),
    "values one row short": (linear(values=VALUES[1:]), ValueError, ["values", "(1, 2, 3, 2)"]),
    "values on meta": (linear(values=VALUES.to("meta")), ValueError, ["values", "cpu", "meta"]),
    "values sparse": (linear(values=VALUES.to_sparse()), TypeError, ["values", "sparse"]),
    "bias list": (linear(bias=[1.0] * N), TypeError, ["bias", "Tensor", "list"]),
    "bias True": (linear(bias=True), TypeError, ["bias", "Tensor", "bool"]),
    "bias size": (linear(bias=torch.ones(N + 1)), ValueError, ["bias", f"({N},)", f"({N + 1},)"]),
    "bias 2-d": (linear(bias=torch.ones(1, N)), ValueError, ["bias", f"({N},)", f"(1, {N})"]),
    "bias scalar": (linear(bias=torch.tensor(1.0)), ValueError, ["bias", f"({N},)", "()"]),
    "bias dtype": (linear(bias=torch.ones(N).bfloat16()), TypeError, ["bias", "bfloat16"]),
    "bias on meta": (linear(bias=torch.ones(N, device="meta")), ValueError, ["bias", "meta"]),
    "bias for transpose": (
        linear(x=torch.ones(M, N), transpose=True),
        ValueError,
        ["bias", f"({K},)", f"({N},)"],
    ),
    "layout None": (linear(layout=None), TypeError, ["layout", "FanInLayout", "None"]),
    "layout tensor": (linear(layout=GOOD), TypeError, ["layout", "FanInLayout", "Tensor"]),
    "layout class": (linear(layout=sk.FanInLayout), TypeError, ["layout", "FanInLayout"]),
    "backend unknown": (
        linear(backend="fast"),
        ValueError,
        ["backend", "fast", "reference", "cpu", "triton", "cuda"],
    ),
    "backend type": (linear(backend=3), TypeError, ["backend", "int"]),
    "transpose type": (linear(transpose=1), TypeError, ["transpose", "bool", "int"]),
}


@pytest.mark.parametrize("name", SPARSE_LINEAR)
def test_sparse_linear_refuses(name):
    check_refusal(*SPARSE_LINEAR[name])


def test_the_good_call_is_good():
    """The table above changes one thing of a call that works."""
    y = linear()()
    assert torch.equal(y, torch.full((M, N), 5.0))


BACKENDS = sorted({target.backend for target in TARGETS})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dispatched", [False, True])
def test_products_check_their_arguments(backend, dispatched):
    """Saved tensors can change, and anybody can call the ops: no wrong size reaches a pointer."""

    def call(product, first, second, *bias):
        if not dispatched:
            return getattr(ops, product)(first, second, MADE, *bias, backend)
        op = getattr(torch.ops.sparse_kernels, product)
        return op(first, second, *bias, MADE.indices, K, BLOCK, backend)

    x, dy = torch.ones(M, K), torch.ones(M, N)
    for product, *tensors in (
        ("forward", x[:, 1:], VALUES, None),
        ("forward", x[0], VALUES, None),
        ("forward", x, VALUES[1:], None),
        ("forward", x, VALUES.double(), None),
        ("forward", x, VALUES, torch.ones(N - 1)),
        ("forward", x, VALUES, torch.ones(N).double()),
        ("grad_input", dy[:, 1:], VALUES, None),
        ("grad_input", dy, VALUES, torch.ones(N)),
        ("grad_weight", dy, x[1:]),
        ("grad_weight", dy, x.double()),
        ("grad_weight", dy, x[:, 1:]),
        ("grad_weight", dy[:, 1:], x),
    ):
        with pytest.raises((TypeError, ValueError)):
            call(product, *tensors)
    if not dispatched:
        with pytest.raises(ValueError, match="x must be on the layout's device cpu, got meta"):
            call("forward", x.to("meta"), VALUES, None)
    elif backend == "cpu":
        with pytest.raises(RuntimeError, match=r"cannot run forward.*torch\.float16"):
            call("forward", x.half(), VALUES.half(), None)


ROWS, NARROW = torch.ones(3, 6), torch.ones(3, 5)
SIX, SCALES = torch.ones(6), torch.ones(3)
BITS = torch.full((3, 1), 0b110000)
HEADS = torch.ones(2, 5, 2, 4)
SHORT, LSE = HEADS[:, 1:], torch.ones(2, 2, 5)
QKV = torch.ones(2, 5, 3, 2, 4)
# The op, its arguments but for the backend, and how the message begins: with the argument's name.
OTHER_OPS = [
    ("bias_grad", (ROWS[0],), "grad_output must have two"),
    ("abs_topk", (ROWS, 7), "k must be from 1 to 6"),
    ("abs_topk", (ROWS, 0), "k must be from 1 to 6"),
    ("abs_topk", (ROWS[0], 1), "x must have two"),
    ("abs_topk_backward", (ROWS[0], ROWS[0]), "grad_output must have two"),
    ("abs_topk_backward", (ROWS, NARROW), "y must have shape"),
    ("abs_topk_backward", (ROWS, ROWS.double()), "y must be torch.float32"),
    ("gelu_abs_topk", (ROWS, 0), "k must be from 1 to 6"),
    ("gelu_abs_topk", (ROWS[0], 1), "x must have two"),
    ("abs_topk_backward", (ROWS, BITS[1:]), "bits must have shape"),
    ("abs_topk_packed", (ROWS, 7), "k must be from 1 to 6"),
    ("pack", (ROWS[0], ROWS[0], 2), "y must have two"),
    ("pack", (ROWS, NARROW, 2), "x must have shape"),
    ("pack", (ROWS, ROWS, -1), "room must be at least 0"),
    ("unpack", (ROWS[0], BITS, 6, False), "values must have two"),
    ("unpack", (ROWS, BITS, 65, False), "bits must have shape"),
    ("unpack", (ROWS, BITS, -1, False), "width must be at least 0"),
    ("unpack", (ROWS[1:], BITS, 6, True), "bits must have shape"),
    ("unpack", (ROWS, BITS.int(), 6, True), "bits must be torch.int64"),
    ("gelu_abs_topk_backward", (ROWS[0], ROWS[0], ROWS[0]), "grad_output must have two"),
    ("gelu_abs_topk_backward", (ROWS, NARROW, ROWS), "y must have shape"),
    ("gelu_abs_topk_backward", (ROWS, ROWS, NARROW), "x must have shape"),
    ("gelu_abs_topk_packed", (ROWS, 0), "k must be from 1 to 6"),
    ("gelu_abs_topk_packed_backward", (ROWS[0], BITS, ROWS), "grad_output must have two"),
    ("gelu_abs_topk_packed_backward", (ROWS, BITS[:, :0], ROWS), "bits must have shape"),
    ("gelu_abs_topk_packed_backward", (ROWS, BITS, ROWS[1:]), "values must have shape"),
    ("gelu_abs_topk_packed_backward", (ROWS, BITS, ROWS.double()), "values must be torch.float32"),
    ("gelu_abs_topk_packed_backward", (ROWS, BITS, ROWS[0]), "values must have two"),
    ("norm_abs_topk", (ROWS[0], SIX, 2, 0.1), "x must have two"),
    ("norm_abs_topk", (ROWS, SIX[1:], 2, 0.1), "weight must have shape"),
    ("norm_abs_topk", (ROWS, SIX, 7, 0.1), "k must be from 1 to 6"),
    ("norm_abs_topk", (ROWS, SIX, 0, 0.1), "k must be from 1 to 6"),
    ("norm_abs_topk_backward", (SIX, ROWS, ROWS, SIX, SCALES), "grad_output must have two"),
    ("norm_abs_topk_backward", (NARROW, ROWS, ROWS, SIX, SCALES), "y must have shape"),
    ("norm_abs_topk_backward", (ROWS, NARROW, ROWS, SIX, SCALES), "y must have shape"),
    ("norm_abs_topk_backward", (ROWS, ROWS, NARROW, SIX, SCALES), "x must have shape"),
    ("norm_abs_topk_backward", (ROWS, ROWS, ROWS, SIX[1:], SCALES), "weight must have shape"),
    ("norm_abs_topk_backward", (ROWS, ROWS, ROWS, SIX, SCALES[1:]), "scales must have shape"),
    ("norm_abs_topk_backward", (ROWS, ROWS, ROWS, SIX, SCALES.double()), "scales must be torch.fl"),
    ("norm_abs_topk_packed", (ROWS, SIX, 7, 0.1), "k must be from 1 to 6"),
    ("norm_abs_topk_packed_backward", (SIX, BITS, ROWS, SIX, SCALES), "grad_output must have two"),
    ("norm_abs_topk_packed_backward", (NARROW, BITS, ROWS, SIX, SCALES), "x must have shape"),
    ("norm_abs_topk_packed_backward", (ROWS, BITS[1:], ROWS, SIX, SCALES), "bits must have shape"),
    ("norm_abs_topk_packed_backward", (ROWS, BITS, NARROW, SIX, SCALES), "x must have shape"),
    (
        "norm_abs_topk_packed_backward",
        (ROWS, BITS, ROWS, SIX[1:], SCALES),
        "weight must have shape",
    ),
    (
        "norm_abs_topk_packed_backward",
        (ROWS, BITS, ROWS, SIX, SCALES[1:]),
        "scales must have shape",
    ),
    (
        "norm_abs_topk_packed_backward",
        (ROWS, BITS, ROWS, SIX, SCALES.double()),
        "scales must be torch.fl",
    ),
    ("attention", (HEADS[0], HEADS, HEADS, None), "q must be "),
    ("attention", (HEADS, SHORT, SHORT, None), "q must be .* S at least T"),
    ("attention", (HEADS, HEADS[..., 1:], HEADS, None), "k must have shape"),
    ("attention", (HEADS, HEADS, SHORT, None), "v must have shape"),
    ("attention", (HEADS, HEADS, HEADS, torch.ones(3)), "sinks must have shape"),
    ("attention_backward", (HEADS, None, HEADS, LSE, HEADS), "qkv must be "),
    ("attention_backward", (QKV, torch.ones(3), HEADS, LSE, HEADS), "sinks must have shape"),
    ("attention_backward", (QKV, None, HEADS[1:], LSE, HEADS), "y must have shape"),
    ("attention_backward", (QKV, None, HEADS, LSE[..., 1:], HEADS), "lse must have shape"),
    ("attention_backward", (QKV, None, HEADS, LSE.double(), HEADS), "lse must be torch.float32"),
    ("attention_backward", (QKV, None, HEADS, LSE, SHORT), "grad_y must have shape"),
]


@pytest.mark.parametrize(("name", "arguments", "message"), OTHER_OPS)
def test_other_ops_check_their_arguments(name, arguments, message):
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        getattr(torch.ops.sparse_kernels, name)(*arguments, "cpu")


# For each op, good arguments; every tensor among them in turn is made sparse.
GOOD_CALLS = {
    "forward": (torch.ones(M, K), VALUES, torch.ones(N), MADE.indices, K, BLOCK),
    "grad_input": (torch.ones(M, N), VALUES, torch.ones(K), MADE.indices, K, BLOCK),
    "grad_weight": (torch.ones(M, N), torch.ones(M, K), MADE.indices, K, BLOCK),
    "bias_grad": (ROWS,),
    "abs_topk": (ROWS, 2),
    "pack": (ROWS, ROWS, 2),
    "unpack": (ROWS, BITS, 6, False),
    "abs_topk_packed": (ROWS, 2),
    "abs_topk_backward": (ROWS, ROWS),
    "gelu_abs_topk": (ROWS, 2),
    "gelu_abs_topk_packed": (ROWS, 2),
    "gelu_abs_topk_backward": (ROWS, ROWS, ROWS),
    "gelu_abs_topk_packed_backward": (ROWS, BITS, ROWS),
    "norm_abs_topk": (ROWS, SIX, 2, 0.1),
    "norm_abs_topk_packed": (ROWS, SIX, 2, 0.1),
    "norm_abs_topk_backward": (ROWS, ROWS, ROWS, SIX, SCALES),
    "norm_abs_topk_packed_backward": (ROWS, BITS, ROWS, SIX, SCALES),
    "attention": (HEADS, HEADS, HEADS, torch.ones(2)),
    "attention_backward": (QKV, torch.ones(2), HEADS, LSE, HEADS),
}


@pytest.mark.parametrize("make", ["to_sparse", "to_mkldnn"])
@pytest.mark.parametrize("name", GOOD_CALLS)
def test_ops_refuse_tensors_that_are_not_strided(name, make):
    op, good = getattr(torch.ops.sparse_kernels, name), GOOD_CALLS[name]
    op(*good, "cpu")
    parameters = [argument.name for argument in op.default._schema.arguments]
    for place, argument in enumerate(good):
        if isinstance(argument, torch.Tensor) and (
            make == "to_sparse" or argument.is_floating_point()
        ):
            changed = (*good[:place], getattr(argument, make)(), *good[place + 1 :])
            with pytest.raises(TypeError, match=f"^{parameters[place]} must be a strided tensor"):
                op(*changed, "cpu")


def test_functions_refuse_tensors_that_are_not_strided():
    for make in (torch.Tensor.to_sparse, torch.Tensor.to_mkldnn):
        with pytest.raises(TypeError, match=r"^v must be a strided"):
            cached_attention(HEADS, HEADS, make(HEADS))
        with pytest.raises(TypeError, match=r"^sinks must be a strided"):
            causal_attention(QKV, make(torch.ones(2)))
        with pytest.raises(TypeError, match=r"^weight must be a strided"):
            rms_norm_abs_topk(ROWS, make(SIX), 2, 0.1)
        with pytest.raises(TypeError, match=r"^weight must be a strided"):
            sk.from_dense(make(ROWS), 2)
        with pytest.raises(TypeError, match=r"^values must be a strided"):
            sk.to_dense(make(VALUES), MADE)


@pytest.mark.parametrize("learned", ["x", "values", "bias"])
def test_sparse_gradients_are_refused(learned):
    tensors = {"x": torch.ones(M, K), "values": VALUES.clone(), "bias": torch.ones(N)}
    tensors[learned].requires_grad_()
    table = sk.sparse_linear(layout=MADE, **tensors)
    rows = torch.nn.functional.embedding(torch.tensor([0, 1]), table, sparse=True)
    with pytest.raises(TypeError, match=r"^grad_output must be a strided tensor"):
        rows.sum().backward()


def test_load_state_dict_refuses_sparse_indices():
    layer = sk.SparseLinear(K, N, fan_in=4)
    state = {**layer.state_dict(), "indices": layer.indices.to_sparse()}
    with pytest.raises(RuntimeError, match="indices must be a strided tensor"):
        layer.load_state_dict(state)


@pytest.mark.parametrize(
    ("indices", "block", "kind", "message"),
    [
        (MADE.indices[0, 0], BLOCK, ValueError, "indices must have two dimensions"),
        (MADE.indices[0], BLOCK, ValueError, "indices must have two dimensions"),
        (MADE.indices, (1, 1, 1), TypeError, "block must be a pair"),
        (MADE.indices, (0, 1), ValueError, "block.* must be at least 1"),
    ],
)
def test_ops_refuse_patterns(indices, block, kind, message):
    with pytest.raises(kind, match=f"^{message}"):
        torch.ops.sparse_kernels.forward(torch.ones(M, K), VALUES, None, indices, K, block, "cpu")


@pytest.mark.parametrize(
    ("name", "backend", "others"),
    [
        ("gelu_abs_topk", "triton", "reference, cpu, cuda have it"),
        ("norm_abs_topk_backward", "triton", "reference, cpu, cuda have it"),
        ("attention_backward", "triton", "reference, cpu have it"),
        ("attention_backward", "cuda", "reference, cpu have it"),
    ],
)
def test_backends_without_an_op_say_so(name, backend, others, monkeypatch):
    monkeypatch.setattr(backends.BACKENDS[backend], "why_not", lambda problem: None)
    message = f"backend '{backend}' cannot run {name}: it has no {name}, only {others}"
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.sparse_kernels, name)(*GOOD_CALLS[name], backend)


@pytest.mark.parametrize("name", ["bias_grad", "gelu_abs_topk", "attention"])
def test_refusals_of_a_backend_name_the_op(name):
    half = (a.half() if isinstance(a, torch.Tensor) else a for a in GOOD_CALLS[name])
    with pytest.raises(RuntimeError, match=rf"backend 'cpu' cannot run {name}: .*torch\.float16"):
        getattr(torch.ops.sparse_kernels, name)(*half, "cpu")


def test_backends_that_cannot_run_say_why():
    x = torch.ones(M, K)
    problem = backends.problem_of(x, MADE, "forward")
    reasons = {name: backends.why_not(name, problem) for name in backends.NAMES}
    assert list(reasons) == ["reference", "cpu", "triton", "cuda"]
    assert reasons["reference"] is None
    for name, reason in reasons.items():
        if reason is None:
            sk.sparse_linear(x, VALUES, MADE, backend=name)
            continue
        assert isinstance(reason, str)
        assert len(reason) > 10
        with pytest.raises(RuntimeError, match=name) as caught:
            sk.sparse_linear(x, VALUES, MADE, backend=name)
        assert reason in str(caught.value)
    assert "float16" in dict(sk.explain_backend(x.half(), MADE))["cpu"]


@pytest.mark.parametrize(
    ("module", "reason"),
    [("None", "None in sys.modules"), ("types.ModuleType('old')", "older version of the sources")],
)
def test_a_missing_extension_is_not_replaced_silently(module, reason):
    """Without the C++ module there is an error that says so; the reference only on request."""
    program = f"""
import sys, types
sys.modules["_sparse_kernels_cpu"] = {module}
import torch, sparse_kernels as sk
layout = sk.FanInLayout.random(4, 4, 2)
x, values = torch.ones(3, 4), torch.ones(layout.values_shape)
assert sk.sparse_linear(x, values, layout, backend="reference").tolist() == [[2.0] * 4] * 3
assert "_sparse_kernels_cpu" in dict(sk.explain_backend(x, layout))["cpu"]
for backend in (None, "cpu"):
    try:
        sk.sparse_linear(x, values, layout, backend=backend)
    except RuntimeError as error:
        assert "_sparse_kernels_cpu" in str(error) and {reason!r} in str(error)
    else:
        raise AssertionError("it ran")
print("right")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "right", done.stderr


@pytest.mark.slow
def test_instruction_sets_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="avx9000"), sk.cpu.use_isa("avx9000"):
        pass
    env = {**os.environ, "SPARSE_KERNELS_CPU_ISA": "avx9000"}
    done = subprocess.run(
        [sys.executable, "-c", "import sparse_kernels"], env=env, capture_output=True, text=True
    )
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "SPARSE_KERNELS_CPU_ISA" in last
    assert "avx9000" in last
    assert "baseline" in last or "neon" in last


@pytest.mark.parametrize("name", ["x", "values", "bias"])
def test_tensors_without_values_are_refused_under_autocast_too(name):
    tensors = {"x": torch.ones(M, K), "values": VALUES, "bias": torch.ones(N)}
    tensors[name] = tensors[name].to("meta")
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises((TypeError, ValueError), match=f"^{name} must"),
    ):
        sk.sparse_linear(layout=MADE, **tensors)
