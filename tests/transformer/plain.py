"""The model once more: dense float64 PyTorch of a state dict, for the tests to compare with.

It shares no code with sparse_transformer: products with `@`, softmax over a T x (1 + T) matrix.
"""

import math

import torch
from torch import Tensor

import sparse_kernels as sk
from sparse_transformer import ModelConfig, SparseEmbedding, Transformer


def dense_weights(model: Transformer) -> dict[str, Tensor]:
    """The state as dense float64 leaves: of a sparse layer, the whole matrix `(N, K)`."""
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    for name, layer in model.sparse_layers().items():
        del state[f"{name}.indices"]
        dense = sk.to_dense(layer.weight.detach(), layer.layout)
        turned = layer.transpose and not isinstance(layer, SparseEmbedding)
        state[f"{name}.weight"] = dense.t() if turned else dense
    return {name: tensor.double().contiguous().requires_grad_() for name, tensor in state.items()}


def dense_gradients(model: Transformer) -> dict[str, tuple[Tensor, Tensor]]:
    """Each parameter's gradient as a dense matrix, and a mask of where it exists."""
    found = {}
    layers = model.sparse_layers()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        layer = layers.get(name.removesuffix(".weight"))
        if layer is None or not name.endswith(".weight"):
            found[name] = (parameter.grad.double(), torch.ones_like(parameter, dtype=torch.bool))
            continue
        dense = sk.to_dense(parameter.grad, layer.layout).double()
        exists = sk.to_dense(torch.ones_like(parameter), layer.layout) != 0
        turned = layer.transpose and not isinstance(layer, SparseEmbedding)
        found[name] = (dense.t(), exists.t()) if turned else (dense, exists)
    return found


def keep(config: ModelConfig, place: str, x: Tensor) -> Tensor:
    """AbsTopK by a sort."""
    if config.active is None or place not in config.active_places:
        return x
    k = max(1, int(config.active * x.shape[-1]))
    order = x.abs().argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(x).scatter(-1, order[..., :k], 1.0)
    return x * mask


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 2.0**-23) * weight


def logits(config: ModelConfig, w: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """`(B, T)` to `(B, T, V)`."""
    B, T = tokens.shape
    H, d = config.heads, config.d_head
    x = w["embed.weight"][tokens]
    positions = w["positions"][:T] if "positions" in w else None
    if config.added_positions:
        x, positions = x + positions, None

    def read(prefix: str, x: Tensor) -> Tensor:
        x = norm(x, w[f"{prefix}.norm.weight"])
        if positions is None:
            return x
        beside = norm(positions, w[f"{prefix}.position_norm.weight"])
        return torch.cat([x, beside.expand(B, -1, -1)], -1)

    def linear(name: str, x: Tensor) -> Tensor:
        y = x @ w[f"{name}.weight"].t()
        return y + w[f"{name}.bias"] if f"{name}.bias" in w else y

    for layer in range(config.n_layer):
        attn, mlp = f"blocks.{layer}.attn", f"blocks.{layer}.mlp"
        qkv = linear(f"{attn}.qkv", keep(config, "attn_in", read(attn, x)))
        parts = qkv.split(H * d, -1)
        q, k, v = (
            keep(config, f"attn_{name}", part).view(B, T, H, d).transpose(1, 2)
            for name, part in zip("qkv", parts, strict=True)
        )
        y = attention(q, k, v, w.get(f"{attn}.sinks"))
        y = linear(f"{attn}.out", y.transpose(1, 2).reshape(B, T, H * d))
        x = x + keep(config, "attn_out", y)
        h = linear(f"{mlp}.up", keep(config, "mlp_in", read(mlp, x)))
        h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
        h = linear(f"{mlp}.down", keep(config, "mlp_neuron", h))
        x = x + keep(config, "mlp_out", h)
    x = norm(x, w["norm.weight"])
    result = x @ w["embed.weight" if config.tied else "unembed.weight"].t()
    if "bigram" in w:
        result = result + w["bigram"][tokens]
    return result + w["logits_bias"] if "logits_bias" in w else result


def attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
    """`(B, H, T, d)` each; the sink is a column of scores with nothing to add."""
    T, d = q.shape[2:]
    scores = q @ k.transpose(2, 3) / math.sqrt(d)
    later = torch.arange(T)[None, :] > torch.arange(T)[:, None]
    scores = scores.masked_fill(later, -math.inf)
    if sinks is None:
        return scores.softmax(-1) @ v
    weights = scores.exp()
    return (weights / (weights.sum(-1, keepdim=True) + sinks.exp().view(1, -1, 1, 1))) @ v
