"""Parameter groups, the gradient RMS and the sharkfin, against values worked out by hand."""

import copy
import math

import pytest
import torch
from torch import nn

import sparse_kernels as sk
from sparse_transformer.train.optimizer import (
    OptimizerConfig,
    learning_rate,
    make_optimizer,
    normalize_gradients_,
)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = sk.SparseLinear(8, 6, fan_in=3)
        self.down = nn.Linear(6, 8)
        self.norm = nn.RMSNorm(8)
        self.sinks = nn.Parameter(torch.zeros(1, 2, 1, 1))
        self.bigram = nn.Embedding(5, 5)
        self.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)


def test_groups_of_the_optimizer():
    model = Model()
    optimizer = make_optimizer(model, OptimizerConfig(learning_rate=0.5))
    names = {parameter: name for name, parameter in model.named_parameters()}
    decay = {
        names[parameter]: group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert decay == {
        "up.weight": 0.1,
        "down.weight": 0.1,
        "up.bias": 0.0,
        "down.bias": 0.0,
        "norm.weight": 0.0,
        "sinks": 0.0,
        "bigram.weight": 0.0,
    }
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.5, (0.9, 0.95), 0.1)
        assert group["fused"] is True


def test_fused_step_is_adamw():
    """w <- w (1 - lr wd) - lr m / (sqrt(v) + eps), with both moments corrected, in float64."""
    model = Model()
    optimizer = make_optimizer(model, OptimizerConfig(learning_rate=0.5))
    expected, moments = copy.deepcopy(model).double(), {}
    for step in range(1, 4):
        for (name, parameter), wide in zip(
            model.named_parameters(), expected.parameters(), strict=True
        ):
            if not parameter.requires_grad:
                continue
            parameter.grad = torch.randn_like(parameter)
            g = parameter.grad.double()
            m, v = moments.get(name, (torch.zeros_like(g), torch.zeros_like(g)))
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
            moments[name] = m, v
            decay = 0.1 if name in ("up.weight", "down.weight") else 0.0
            rise = (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 0.1)
            with torch.no_grad():
                wide.mul_(1 - 0.5 * decay).sub_(0.5 * rise)
        optimizer.step()
    for parameter, wide in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(parameter.double(), wide, rtol=1e-5, atol=1e-5)


def with_gradients(*gradients):
    parameters = []
    for gradient in gradients:
        parameter = nn.Parameter(torch.zeros(3))
        parameter.grad = gradient if gradient is None else torch.tensor(gradient)
        parameters.append(parameter)
    return parameters


def test_gradients_are_divided_by_their_common_rms():
    parameters = with_gradients([3.0, 0.0, 0.0], None, [0.0, 4.0, 0.0])
    rms = normalize_gradients_(iter(parameters), clip_only=False)
    assert rms == pytest.approx(math.sqrt(25 / 6))  # over the gradients that exist
    expected = torch.tensor([3.0, 0.0, 0.0]) / (math.sqrt(25 / 6) + 1e-5)
    torch.testing.assert_close(parameters[0].grad, expected)
    assert parameters[1].grad is None
    assert normalize_gradients_(parameters, clip_only=False) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(("scale", "after"), [(0.5, 0.5), (1.0, 1.0), (4.0, 1.0)])
def test_clipping_only_shrinks(scale, after):
    parameters = with_gradients([scale, -scale, scale])
    assert normalize_gradients_(parameters, clip_only=True) == pytest.approx(scale)
    torch.testing.assert_close(parameters[0].grad, torch.tensor([after, -after, after]))


def test_zero_and_absent_and_infinite_gradients():
    parameters = with_gradients([0.0, 0.0, 0.0])
    assert normalize_gradients_(parameters, clip_only=False) == 0
    assert torch.equal(parameters[0].grad, torch.zeros(3))
    assert normalize_gradients_(with_gradients(None), clip_only=False) == 0
    for bad in (math.inf, math.nan):
        parameters = with_gradients([bad, 1.0, 2.0], [1.0, 1.0, 1.0])
        assert not math.isfinite(normalize_gradients_(parameters, clip_only=False))
        assert torch.equal(parameters[1].grad, torch.ones(3))


@pytest.mark.parametrize(
    ("step", "fraction", "rate"),
    [
        (0, 1, 0.0),
        (5, 1, 0.5),  # warmup of 10 steps of 1000
        (10, 1, 1.0),
        (505, 1, 0.5),  # (1000 - 505) / 990
        (505, 4, 0.25),
        (10, 64, 0.125),
        (999, 1, 1 / 990),
        (1000, 1, 0.0),
    ],
)
def test_sharkfin(step, fraction, rate):
    assert learning_rate(step, 1000, 2.0, fraction) == pytest.approx(2 * rate)


def test_sharkfin_of_a_run_too_short_for_a_warmup():
    assert [learning_rate(step, 4, 1.0, 1.0) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]
