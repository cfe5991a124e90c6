"""Bridges between a dense and a sparse model (Gao et al. 2025, arXiv 2511.13653, section 2.3).

At each site, the residual stream before a sublayer, an encoder maps the dense model's stream to the
sparse one's and a decoder maps it back, both affine. Site `2 l` is before attention of layer `l`,
site `2 l + 1` before its MLP. Unlike in the paper both models are trained already and stay as they
are: only the maps are fitted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div
from tqdm import trange

from sparse_transformer.model import Transformer

# Rows of a forward without gradients, and those of a step.
_ROWS, _STEP_ROWS = 64, 32
# Of the mean variance of a channel: what keeps dead ones from blowing up.
_RIDGE = 1e-4


class Bridge(nn.Module):
    """`encoders[site]` and `decoders[site]`, `(..., D)` to `(..., S)` and back."""

    def __init__(self, sites: int, dense: int, sparse: int) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(nn.Linear(dense, sparse) for _ in range(sites))
        self.decoders = nn.ModuleList(nn.Linear(sparse, dense) for _ in range(sites))


@contextmanager
def recorded(model: Transformer) -> Iterator[list[Tensor]]:
    """Yields a list to which each forward inside the block appends the stream at every site."""
    streams: list[Tensor] = []
    with ExitStack() as stack:
        for block in model.blocks:
            for part in (block.get_submodule("attn"), block.get_submodule("mlp")):
                note = part.register_forward_pre_hook(lambda _, given: streams.append(given[0]))
                stack.enter_context(note)
        yield streams


@contextmanager
def replaced(model: Transformer, site: int, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside the block the stream `(B, T, width)` at `site` becomes `change(stream)`."""
    block = model.blocks[site // 2]
    if site % 2 == 0:
        handle = block.register_forward_pre_hook(lambda _, given: (change(given[0]), *given[1:]))
    else:
        handle = block.get_submodule("attn").register_forward_hook(
            lambda _, given, added: change(given[0] + added) - given[0]
        )
    with handle:
        yield


def site_name(site: int) -> str:
    """The sublayer that reads the stream there."""
    return f"{site // 2}.{('attn', 'mlp')[site % 2]}"


def fit(
    dense: Transformer,
    sparse: Transformer,
    tokens: Tensor,
    keep: Tensor,
    *,
    steps: int,
    learning_rate: float = 3e-4,
    seed: int = 0,
) -> Bridge:
    """Least squares, then `steps` steps of Adam on NMSE and both KLs.

    NMSE is the squared error over the stream's variance, the mean over sites, encoders and decoders
    together. The KLs are from the dense model's next tokens to those of a hybrid: the sparse model
    from a random site on, which gets the encoded dense stream there, and the reverse.

    Args:
        dense, sparse: with the same tokens and number of layers; they need no gradients.
        tokens: int64 `(R, T)`.
        keep: bool `(R, T)`; what comes after the last of a row is padding.
        steps: of Adam.
        learning_rate: it falls linearly to zero.
        seed: draws rows and sites.
    """
    bridge = Bridge(2 * len(dense.blocks), dense.config.d_model, sparse.config.d_model)
    seen = [_streams(model, tokens, keep) for model in (dense, sparse)]
    spread = []
    for maps, (sources, targets) in _directions(bridge, *seen):
        for linear, source, target in zip(maps, sources, targets, strict=True):
            _least_squares(linear, source, target)
            spread.append(target.var(0).sum())
    del seen
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(bridge.parameters(), learning_rate)
    for step in trange(steps, desc="bridge", disable=None, leave=False):
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
        rows = torch.randint(len(tokens), (_STEP_ROWS,), generator=generator)
        chosen, kept = tokens[rows], keep[rows]
        with recorded(dense) as of_dense, recorded(sparse) as of_sparse, torch.no_grad():
            wanted = dense(chosen)[kept].log_softmax(-1)
            sparse(chosen, last_only=True)
        loss, scales = torch.zeros(()), iter(spread)
        for maps, (sources, targets) in _directions(bridge, of_dense, of_sparse):
            for linear, source, target in zip(maps, sources, targets, strict=True):
                error = (linear(source[kept]) - target[kept]).square().sum(-1).mean()
                loss = loss + error / next(scales) / len(spread)
            site = int(torch.randint(len(sources), (), generator=generator))
            hybrid = sparse if maps is bridge.encoders else dense
            crossed = maps[site](sources[site])
            with replaced(hybrid, site, lambda _, crossed=crossed: crossed):
                found = hybrid(chosen)[kept].log_softmax(-1)
            loss = loss + kl_div(found, wanted, reduction="batchmean", log_target=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return bridge.requires_grad_(False)


@torch.no_grad()
def quality(
    bridge: Bridge, dense: Transformer, sparse: Transformer, tokens: Tensor, keep: Tensor
) -> dict[str, list[float]]:
    """At each site, of both directions: `nmse_*`, and `kl_*` of the hybrid from the dense model."""
    with recorded(dense) as of_dense, recorded(sparse) as of_sparse:
        wanted = dense(tokens)[keep].log_softmax(-1)
        sparse(tokens, last_only=True)
    found: dict[str, list[float]] = {}
    for maps, (sources, targets) in _directions(bridge, of_dense, of_sparse):
        name, hybrid = ("encoder", sparse) if maps is bridge.encoders else ("decoder", dense)
        for site, linear in enumerate(maps):
            crossed, target = linear(sources[site]), targets[site][keep]
            with replaced(hybrid, site, lambda _, crossed=crossed: crossed):
                other = hybrid(tokens)[keep].log_softmax(-1)
            error = (crossed[keep] - target).square().sum(-1).mean() / target.var(0).sum()
            kl = kl_div(other, wanted, reduction="batchmean", log_target=True)
            found.setdefault(f"nmse_{name}", []).append(float(error))
            found.setdefault(f"kl_{name}", []).append(float(kl))
    return found


def _directions(
    bridge: Bridge, dense: list[Tensor], sparse: list[Tensor]
) -> tuple[tuple[nn.ModuleList, tuple[list[Tensor], list[Tensor]]], ...]:
    """Maps, what they read and what they should give."""
    return (bridge.encoders, (dense, sparse)), (bridge.decoders, (sparse, dense))


@torch.no_grad()
def _streams(model: Transformer, tokens: Tensor, keep: Tensor) -> list[Tensor]:
    """At each site the kept tokens, `(tokens, width)`."""
    found: list[list[Tensor]] = []
    for rows, kept in zip(tokens.split(_ROWS), keep.split(_ROWS), strict=True):
        with recorded(model) as streams:
            model(rows, last_only=True)
        found.append([stream[kept] for stream in streams])
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


@torch.no_grad()
def _least_squares(linear: nn.Linear, source: Tensor, target: Tensor) -> None:
    """Sets `linear` to the ridge regression of `target (n, out)` on `source (n, in)`."""
    x, y = source.double(), target.double()
    centre, level = x.mean(0), y.mean(0)
    x = x - centre
    gram = x.T @ x
    gram += _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    weight = torch.linalg.solve(gram, x.T @ (y - level))  # (in, out)
    linear.weight.copy_(weight.T)
    linear.bias.copy_(level - centre @ weight)
