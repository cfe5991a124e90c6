"""The weight-sparse transformer of Gao et al. 2025 (arXiv 2511.13653).

A GPT-2-style decoder with RMSNorm, untied embedding and unembedding, and AbsTopK at eight places of
every block; attention sinks; a bigram table added to the logits. Its matrices are `SparseLinear`s,
whose time and memory follow the weights that exist, or (`ModelConfig.linear`) the published masked
dense ones, or plain dense ones. Nothing else differs between the three.

Shapes: B sequences of T tokens, D = d_model, H heads of d channels, W = H d, V tokens in the
vocabulary.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import sparse_kernels as sk
from sparse_transformer import functional
from sparse_transformer.attention import KVCache, cached_attention, causal_attention
from sparse_transformer.config import ModelConfig as ModelConfig
from sparse_transformer.hooks import HookPoint
from sparse_transformer.layers import AbsTopK, RMSNorm, abs_topk_at, activation, keep_parts
from sparse_transformer.masked import MaskedEmbedding, MaskedLinear

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Standard deviation of the initial weights of a dense matrix, as released.
_INITIAL_STD = 0.02


class SparseEmbedding(sk.SparseLinear):
    """An embedding whose every token keeps `fan_out` of D channels.

    It is the `SparseLinear(V, D, fan_out=..., bias=False)` that one-hot vectors would be fed to:
    weight `(V, F, 1, 1)`, indices `(V, F)`, layout that of the table itself. The lookup scatters
    F values for each token; there is no `(V, D)` tensor, nor one for the gradient.
    """

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 `(...)` to `(..., D)`."""
        columns = self.layout.indices
        return functional.embed(tokens, self.weight.flatten(1), columns, self.out_features)


class Attention(nn.Module):
    """RMSNorm, AbsTopK, q k v with AbsTopK each, attention with sinks, projection, AbsTopK."""

    def __init__(self, config: ModelConfig, prefix: str, make: _Maker) -> None:
        super().__init__()
        W, D = config.heads * config.d_head, config.d_model
        self.config = config
        self.norm = RMSNorm(D, make.device, make.dtype)
        self.position_norm = _position_norm(config, make)
        self.qkv = make.matrix(f"{prefix}.qkv", D + config.positions, 3 * W)
        self.out = make.matrix(f"{prefix}.out", W, D, writes=True)
        self.sinks = (
            nn.Parameter(torch.zeros(config.heads, device=make.device, dtype=make.dtype))
            if config.sinks
            else None
        )
        self.keep_in = abs_topk_at(config, "attn_in", D + config.positions)
        self.keep_qkv = keep_parts([abs_topk_at(config, f"attn_{name}", W) for name in "qkv"])
        self.keep_out = abs_topk_at(config, "attn_out", D)
        self.hook_in = HookPoint("act_in")
        self.hook_qkv = HookPoint("q", "k", "v")
        self.hook_y = HookPoint("y")
        self.hook_out = HookPoint("resid_delta")

    def forward(
        self, x: Tensor, positions: Tensor | None, cache: KVCache | None, layer: int
    ) -> Tensor:
        """`(B, T, D)` to what is added to it."""
        B, T, _ = x.shape
        H, d = self.config.heads, self.config.d_head
        qkv = self.hook_qkv(self.keep_qkv(self.project(x, positions)))
        qkv = qkv.view(B, T, 3, H, d)
        if cache is None:
            y = causal_attention(qkv, self.sinks)
        else:
            q, k, v = qkv.unbind(2)
            y = cached_attention(q, *cache.append(layer, k, v), self.sinks)
        return self.write(y.reshape(B, T, H * d))

    def project(self, x: Tensor, positions: Tensor | None) -> Tensor:
        """`(B, T, D)` to q, k and v before AbsTopK, `(B, T, 3, W)`."""
        read = self.hook_in(_read(x, self.norm, self.position_norm, positions, self.keep_in))
        projected: Tensor = self.qkv(read)
        return projected.view(*x.shape[:2], 3, self.config.heads * self.config.d_head)

    def write(self, y: Tensor) -> Tensor:
        """What the heads found, `(B, T, W)`, to what is added to the stream, `(B, T, D)`."""
        added: Tensor = self.hook_out(self.keep_out(self.out(self.hook_y(y))))
        return added


