"""`python -m sparse_transformer.evaluate`: evaluates a trained model on the binary tasks.

A prompt is right if its right answer has the larger of the two logits, a pair if both of its
prompts are. The loss is the cross-entropy over the two answers alone, in nats; random answers have
log 2 = 0.69. Pairs are drawn
independently and the two prompts of a pair are not, so all intervals, of 95 %, are about pairs.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from sparse_transformer import program
from sparse_transformer.errors import UserError
from sparse_transformer.run import load_run
from sparse_transformer.tasks import TASKS, Pair, Split, collate, get
from sparse_transformer.train.checkpoint import steps

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# A task is solved by a model that gets this share of the prompts right.
SOLVED_ACCURACY = 0.95

# Limits of one forward pass.
_BATCH_PAIRS = 64
_BATCH_TOKENS = 16384
# Normal quantile of a 95 % interval.
_Z = 1.959964


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluates a trained model on the binary tasks."""

    checkpoint: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """The folder of a training run, or of one checkpoint in it."""
    tasks: tuple[str, ...] = ()
    """Task names; by default all twenty."""
    pairs: int = 256
    """Number of prompt pairs for each task."""
    split: Split = "test"
    """The pairs of the other split share no prompt with these; circuits are found on train."""
    seed: int = 0
    """Random seed of the pairs."""
    step: int | None = None
    """The checkpoint of this step, by default the newest."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Also write the scores to this JSON file."""
    device: str = "cpu"
    """Device: cpu, cuda, ..."""


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Score:
    """How a model does a task.

    Attributes:
        accuracy: share of the prompts whose right answer has the larger logit.
        pair_accuracy: share of the pairs of which both prompts do.
        loss: mean cross-entropy over the two answers, in nats.
        pairs: how many pairs were asked.
    """

    accuracy: Interval
    pair_accuracy: Interval
    loss: Interval
    pairs: int

    @property
    def solved(self) -> bool:
        """Whether the accuracy is at least `SOLVED_ACCURACY`."""
        return self.accuracy.value >= SOLVED_ACCURACY


@torch.inference_mode()
def evaluate_task(
    model: Callable[..., Tensor],
    pairs: Sequence[Pair],
    *,
    pad: int = 0,
    device: torch.device | str = "cpu",
) -> Score:
    """Scores `model` on `pairs`.

    Args:
        model: called as `model(tokens, at=last)`, returns logits `(B, 1, V)`.
        pairs: at least 2, in any order.
        pad: a token to pad with; which one makes no difference to a causal model.
        device: where the model is.

    Raises:
        UserError: a logit is not a number.
        ValueError: fewer than 2 pairs, which have no spread.
    """
    if len(pairs) < 2:
        raise ValueError(f"a score needs at least 2 pairs, got {len(pairs)}")
    margins = torch.empty(len(pairs), 2, dtype=torch.float64)
    for places in _batches(pairs):
        batch = collate([pairs[place] for place in places], pad).to(device)
        logits = model(batch.tokens, at=batch.last)[:, 0]  # (2P, V)
        answers = torch.stack([batch.right, batch.wrong], 1)
        right, wrong = logits.gather(1, answers).double().cpu().unbind(1)
        margins[torch.tensor(places)] = (right - wrong).view(-1, 2)
    if not margins.isfinite().all():
        raise UserError("the model's logits are not finite: choose another checkpoint with --step")
    return score(margins)


def score(margins: Tensor) -> Score:
    """The score of logit differences, right minus wrong, float64 `(P, 2)`."""
    P = margins.shape[0]
    right = (margins > 0).double()
    losses = torch.nn.functional.softplus(-margins).mean(1)  # (P,)
    mean, spread = float(losses.mean()), float(losses.std())
    half = _Z * spread / math.sqrt(P)
    return Score(
        accuracy=_share(right.mean(1)),
        pair_accuracy=_share(right.prod(1)),
        loss=Interval(mean, max(0.0, mean - half), mean + half),
        pairs=P,
    )


def _share(shares: Tensor) -> Interval:
    """The mean of `shares`, `(P,)` of independent values in [0, 1], with Wilson's interval.

    Wilson's is that of independent yes-or-no draws. How many of these P shares are worth follows
    from their spread: P where the two prompts of a pair are right or wrong together, 2 P where they
    have nothing to do with each other; never fewer or more.
    """
    P = shares.shape[0]
    p = float(shares.mean())
    variance = float(shares.var())
    worth = 0.0
    if 0 < p < 1:
        worth = p * (1 - p) / variance if variance > 0 else 2.0
    n = P * min(2.0, max(1.0, worth))
    center = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    return Interval(p, min(p, max(0.0, center - half)), max(p, min(1.0, center + half)))


