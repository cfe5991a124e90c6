"""Presets of training runs, from a minute on a laptop to 475M parameters."""

from __future__ import annotations

from sparse_transformer.config import ModelConfig
from sparse_transformer.errors import UserError
from sparse_transformer.train.optimizer import OptimizerConfig
from sparse_transformer.train.settings import Settings, TrainConfig
from sparse_transformer.train.topology import TopologyConfig


def _published(name: str, train: TrainConfig, d_model: int, n_layer: int = 8) -> Settings:
    """The released script's densities: L0 of a layer is about the same at every width.

    With EF = d_model / 256: blocks pfrac / EF^2, embeddings pfrac / EF; its example, 1/64 and 1/16
    at d_model 1024, has pfrac = 1/4.
    """
    expansion = d_model / 256
    density = 0.25 / expansion**2
    return Settings(
        preset=name,
        train=train,
        model=ModelConfig(
            d_model=d_model,
            n_layer=n_layer,
            density=density,
            embedding_density=0.25 / expansion,
        ),
        # A fan cannot be more than dense.
        topology=TopologyConfig(start_multiple=min(8.0, 1 / density)),
    )


PRESETS: dict[str, Settings] = {
    settings.preset: settings
    for settings in (
        Settings(
            preset="tiny",
            train=TrainConfig(
                steps=400,
                batch_tokens=4096,
                validate_every=50,
                validation_tokens=65536,
                save_every=100,
            ),
            model=ModelConfig(
                n_layer=2, d_model=128, context=128, density=1 / 16, embedding_density=1 / 8
            ),
            optimizer=OptimizerConfig(learning_rate=0.03),
        ),
        # Solves some of the circuit tasks after an hour on one core.
        Settings(
            preset="circuits",
            train=TrainConfig(
                steps=6500,
                batch_tokens=4096,
                validate_every=250,
                validation_tokens=65536,
                save_every=250,
            ),
            model=ModelConfig(n_layer=2, d_model=256, density=1 / 32, embedding_density=1 / 8),
            topology=TopologyConfig(start_multiple=4.0, anneal_share=0.3),
            optimizer=OptimizerConfig(learning_rate=0.04),
        ),
        _published("d256", TrainConfig(steps=4000), 256),
        _published("d512", TrainConfig(steps=4000), 512),
        _published("d1024", TrainConfig(steps=4000, batch_tokens=131072, accumulate=4), 1024),
        _published("d2048", TrainConfig(steps=4000, batch_tokens=131072, accumulate=8), 2048),
        _published("475m", TrainConfig(steps=4000, batch_tokens=131072, accumulate=8), 1792, 12),
    )
}


def preset(name: str) -> Settings:
    """The settings of that name; a UserError if there are none."""
    if name not in PRESETS:
        raise UserError(f"there is no preset {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