class MLP(nn.Module):
    """RMSNorm, AbsTopK, neurons, GELU, AbsTopK, projection, AbsTopK."""

    def __init__(self, config: ModelConfig, prefix: str, make: _Maker) -> None:
        super().__init__()
        D, neurons = config.d_model, config.neurons
        self.norm = RMSNorm(D, make.device, make.dtype)
        self.position_norm = _position_norm(config, make)
        self.up = make.matrix(f"{prefix}.up", D + config.positions, neurons)
        self.down = make.matrix(f"{prefix}.down", neurons, D, writes=True)
        self.keep_in = abs_topk_at(config, "mlp_in", D + config.positions)
        self.neurons = activation(config)
        self.keep_out = abs_topk_at(config, "mlp_out", D)
        self.hook_in = HookPoint("act_in")
        self.hook_neurons = HookPoint("post_act")
        self.hook_out = HookPoint("resid_delta")

    def forward(self, x: Tensor, positions: Tensor | None) -> Tensor:
        """`(B, T, D)` to what is added to it."""
        x = self.hook_in(_read(x, self.norm, self.position_norm, positions, self.keep_in))
        x = self.hook_neurons(self.neurons(self.up(x)))
        added: Tensor = self.hook_out(self.keep_out(self.down(x)))
        return added


class Block(nn.Module):
    """`x + attn(x)`, then `x + mlp(x)`."""

    def __init__(self, config: ModelConfig, layer: int, make: _Maker) -> None:
        super().__init__()
        self.layer = layer
        self.attn = Attention(config, f"blocks.{layer}.attn", make)
        self.mlp = MLP(config, f"blocks.{layer}.mlp", make)

    def forward(self, x: Tensor, positions: Tensor | None, cache: KVCache | None) -> Tensor:
        """`(B, T, D)` to the same."""
        x = x + self.attn(x, positions, cache, self.layer)
        return x + self.mlp(x, positions)


