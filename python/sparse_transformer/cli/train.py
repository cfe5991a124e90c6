"""`python -m sparse_transformer.train`: its options, and how they follow from a preset or a run."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from sparse_transformer import program
from sparse_transformer.config import ModelConfig
from sparse_transformer.errors import UserError
from sparse_transformer.presets import PRESETS, preset
from sparse_transformer.train import checkpoint
from sparse_transformer.train.loop import train
from sparse_transformer.train.optimizer import OptimizerConfig
from sparse_transformer.train.settings import Settings, TrainConfig
from sparse_transformer.train.topology import TopologyConfig

_PROGRAM = "python -m sparse_transformer.train"
_PARTS = ("train", "model", "topology", "optimizer")


@dataclass(frozen=True)
class _First:
    """What decides the defaults of all other options."""

    out: Path | None = None
    """Folder of the run; it must be new or empty, or be continued with --resume."""
    preset: str | None = None
    """Settings to start from: tiny, circuits, d256, d512, d1024, d2048 or 475m."""
    resume: bool = False
    """Continue from the newest checkpoint in --out; settings that are not given are the run's."""
    from_step: int | None = None
    """Continue from the checkpoint of this step; later ones are set aside, not deleted."""


@dataclass(frozen=True)
class _Known(_First):
    """`_First`, and the model that gives the defaults of this one."""

    start_from: Path | None = None


@dataclass(frozen=True)
class Arguments(_First):
    """Trains a weight-sparse transformer on Python code."""

    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)
    model: Annotated[ModelConfig, tyro.conf.arg(name="")] = field(default_factory=ModelConfig)
    topology: TopologyConfig = field(default_factory=TopologyConfig)
    optimizer: Annotated[OptimizerConfig, tyro.conf.arg(name="")] = field(
        default_factory=OptimizerConfig
    )


def parse(arguments: Sequence[str] | None = None) -> tuple[Settings, Path, int | None]:
    """The command line: settings, the folder of the run, and the step to go on from.

    Raises:
        UserError: options that do not fit together, or the folder.
        SystemExit: `--help`, or an option that does not exist.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    # The defaults of all other options depend on these.
    known, _ = tyro.cli(
        _Known, args=arguments, prog=_PROGRAM, return_unknown_args=True, add_help=False
    )
    stored = None
    if known.out is not None and (known.resume or known.from_step is not None):
        stored = _stored(known.out)
    if stored is not None and known.preset not in (None, stored.preset):
        raise UserError(
            f"the run in {known.out} began with --preset {stored.preset}, not {known.preset}: "
            f"leave --preset out, or start a new run with another --out"
        )
    default = stored or preset(known.preset or "tiny")
    if stored is None and known.start_from is not None:
        # The same model, which does not anneal again.
        default = replace(
            default,
            model=checkpoint.load_config(known.start_from),
            topology=replace(default.topology, start_multiple=1.0),
        )
    given = tyro.cli(
        Arguments,
        args=arguments,
        prog=_PROGRAM,
        default=Arguments(**vars(default)),
        description=f"{Arguments.__doc__} Presets: {', '.join(PRESETS)}.",
    )
    if given.out is None:
        raise UserError("--out is missing: name a folder for the run, for example --out runs/first")
    resume = given.resume or given.from_step is not None
    if given.out.exists() and not given.out.is_dir():
        raise UserError(f"{given.out} is a file: choose another --out")
    if not resume and given.out.is_dir() and any(given.out.iterdir()):
        raise UserError(
            f"{given.out} is not empty: continue its run with --resume, or choose another --out"
        )
    if resume and not checkpoint.steps(given.out):
        name = program.printable(str(given.out))
        lacks = "has no checkpoint yet" if given.out.exists() else "does not exist"
        print(f"{name} {lacks}: beginning a new run at step 1", file=sys.stderr)
    settings = replace(default, **{part: getattr(given, part) for part in _PARTS})
    if stored is not None and settings.train.start_from != stored.train.start_from:
        raise UserError(
            f"the run in {given.out} has begun: leave --start-from out, or choose another --out"
        )
    return settings, given.out, given.from_step


def _stored(out: Path) -> Settings | None:
    """The settings of the run in `out`; None if it died before it wrote them."""
    path = out / "config.json"
    try:
        return Settings.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): put the file back, or start a new run with another "
            f"--out"
        ) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit status: 2 after an error, 130 after Ctrl-C, which saves."""
    return program.status(lambda: _main(arguments), "interrupted: continue with --resume")


def _main(arguments: Sequence[str] | None) -> int:
    try:
        settings, out, from_step = parse(arguments)
    except ValueError as error:
        raise UserError(f"{error}: change that option") from error
    return train(settings, out, from_step=from_step)