def _batches(pairs: Sequence[Pair]) -> Iterator[list[int]]:
    """Places of pairs of similar length: at most `_BATCH_PAIRS`, or `_BATCH_TOKENS` if padded."""
    lengths = [max(len(pair.positive.tokens), len(pair.negative.tokens)) for pair in pairs]
    batch: list[int] = []
    for place in sorted(range(len(pairs)), key=lengths.__getitem__):
        # The next one is the longest so far.
        full = len(batch) == _BATCH_PAIRS
        if batch and (full or 2 * (len(batch) + 1) * lengths[place] > _BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(place)
    yield batch


def run(config: EvaluateConfig, out: TextIO) -> None:
    """Evaluates as `config` says and writes the table to `out`.

    Raises:
        UserError: an unknown task, a number that does not fit, what `load_run` refuses, or a file
            that cannot be written. A task that this tokenizer or context cannot ask is a row.
    """
    chosen = [get(name) for name in dict.fromkeys(config.tasks)] or list(TASKS.values())
    program.need_whole("--pairs", config.pairs, 2)
    model, tokenizer = load_run(config.checkpoint, config.step, config.device)
    rows = [["task", "accuracy", "pairs right", "loss, nats", "pairs", "answers", "solved"]]
    results: dict[str, Any] = {}
    solved = asked = 0
    for task in tqdm(chosen, "tasks", unit=" tasks", disable=None, leave=False):
        try:
            pairs = task.pairs(
                tokenizer,
                config.pairs,
                split=config.split,
                seed=config.seed,
                context=model.config.context,
            )
        except UserError as refusal:
            rows.append([task.name, *"-----", str(refusal)])
            results[task.name] = {"refused": str(refusal)}
            continue
        result = evaluate_task(model, pairs, pad=model.config.vocab_size - 1, device=config.device)
        asked += task.shortcut is None
        solved += result.solved and task.shortcut is None
        rows.append(
            [
                task.name,
                str(result.accuracy),
                str(result.pair_accuracy),
                str(result.loss),
                str(result.pairs),
                _answers(pairs, tokenizer),
                "solved" if result.solved else "no",
            ]
        )
        results[task.name] = {**dataclasses.asdict(result), "solved": result.solved}
    out.write(program.table(rows, left=len(rows[0])))
    left_out = ", ".join(task.name for task in chosen if task.shortcut)
    out.write(
        f"{solved} of the {asked} asked are solved: at least {SOLVED_ACCURACY:.0%} of the prompts "
        f"are right{left_out and f' (without {left_out}, which the last tokens decide)'}\n"
    )
    out.flush()
    if config.json is not None:
        _save(config, results)


def _answers(pairs: Sequence[Pair], tokenizer: Tokenizer) -> str:
    """The two answers, or how many different ones there are."""
    prompts = [prompt for pair in pairs for prompt in (pair.positive, pair.negative)]
    answers = dict.fromkeys(prompt.right for prompt in prompts)
    if len(answers) > 2:
        return f"{len(answers)} kinds"
    return " ".join(repr(tokenizer.decode([answer])) for answer in answers)


def _save(config: EvaluateConfig, results: dict[str, Any]) -> None:
    assert config.json is not None
    content = {
        "checkpoint": str(config.checkpoint),
        "step": _step(config),
        "split": config.split,
        "seed": config.seed,
        "solved_accuracy": SOLVED_ACCURACY,
        "tasks": results,
    }
    program.write_json(config.json, content)


def _step(config: EvaluateConfig) -> int:
    """Of the checkpoint that was read."""
    if config.step is not None:
        return config.step
    available = steps(config.checkpoint)
    return available[-1] if available else int(config.checkpoint.name.removeprefix("step-"))


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit status: 2 after an error, 130 after Ctrl-C."""
    config = tyro.cli(EvaluateConfig, prog="python -m sparse_transformer.evaluate", args=arguments)
    return program.status(lambda: run(config, sys.stdout))


if __name__ == "__main__":
    sys.exit(main())
