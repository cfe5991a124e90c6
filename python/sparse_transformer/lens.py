"""TransformerLens reads and edits a model: `to_transformer_lens` makes a `TransformerBridge` of it.

    bridge = to_transformer_lens(load_model("python-small"))
    logits, cache = bridge.run_with_cache("for x in")
    cache["blocks.0.attn.hook_pattern"], cache["blocks.1.mlp.hook_post"]

Names and shapes are those of TransformerLens: `hook_embed`; in `blocks.{layer}`
`hook_resid_pre|mid|post`, `hook_attn_out`, `hook_mlp_out`, `attn.hook_q|k|v|z`,
`attn.hook_attn_scores|pattern`, `mlp.hook_pre|post`, `ln1.hook_normalized` and
`ln2.hook_normalized`; `ln_final.hook_normalized`. Where the model has AbsTopK they are what comes
out of it. `ln1.hook_normalized` is what attention's matrix reads, `ln2.hook_normalized` what the
neurons read.

There are no `hook_scale`, no `hook_pos_embed`, no dense matrices (`W_Q` and the like) and no weight
processing: the weights stay sparse. The bridge does not generate, `sparse_transformer.generate`
does. Batches have no padding on the left.

The architecture is `SparseTransformer` under the entry point `transformer_lens.architectures`.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

from torch import Tensor, nn

from sparse_transformer.attention import attention_pattern, attention_scores
from sparse_transformer.errors import UserError
from sparse_transformer.functional import RMS_EPS
from sparse_transformer.model import Transformer
from sparse_transformer.tokenizer import END_OF_TEXT

try:
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
    from transformer_lens.hook_points import HookPoint
    from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
    from transformer_lens.model_bridge.generalized_components import BlockBridge
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
    from transformers import PreTrainedTokenizerFast
except ImportError as error:
    raise UserError(
        f"TransformerLens 4 is missing ({error}): pip install 'transformer-lens>=4.3'"
    ) from error

ARCHITECTURE = "SparseTransformer"


def to_transformer_lens(model: Transformer) -> Any:
    """A `TransformerBridge` around a copy of the model; with a tokenizer it reads texts.

    Raises:
        UserError: embedding and unembedding share their weights.
    """
    config = model.config
    if config.tied:
        raise UserError("TransformerLens needs an unembedding of its own, and this model is tied")
    ArchitectureAdapterFactory.discover_entry_points()
    ArchitectureAdapterFactory.register_adapter(ARCHITECTURE, SparseTransformerAdapter)
    tokenizer = None
    if model.tokenizer is not None:
        # No bos_token: TransformerLens would look for the tokenizer on the hub to add it.
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=model.tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
        )
    bridge = build_bridge_from_module(
        _Named(copy.deepcopy(model)),
        ARCHITECTURE,
        tl_config=TransformerBridgeConfig(
            d_model=config.d_model,
            d_head=config.d_head,
            n_heads=config.heads,
            n_layers=config.n_layer,
            n_ctx=config.context,
            d_vocab=config.vocab_size,
            d_mlp=config.neurons,
            act_fn=config.activation,
            normalization_type="RMS",
            eps=RMS_EPS,
            default_prepend_bos=False,
        ),
        tokenizer=tokenizer,
        model_name=ARCHITECTURE,
    )
    return bridge


class SparseTransformerAdapter(ArchitectureAdapter):
    """Which part of the model is which of TransformerLens."""

    supports_generation = False
    supports_kv_cache = False
    supports_compatibility_mode = False
    supports_hf_output_attentions = False

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.component_mapping = {
            "embed": GeneralizedComponent(name="model.embed"),
            "blocks": _Block(
                name="model.blocks",
                submodules={"attn": _Attention(name="attn"), "mlp": _MLP(name="mlp")},
            ),
            "ln_final": _Norm(name="model.norm"),
            "unembed": GeneralizedComponent(name="model.unembed"),
        }


class _Named(nn.Module):
    """The model under another name than those that the bridge gives to its own parts."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """`(B, T)` to `(B, T, V)`."""
        if attention_mask is not None and not attention_mask.all():
            raise UserError("the model knows no padding: give prompts of one length")
        logits: Tensor = self.model(input_ids)
        return logits


class _Norm(GeneralizedComponent):
    """The last norm."""

    hook_aliases: ClassVar = {"hook_normalized": "hook_out"}


class _Block(BlockBridge):
    """The norms are inside attention and MLP, which read the residual stream."""

    hook_aliases: ClassVar = {
        "hook_resid_pre": "hook_in",
        "hook_resid_mid": "mlp.hook_in",
        "hook_resid_post": "hook_out",
        "hook_attn_out": "attn.hook_out",
        "hook_mlp_out": "mlp.hook_out",
    }

    def set_original_component(self, original_component: Any) -> None:
        """Wraps a `Block`."""
        super().set_original_component(original_component)
        for name, part in (("ln1", original_component.attn), ("ln2", original_component.mlp)):
            norm = nn.Module()
            norm.hook_normalized = HookPoint()
            self.add_module(name, norm)
            part.hook_in.replacements.append(("act_in", norm.hook_normalized))


class _Attention(GeneralizedComponent):
    """Scores and pattern are computed where somebody looks at them; the kernel has neither."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.hook_q, self.hook_k, self.hook_v = HookPoint(), HookPoint(), HookPoint()
        self.hook_attn_scores, self.hook_pattern = HookPoint(), HookPoint()
        self.hook_z = HookPoint()
        self._seen: dict[str, Tensor] = {}

    def set_original_component(self, original_component: Any) -> None:
        """Wraps an `Attention`."""
        super().set_original_component(original_component)
        config = original_component.config
        heads = (config.heads, config.d_head)

        def through(name: str, x: Tensor) -> Tensor:
            x = self._seen[name] = getattr(self, f"hook_{name}")(x.unflatten(-1, heads))
            return x.flatten(-2)

        def attend(y: Tensor) -> Tensor:
            q, k, v = (self._seen.pop(name).transpose(1, 2) for name in "qkv")
            y = y.unflatten(-1, heads)
            if self.hook_attn_scores.has_hooks("both") or self.hook_pattern.has_hooks("both"):
                scores = self.hook_attn_scores(attention_scores(q, k))
                pattern = self.hook_pattern(attention_pattern(scores, original_component.sinks))
                y = (pattern @ v).transpose(1, 2)
            z: Tensor = self.hook_z(y)
            return z.flatten(-2)

        points = original_component.hook_qkv.replacements
        points += [(name, lambda x, name=name: through(name, x)) for name in "qkv"]
        original_component.hook_y.replacements.append(("y", attend))


class _MLP(GeneralizedComponent):
    """The neurons before and after their activation function."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.hook_pre, self.hook_post = HookPoint(), HookPoint()

    def set_original_component(self, original_component: Any) -> None:
        """Wraps an `MLP`."""
        super().set_original_component(original_component)
        original_component.up.register_forward_hook(lambda module, args, x: self.hook_pre(x))
        original_component.hook_neurons.replacements.append(("post_act", self.hook_post))
