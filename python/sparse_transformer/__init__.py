"""A small weight-sparse transformer on `sparse_kernels`: trains, generates, exchanges weights."""

from sparse_transformer import _startup as _startup
from sparse_transformer.attention import KVCache
from sparse_transformer.errors import UserError
from sparse_transformer.memory import keep_freed_memory
from sparse_transformer.model import ModelConfig, SparseEmbedding, Transformer
from sparse_transformer.released import load_released, save_released
from sparse_transformer.run import load_model

__all__ = [
    "KVCache",
    "ModelConfig",
    "SparseEmbedding",
    "Transformer",
    "UserError",
    "keep_freed_memory",
    "load_model",
    "load_released",
    "save_released",
]