class Transformer(nn.Module):
    """The model: embedding, blocks, norm, unembedding, bigram table.

    Args:
        config: see `ModelConfig`.
        fan_multiple: the sparse layers start with that multiple of their final fan, at most dense.
        fans: fans to start with by layer name, for those that `fan_multiple` does not describe.
        generator: draws patterns and weights; by default torch's global one.

    Attributes:
        tokenizer: None, or that of the folder from which the model was read.

    The weights that exist start normal with the variance that keeps every sum as large as the
    released initialisation of the dense matrix does (0.02, divided by sqrt(2 n_layer) where a block
    writes); biases, sinks and the bigram table start at zero.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        fan_multiple: float = 1.0,
        fans: Mapping[str, int] | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        make = _Maker(config, fan_multiple, fans or {}, generator, device, dtype)
        V, D = config.vocab_size, config.d_model
        self.config = config
        self.tokenizer: Tokenizer | None = None
        self._targets = make.targets
        self.embed = make.embedding("embed")
        self.positions = make.positions()
        self.blocks = nn.ModuleList(Block(config, layer, make) for layer in range(config.n_layer))
        self.hook_final = HookPoint("final_resid")
        self.norm = RMSNorm(D, device, dtype)
        self.unembed = None if config.tied else make.matrix("unembed", D, V, bias=False)
        self.bigram = nn.Parameter(torch.zeros(V, V, **make.where)) if config.bigram else None
        self.logits_bias: Tensor | None
        self.register_buffer(
            "logits_bias", torch.zeros(V, **make.where) if config.logits_bias else None
        )

    @classmethod
    def from_state(
        cls,
        config: ModelConfig,
        state: Mapping[str, Tensor],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Transformer:
        """A model with the fans and values of a state dict from any point of a training run.

        A RuntimeError, TypeError or ValueError for a state that is not one of such a model.
        """
        held, wanted = sum(tensor.numel() for tensor in state.values()), config.values()
        if wanted > 2 * held + 2**20:
            # Before the memory for it is allocated.
            raise ValueError(
                f"the state holds {held:,} values, and its configuration asks for {wanted:,}"
            )
        ending = ".indices"
        fans = {
            name.removesuffix(ending): tensor.shape[1]
            for name, tensor in state.items()
            if name.endswith(ending) and tensor.dim() == 2
        }
        model = cls(config, fans=fans, device=device, dtype=dtype)
        converted = dict(state)
        for name, tensor in model.state_dict().items():
            if name in state and state[name].is_floating_point() != tensor.is_floating_point():
                raise TypeError(f"{name} must be {tensor.dtype}, got {state[name].dtype}")
            if name in state:
                # Exported models have narrower numbers.
                converted[name] = state[name].to(tensor.dtype)
        model.load_state_dict(converted)
        return model

    # The modules of these three stand above this one and need more packages: they are imported
    # when they are used.

    @staticmethod
    def from_pretrained(
        name_or_folder: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        device: torch.device | str = "cpu",
    ) -> Transformer:
        """The model of a folder or of the Hugging Face hub, in evaluation mode and float32.

        It reads what `save_pretrained`, `export_model` and training write, and the formats of
        `load_released`. Where a folder of that name exists, or a model of that name comes with the
        package, no network is used; otherwise `owner/name` is downloaded once, to the hub's cache.
        `model.tokenizer` is that of the folder, or the one on the hub that a checkpoint of
        sparse_pretrain names; None if there is none.

        Args:
            name_or_folder: a folder, the name of a model that comes with the package, or
                `owner/name`.
            revision: branch, tag or commit on the hub; by default its main branch.
            token: of the hub; by default that of `hf auth login`.
            device: where the model goes.

        Raises:
            UserError: no such folder or model, a hub that cannot be reached, `huggingface_hub` is
                missing, or a file that is missing, cut short or not of these formats.
        """
        hub = import_module("sparse_transformer.hub")
        model: Transformer = hub.from_pretrained(
            name_or_folder, revision=revision, token=token, device=device
        )
        return model

    def save_pretrained(self, folder: str | os.PathLike[str], *, card: str | None = None) -> None:
        """Writes a folder that `from_pretrained`, `load_model` and all programs read.

        It has the weights in safetensors with their size and hash, `config.json`, `tokenizer.json`
        if the model has a tokenizer, and a model card. What is read from it is the same bit by bit;
        half precision becomes float32. The sample of a corpus, which `export_model` adds, is not in
        it.

        Args:
            folder: must be new or empty.
            card: the text of `README.md`; by default one that says how large the model is.

        Raises:
            UserError: a folder that is not empty or cannot be written, or a model in float64.
        """
        import_module("sparse_transformer.run").save_model(self, folder, card)

    def push_to_hub(
        self,
        name: str,
        *,
        card: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
    ) -> str:
        """Uploads what `save_pretrained` writes to `name` on the hub, which is made if need be.

        Args:
            name: `owner/name`.
            card: as for `save_pretrained`.
            private: whether others can see it, where it is made now.
            token: of the hub; by default that of `hf auth login`.

        Returns:
            Its address.

        Raises:
            UserError: `huggingface_hub` is missing, the hub cannot be reached or refuses.
        """
        hub = import_module("sparse_transformer.hub")
        return str(hub.push_to_hub(self, name, card=card, private=private, token=token))

    def forward(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        *,
        last_only: bool = False,
        at: Tensor | None = None,
    ) -> Tensor:
        """Logits of each next token.

        Args:
            tokens: int64 `(B, T)`; T and what the cache holds together at most `config.context`.
            cache: keys and values of the tokens before these; it takes up those of these. For
                inference, without gradients.
            last_only: only the logits of the last position are made.
            at: int64 `(B,)`, only those of this position of each sequence; what comes after it,
                such as padding, has no influence. Not with last_only.

        Returns:
            `(B, T, V)`, or `(B, 1, V)`.

        Raises:
            ValueError: tokens of another rank, dtype or number; `at` of another shape or dtype.
        """
        if at is not None and (last_only or at.shape != tokens.shape[:1] or at.is_floating_point()):
            raise ValueError(
                f"at must be int64 ({tokens.shape[0]},) and not with last_only, "
                f"got {at.dtype} of shape {tuple(at.shape)}"
            )
        x = self._residual(tokens, cache)
        if last_only:
            x, tokens = x[:, -1:], tokens[:, -1:]
        if at is not None:
            rows = torch.arange(tokens.shape[0], device=tokens.device)
            x, tokens = x[rows, at].unsqueeze(1), tokens[rows, at].unsqueeze(1)
        logits = self._logits(x)
        if self.bigram is None:
            return logits
        return logits + nn.functional.embedding(tokens, self.bigram)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of `targets (B, T)` given `tokens (B, T)`, a scalar.

        One `(B T, V)` tensor of logits is made; it becomes its own gradient. Hooks on `unembed` see
        a copy that stays as it is. A ValueError for no tokens, or targets of another shape.
        """
        if tokens.numel() == 0:
            raise ValueError(f"a loss needs at least one token, got shape {tuple(tokens.shape)}")
        if targets.shape != tokens.shape:
            raise ValueError(
                f"targets must have the shape of tokens {tuple(tokens.shape)}, "
                f"got {tuple(targets.shape)}"
            )
        x = self._residual(tokens, None)
        logits = self._logits(x.view(-1, x.shape[-1]))
        if self.unembed is not None and self.unembed._forward_hooks:
            logits = logits.clone()
        return functional.cross_entropy_(
            logits, targets.reshape(-1), self.bigram, tokens.reshape(-1)
        )

    def sparse_layers(self) -> dict[str, sk.SparseLinear]:
        """The sparse layers by qualified name, in order; the `SparseEmbedding` is one of them."""
        return {
            name: module
            for name, module in self.named_modules()
            if isinstance(module, sk.SparseLinear)
        }

    def target_fan(self, name: str) -> int:
        """Fan-in or fan-out of that sparse layer at the end of training; a KeyError for others."""
        return self._targets[name]

    def _residual(self, tokens: Tensor, cache: KVCache | None) -> Tensor:
        """`(B, T)` to the residual stream after the last block, `(B, T, D)`."""
        start = 0 if cache is None else cache.length
        self._check(tokens, start)
        positions = None
        if self.positions is not None:
            positions = self.positions[start : start + tokens.shape[1]]
        x = self.embed(tokens)
        if positions is not None and self.config.added_positions:
            x, positions = x + positions, None
        for block in self.blocks:
            x = block(x, positions, cache)
        if cache is not None:
            cache.length += tokens.shape[1]
        final: Tensor = self.hook_final(x)
        return final

    def _logits(self, x: Tensor) -> Tensor:
        """`(..., D)` to `(..., V)`, without the bigram table's part."""
        x = self.norm(x)
        if self.unembed is not None:
            logits = self.unembed(x)
        elif isinstance(self.embed, SparseEmbedding):
            # The embedding's layout is that of the (V, D) table, which is what is wanted here.
            logits = sk.sparse_linear(
                x, self.embed.weight, self.embed.layout, backend=self.config.backend
            )
        else:
            logits = nn.functional.linear(x, self.embed.get_parameter("weight"))
        return logits if self.logits_bias is None else logits + self.logits_bias

    def _check(self, tokens: Tensor, start: int) -> None:
        if tokens.dim() != 2 or tokens.dtype != torch.int64:
            raise ValueError(
                f"tokens must be int64 (B, T), got {tokens.dtype} of shape {tuple(tokens.shape)}"
            )
        if start + tokens.shape[1] > self.config.context:
            raise ValueError(
                f"tokens must be at most context = {self.config.context} in all, "
                f"got {start} before and {tokens.shape[1]} now"
            )


