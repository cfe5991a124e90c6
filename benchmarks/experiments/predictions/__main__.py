"""`python -m benchmarks.experiments.predictions`: what circuits predict, and whether it holds.

The predictions are those of brackets.py and quotes.py. Everything is measured on the whole model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, TextIO

import tyro

from benchmarks.experiments.predictions.brackets import bracket_counting
from benchmarks.experiments.predictions.dose_response import Prediction
from benchmarks.experiments.predictions.quotes import single_double_quote
from sparse_transformer import program
from sparse_transformer.circuits.circuit import Circuit
from sparse_transformer.errors import UserError
from sparse_transformer.run import load_run

# By task: what its circuit predicts.
CHECKS: dict[str, Callable[..., list[Prediction]]] = {
    "bracket_counting": bracket_counting,
    "single_double_quote": single_double_quote,
}


@dataclass(frozen=True)
class PredictionsConfig:
    """Checks what circuits for bracket counting and quotes predict about a trained model."""

    checkpoint: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """The folder of a training run, or of one checkpoint in it."""
    circuit: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """A circuit.json of this model: checks only its task, with the nodes of the circuit."""
    prompts: int = 32
    """Number of prompts for each amount, and of pairs for the quote node."""
    seed: int = 0
    """Random seed."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Also write the results to this JSON file."""
    step: int | None = None
    """The checkpoint of this step, by default the newest."""
    device: str = "cpu"
    """Where to compute: cpu, cuda, ..."""


def run(config: PredictionsConfig, out: TextIO) -> None:
    """Checks as `config` says and writes a report to `out`.

    Raises:
        UserError: a checkpoint or circuit that cannot be read or does not fit, too few prompts.
    """
    if config.prompts < 2:
        raise UserError(f"--prompts must be at least 2, got {config.prompts}: choose more")
    program.need_writable("--json", config.json)
    circuit = None if config.circuit is None else _read(config.circuit)
    if circuit is not None and circuit.task not in CHECKS:
        raise UserError(
            f"there are no predictions for {circuit.task}: use a circuit for {' or '.join(CHECKS)}"
        )
    model, tokenizer = load_run(config.checkpoint, config.step, config.device)
    found: list[Prediction] = []
    for task in CHECKS if circuit is None else (circuit.task,):
        check = CHECKS[task]
        found += check(model, tokenizer, circuit, prompts=config.prompts, seed=config.seed)
    if config.json is not None:
        program.write_json(config.json, [asdict(prediction) for prediction in found])
    out.write("\n".join(map(_text, found)))
    out.flush()


def _read(path: Path) -> Circuit:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"the circuit {path} cannot be read ({error}): choose another") from error
    return Circuit.from_json(text)


def _text(found: Prediction) -> str:
    """A few lines: whether it held, what was predicted, what was measured."""
    lines = [
        f"{found.task}, {found.name}: {'held' if found.held else 'did not hold'}",
        f"  {found.prediction}",
    ]
    numbers = found.numbers
    if "amount" in numbers:
        lines.append("  amount  logit difference  accuracy")
        lines += [
            f"  {amount:6d}  {difference:9.3f} ±{error:6.3f}  {accuracy:8.1%}"
            for amount, difference, error, accuracy in zip(
                *(numbers[n] for n in ("amount", "logit_difference", "standard_error", "accuracy")),
                strict=True,
            )
        ]
        lines.append(
            f"  gap {numbers['gap']:.3f}, change {numbers['change']:.3f} ± "
            f"{numbers['change_error']:.3f}, ordered as predicted {numbers['ordered']:.0%}, "
            f"{numbers['prompts']} prompts"
        )
    else:
        shares = [
            f"{name.replace('_', ' ')} {numbers[name]:.1%}"
            for name in ("solved", "flipped", "flipped_by_own_mean", "restored")
            if name in numbers
        ]
        lines.append(
            f"  {numbers['node'] or 'no node'}: {', '.join(shares)}, {numbers['prompts']} prompts, "
            f"{numbers['tried']} nodes tried"
        )
    if "together" in numbers:
        shares = [
            f"{share:.1%} by {len(nodes)}"
            for nodes, share in zip(numbers["together"], numbers["flipped_together"], strict=True)
        ]
        lines.append(f"  flipped by nodes together: {', '.join(shares) or 'there are none'}")
    return "".join(f"{line}\n" for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit status: 2 after an error, 130 after Ctrl-C."""
    config = tyro.cli(
        PredictionsConfig, prog="python -m benchmarks.experiments.predictions", args=arguments
    )
    return program.status(lambda: run(config, sys.stdout))


if __name__ == "__main__":
    sys.exit(main())
