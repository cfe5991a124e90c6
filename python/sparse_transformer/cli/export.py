"""`python -m sparse_transformer.export`: writes a trained model alone, as small as it can be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from sparse_transformer import program
from sparse_transformer.run import export_model


@dataclass(frozen=True)
class ExportConfig:
    """Writes a trained model, without the state of its training, to a folder of its own."""

    checkpoint: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder of a run, of a checkpoint in it or of an exported model; or the name of a model."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Output folder; it must be new or empty."""
    step: int | None = None
    """The checkpoint of this step, by default the newest."""
    data: tuple[Path, ...] = ()
    """Files and folders of which a sample goes with the model; by default the training files."""


def run(config: ExportConfig) -> None:
    """Writes the folder and prints how large it is."""
    size = export_model(config.checkpoint, config.out, step=config.step, data=config.data)
    print(f"{program.printable(str(config.out))}: {size / 1e6:.1f} MB")


main = program.entry(ExportConfig, "export", run)
