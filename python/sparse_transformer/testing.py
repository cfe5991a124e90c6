"""Whether a sparse model computes what masked dense computes with its weights."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import NamedTuple

import torch

from sparse_transformer.attention import KVCache
from sparse_transformer.model import Transformer, dense_weight

# Enough to exercise every operator of the model, few enough for float64.
WINDOWS, TOKENS = 4, 16
# Two models in float64 that add the same numbers in another order.
_EXACT = 1e-10


class Verdict(NamedTuple):
    """Errors relative to the largest logit; `failure` is a sentence, or None if all is well."""

    error: float | None = None
    dense_error: float | None = None
    failure: str | None = None


def densified(model: Transformer) -> Transformer:
    """The masked dense model with the same weights, biases, sinks and bigram table."""
    device = next(model.parameters()).device
    dense = Transformer(replace(model.config, linear="masked_dense"), device=device)
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name, layer in model.sparse_layers().items():
        state[f"{name}.weight"] = dense_weight(layer, layer.weight.detach())
    dense.load_state_dict(state)
    return dense


def check(model: Transformer, *, gradients: bool = True) -> Verdict:
    """Compares logits, with and without a cache, and gradients with those of `densified(model)`.

    In float64 both must agree to 1e-10 of the largest: same connections, same AbsTopK, same sums.
    In float32 the logits are compared with those in float64: half of them must have an error of
    at most twice the median error of masked dense in float32, plus one rounding. (Not all of them:
    where two magnitudes are nearly equal, rounding decides which one AbsTopK keeps.)
    """
    device, config = next(model.parameters()).device, model.config
    generator = torch.Generator().manual_seed(1)
    size = (2, WINDOWS, min(TOKENS, config.context))
    tokens, targets = torch.randint(config.vocab_size, size, generator=generator).to(device)
    dense = densified(model)
    with torch.no_grad():
        sparse32, dense32 = model(tokens).double(), dense(tokens).double()
        exact, dense = copy.deepcopy(model).double(), dense.double()
        truth = dense(tokens)
        cache = KVCache(config, WINDOWS, device=device, dtype=torch.float64)
        # The last token is fed on its own.
        cached = torch.cat([exact(part, cache) for part in tokens.split(size[2] - 1, 1)], 1)
        differences = [(logits - truth).abs().max() for logits in (exact(tokens), cached)]
    largest = float(truth.abs().max())
    error = float((sparse32 - truth).abs().median()) / largest
    dense_error = float((dense32 - truth).abs().median()) / largest
    difference = float(max(differences)) / largest
    failure = None
    if not difference <= _EXACT:
        failure = f"logits in float64 differ from masked dense by {difference:.1e} of the largest"
    elif not error <= 2 * dense_error + torch.finfo(torch.float32).eps:
        failure = f"error of the logits {error:.1e}, that of masked dense {dense_error:.1e}"
    elif gradients:
        exact.loss(tokens, targets).backward()
        dense.loss(tokens, targets).backward()
        failure = compare_gradients(exact, dense)
    return Verdict(error, dense_error, failure)


def compare_gradients(model: Transformer, dense: Transformer) -> str | None:
    """A sentence if a gradient is not that of masked dense, at the connections that exist."""
    expected = dict(dense.named_parameters())
    layers = model.sparse_layers()
    for name, parameter in model.named_parameters():
        got, want = parameter.grad, expected[name].grad
        if got is None or want is None:
            return f"{name} has no gradient"
        layer = layers.get(name.removesuffix(".weight"))
        if layer is not None:
            values = parameter.detach().requires_grad_()
            (want,) = torch.autograd.grad(dense_weight(layer, values), values, want)
        if not float((got - want).abs().max()) <= _EXACT * max(float(want.abs().max()), 1e-30):
            return f"the gradient of {name} in float64 is not that of masked dense"
    return None
