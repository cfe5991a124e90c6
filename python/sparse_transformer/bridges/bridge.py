"""Bridges between a dense and a sparse model (Gao et al. 2025, arXiv 2511.13653, section 2.3).

At each site, the residual stream before a sublayer, an encoder maps the dense model's stream to the
sparse one's and a decoder maps it back, both affine. Site `2 l` is before attention of layer `l`,
site `2 l + 1` before its MLP. Unlike in the paper the sparse model is not trained with them: both
models stay as they are.

Shapes: R rows of T tokens; streams are `(R, T, width)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div
from tqdm import trange

from sparse_transformer.model import Transformer

# Rows of a forward without gradients, and those of a step.
_ROWS, _STEP_ROWS = 64, 32
# Of a channel's mean square, so that those that are always zero get no weight.
_RIDGE = 1e-4


class Bridge(nn.Module):
    """`encoders[site]` and `decoders[site]`; `maps` are both."""

    def __init__(self, sites: int, dense: int, sparse: int) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(nn.Linear(dense, sparse) for _ in range(sites))
        self.decoders = nn.ModuleList(nn.Linear(sparse, dense) for _ in range(sites))

    @property
    def maps(self) -> tuple[nn.ModuleList, nn.ModuleList]:
        """What reads the dense model's streams, and what reads the sparse one's."""
        return self.encoders, self.decoders


def site_name(site: int) -> str:
    """The sublayer that reads the stream there."""
    return f"{site // 2}.{('attn', 'mlp')[site % 2]}"


@contextmanager
def recorded(model: Transformer) -> Iterator[list[Tensor]]:
    """Yields a list to which a forward inside the block appends the stream at every site."""
    streams: list[Tensor] = []
    with ExitStack() as stack:
        for block in model.blocks:
            for part in (block.get_submodule("attn"), block.get_submodule("mlp")):
                note = part.register_forward_pre_hook(lambda _, given: streams.append(given[0]))
                stack.enter_context(note)
        yield streams


@contextmanager
def replaced(model: Transformer, site: int, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside the block the stream at `site` becomes `change(stream)`."""
    block = model.blocks[site // 2]
    if site % 2 == 0:
        handle = block.register_forward_pre_hook(lambda _, given: (change(given[0]), *given[1:]))
    else:
        handle = block.get_submodule("attn").register_forward_hook(
            lambda _, given, added: change(given[0] + added) - given[0]
        )
    with handle:
        yield


def losses(
    bridge: Bridge,
    dense: Transformer,
    sparse: Transformer,
    tokens: Tensor,
    keep: Tensor,
    sites: Iterable[int],
) -> tuple[Tensor, Tensor]:
    """NMSE at all sites `(2, sites)` and KL at the given ones; of the encoders, of the decoders.

    NMSE is the mean squared error over the variance of what is to be predicted. KL is from the
    dense model's next tokens to those of a hybrid: the sparse model which gets the encoded dense
    stream at a site, and the dense model which gets the decoded sparse stream.

    Args:
        bridge, dense, sparse: only the bridge gets gradients.
        tokens: int64 `(R, T)`.
        keep: bool `(R, T)`; the others, at the ends of rows, are padding.
        sites: where KL is computed.
    """
    with recorded(dense) as of_dense, recorded(sparse) as of_sparse, torch.no_grad():
        wanted = dense(tokens)[keep].log_softmax(-1)
        sparse(tokens, last_only=True)
    streams, hybrids = (of_dense, of_sparse), (sparse, dense)
    nmse, kl = [], []
    for way, maps in enumerate(bridge.maps):
        crossed = [linear(stream) for linear, stream in zip(maps, streams[way], strict=True)]
        for found, target in zip(crossed, streams[1 - way], strict=True):
            error = (found - target)[keep].square().sum(-1).mean()
            nmse.append(error / target[keep].var(0).sum())
        for site in sites:
            kl.append(_hybrid_kl(hybrids[way], site, crossed[site], tokens, keep, wanted))
    return torch.stack(nmse).view(2, -1), torch.stack(kl).view(2, -1)


def _hybrid_kl(
    model: Transformer, site: int, stream: Tensor, tokens: Tensor, keep: Tensor, wanted: Tensor
) -> Tensor:
    with replaced(model, site, lambda _: stream):
        found = model(tokens)[keep].log_softmax(-1)
    return kl_div(found, wanted, reduction="batchmean", log_target=True)


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
    """Least squares, then Adam on the mean NMSE and both KLs at a random site.

    Args:
        tokens, keep: as for `losses`.
        steps: of Adam.
        learning_rate: it falls linearly to zero.
        seed: draws rows and sites.
    """
    bridge = Bridge(2 * len(dense.blocks), dense.config.d_model, sparse.config.d_model)
    streams = [_streams(model, tokens, keep) for model in (dense, sparse)]
    for way, maps in enumerate(bridge.maps):
        for linear, source, target in zip(maps, streams[way], streams[1 - way], strict=True):
            _least_squares(linear, source, target)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(bridge.parameters(), learning_rate)
    for step in trange(steps, desc="bridge", disable=None, leave=False):
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
        rows = torch.randint(len(tokens), (_STEP_ROWS,), generator=generator)
        site = int(torch.randint(len(bridge.encoders), (), generator=generator))
        nmse, kl = losses(bridge, dense, sparse, tokens[rows], keep[rows], [site])
        optimizer.zero_grad()
        (nmse.mean() + kl.sum()).backward()
        optimizer.step()
    return bridge.requires_grad_(False)


@torch.no_grad()
def _streams(model: Transformer, tokens: Tensor, keep: Tensor) -> list[Tensor]:
    """At each site those of the kept tokens, `(tokens, width)`."""
    found: list[list[Tensor]] = []
    for rows, kept in zip(tokens.split(_ROWS), keep.split(_ROWS), strict=True):
        with recorded(model) as streams:
            model(rows, last_only=True)
        found.append([stream[kept] for stream in streams])
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


@torch.no_grad()
def _least_squares(linear: nn.Module, source: Tensor, target: Tensor) -> None:
    """Sets `linear` to the ridge regression of `target (n, out)` on `source (n, in)`."""
    x, y = source.double(), target.double()
    centre, level = x.mean(0), y.mean(0)
    x = x - centre
    gram = x.T @ x
    gram += _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    weight = torch.linalg.solve(gram, x.T @ (y - level))  # (in, out)
    linear.get_parameter("weight").copy_(weight.T)
    linear.get_parameter("bias").copy_(level - centre @ weight)