def count_weights(model: Transformer) -> int:
    """L0: nonzero weights of all matrices, embeddings included, as training reports it."""
    sparse = model.sparse_layers()
    if sparse:
        return sum(layer.weight.numel() for layer in sparse.values())
    return sum(
        int(module.weight.count_nonzero())
        for module in model.modules()
        if isinstance(module, (nn.Linear, nn.Embedding))
    )


def dense_weight(layer: sk.SparseLinear, values: Tensor) -> Tensor:
    """`values`, which are as the weight of a sparse layer, as that of the dense one, with zeros."""
    matrix = sk.to_dense(values, layer.layout)
    # The layout of an embedding is that of its table, as nn.Embedding has it.
    is_transposed = layer.transpose and not isinstance(layer, SparseEmbedding)
    return matrix.t() if is_transposed else matrix


class _Maker:
    """Makes the layers of the kind that the configuration asks for, and initialises them."""

    def __init__(
        self,
        config: ModelConfig,
        fan_multiple: float,
        fans: Mapping[str, int],
        generator: torch.Generator | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        if not fan_multiple > 0:
            raise ValueError(f"fan_multiple must be above 0, got {fan_multiple}")
        self.config = config
        self.fan_multiple = fan_multiple
        self.fans = fans
        self.generator = generator
        self.device = device
        self.dtype = dtype
        self.where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.targets: dict[str, int] = {}

    def matrix(
        self, name: str, inputs: int, outputs: int, *, writes: bool = False, bias: bool = True
    ) -> nn.Module:
        """A linear layer that keeps a number of inputs for each output.

        One that writes to the residual stream keeps what `ModelConfig.writers` says.
        """
        config = self.config
        density, least = self._density(name)
        options: dict[str, Any] = {"bias": bias and config.bias, **self.where}
        shrink = (2 * config.n_layer) ** -0.5 if writes else 1.0
        if config.linear == "dense":
            return self._initialise(nn.Linear(inputs, outputs, **options), 1.0, shrink)
        if config.linear == "masked_dense":
            if writes:
                options["min_fan_out"] = min(least, outputs)
            elif name != "unembed":
                options["min_fan_in"] = min(least, inputs)
            masked = MaskedLinear(inputs, outputs, density=density, **options)
            return self._initialise(masked, 1.0, shrink)
        side = config.writers if writes else "fan_in"
        width = outputs if side == "fan_out" else inputs
        options[side] = fan = self._fan(name, density, least, width)
        options |= {"generator": self.generator, "backend": config.backend}
        return self._initialise(sk.SparseLinear(inputs, outputs, **options), fan / width, shrink)

    def embedding(self, name: str) -> nn.Module:
        """The `(V, D)` table."""
        V, D = self.config.vocab_size, self.config.d_model
        density, least = self._density(name)
        if self.config.linear == "sparse":
            fan = self._fan(name, density, least, D)
            layer = SparseEmbedding(
                V, D, fan_out=fan, bias=False, generator=self.generator, **self.where
            )
            return self._initialise(layer, fan / D)
        if self.config.linear == "masked_dense":
            return self._initialise(MaskedEmbedding(V, D, density=density, **self.where))
        return self._initialise(nn.Embedding(V, D, **self.where))

    def positions(self) -> nn.Parameter | None:
        """`(context, D)` to add, or `(context, P)` beside the stream; None if there are none.

        Those beside the stream start as sines and cosines (Vaswani et al. 2017, with wavelengths
        of 4 to 512 tokens), so that a turn leads from a token's channels to the one's before.
        """
        config = self.config
        channels = config.d_model if config.added_positions else config.positions
        if not channels:
            return None
        values = torch.empty(config.context, channels, **self.where)
        if config.added_positions:
            return nn.Parameter(self.normal(values))
        waves = torch.logspace(2, 9, (channels + 1) // 2, base=2, dtype=torch.float64)
        angles = torch.outer(torch.arange(config.context), 2 * math.pi / waves)
        sinusoids = torch.cat([angles.sin(), angles.cos()], 1)[:, :channels]
        return nn.Parameter(values.copy_(sinusoids))

    def normal(self, tensor: Tensor, std: float = _INITIAL_STD) -> Tensor:
        """Fills `tensor`, drawing where the generator lives."""
        generator = self.generator
        with torch.no_grad():
            if tensor.is_meta or generator is None or generator.device == tensor.device:
                return tensor.normal_(0.0, std, generator=None if tensor.is_meta else generator)
            drawn = torch.empty(tensor.shape, dtype=tensor.dtype, device=generator.device)
            return tensor.copy_(drawn.normal_(0.0, std, generator=generator))

    def _density(self, name: str) -> tuple[float, int]:
        if name in ("embed", "unembed"):
            return self.config.embedding_density, 1
        return self.config.density, self.config.min_nonzeros

    def _fan(self, name: str, density: float, least: int, width: int) -> int:
        """The fan to start with; notes the final one."""
        target = min(width, max(least, round(density * width)))
        target = (self.config.fans or {}).get(name, target)
        self.targets[name] = target
        return self.fans.get(name, min(width, round(target * self.fan_multiple)))

    def _initialise(self, layer: Any, kept: float = 1.0, shrink: float = 1.0) -> nn.Module:
        """Normal weights whose variance makes up for the share that is not kept; zero biases."""
        self.normal(layer.weight, _INITIAL_STD * shrink * kept**-0.5)
        if getattr(layer, "bias", None) is not None:
            nn.init.zeros_(layer.bias)
        made: nn.Module = layer
        return made


def _position_norm(config: ModelConfig, make: _Maker) -> RMSNorm | None:
    return RMSNorm(config.positions, make.device, make.dtype) if config.positions else None


def _read(
    x: Tensor,
    norm: RMSNorm,
    position_norm: RMSNorm | None,
    positions: Tensor | None,
    keep: nn.Module,
) -> Tensor:
    """What a block reads of the residual stream, and of the positions if there are any."""
    if position_norm is None and isinstance(keep, AbsTopK):
        return keep.of_norm(x, norm)
    x = norm(x)
    if position_norm is not None and positions is not None:
        beside = position_norm(positions).to(x.dtype).expand(x.shape[0], -1, -1)
        x = torch.cat([x, beside], -1)
    kept: Tensor = keep(x)
    return kept
