"""A small weight-sparse transformer on `sparse_kernels`: trains, generates, exchanges weights."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sparse_transformer import _startup as _startup
from sparse_transformer.attention import KVCache
from sparse_transformer.config import ModelConfig
from sparse_transformer.errors import UserError
from sparse_transformer.memory import keep_freed_memory
from sparse_transformer.model import SparseEmbedding, Transformer
from sparse_transformer.released import load_released, save_released

if TYPE_CHECKING:
    from sparse_transformer.generation import generate
    from sparse_transformer.hooks import record
    from sparse_transformer.interventions import intervene
    from sparse_transformer.run import export_model, load_model

# What needs more than sparse_kernels does is imported when it is used.
_LATER = {
    "export_model": "sparse_transformer.run",
    "generate": "sparse_transformer.generation",
    "intervene": "sparse_transformer.interventions",
    "load_model": "sparse_transformer.run",
    "record": "sparse_transformer.hooks",
}

__all__ = [
    "KVCache",
    "ModelConfig",
    "SparseEmbedding",
    "Transformer",
    "UserError",
    "export_model",
    "generate",
    "intervene",
    "keep_freed_memory",
    "load_model",
    "load_released",
    "record",
    "save_released",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
