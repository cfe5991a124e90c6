"""The public product at blocks that need not exist."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import DTYPES, layouts, seeds, tokens

import sparse_kernels as sk
from sparse_kernels import reference


def draw(layout, rows, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(rows, width, generator=generator).to(dtype)
        for width in (layout.out_features, layout.in_features)
    ]


@given(layouts(), tokens(200), st.sampled_from(DTYPES), seeds())
def test_it_is_what_a_layer_there_would_get(layout, rows, dtype, seed):
    grad, x = draw(layout, rows, dtype, seed)
    values = torch.zeros(layout.values_shape, dtype=dtype, requires_grad=True)
    sk.sparse_linear(x, values, layout).backward(grad)
    assert torch.equal(sk.grad_weight(grad, x, layout), values.grad)
    # As a fan-out layer's, whose layout is that of the transposed matrix.
    values.grad = None
    sk.sparse_linear(grad, values, layout, transpose=True).backward(x)
    assert torch.equal(sk.grad_weight(grad, x, layout), values.grad)
    split = [tensor.view(1, rows, 1, tensor.shape[1]) for tensor in (grad, x)]
    assert torch.equal(sk.grad_weight(*split, layout), values.grad)


def test_the_reference_backend_and_second_derivatives():
    layout = sk.FanInLayout.random(6, 8, 4, (2, 2))
    grad, x = draw(layout, 5, torch.float64, 0)
    got = sk.grad_weight(grad, x, layout, "reference")
    assert torch.equal(got, reference.grad_weight(grad, x, layout))
    leaves = [tensor.requires_grad_() for tensor in (grad, x)]
    assert torch.autograd.gradcheck(lambda g, x: sk.grad_weight(g, x, layout), leaves)


LAYOUT = sk.FanInLayout.random(4, 6, 2)
GRAD, X = torch.zeros(3, 4), torch.zeros(3, 6)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "layout must be a FanInLayout", (GRAD, X, None)),
        (TypeError, "grad_output must be a torch.Tensor", ([1.0], X, LAYOUT)),
        (TypeError, "x must be one of float32, .* got torch.int64", (GRAD, X.long(), LAYOUT)),
        (TypeError, "x must be torch.float64, got torch.float32", (GRAD.double(), X, LAYOUT)),
        (
            ValueError,
            "grad_output must have the layout's out_features = 4 as its last",
            (X, X, LAYOUT),
        ),
        (ValueError, "x must have the layout's in_features = 6", (GRAD, GRAD, LAYOUT)),
        (ValueError, r"x must have shape \(3, 6\), got \(2, 6\)", (GRAD, X[:2], LAYOUT)),
        (ValueError, "x must be on the layout's device", (GRAD, X.to("meta"), LAYOUT)),
    ],
)
def test_refusals(error, message, arguments):
    with pytest.raises(error, match=message):
        sk.grad_weight(*arguments)
