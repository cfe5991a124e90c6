"""`python -m sparse_transformer.bridges --checkpoint DIR --dense DIR`: steers one by the other."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, TextIO

import torch
import tyro
from torch import Tensor
from torch.nn.functional import pad

from sparse_transformer import program, tasks
from sparse_transformer.bridges.bridge import fit, losses, site_name
from sparse_transformer.bridges.steering import choose, find, flips
from sparse_transformer.errors import UserError
from sparse_transformer.run import corpus_sample, load_run

# Every so many windows one is held out.
_HELD_OUT = 16
_TASKS = ("single_double_quote", "lambda_func")


@dataclass(frozen=True)
class BridgesConfig:
    """Fits linear maps between the residual streams of a sparse and a dense model, and steers the
    dense model by edits of a few channels of the sparse one."""

    checkpoint: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """The sparse model: the folder of a training run or checkpoint, or the name of a model."""
    dense: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """The dense model, with the same tokenizer and as many layers."""
    tasks: tuple[str, ...] = _TASKS
    """Tasks whose answers are to flip, at least two, which both models should solve."""
    channels: int = 8
    """How many channels an edit changes."""
    steps: int = 100
    """Training steps of the maps, after least squares."""
    pairs: int = 128
    """Held-out pairs of prompts of each task."""
    tokens: int = 64
    """Tokens of a window of the corpus, and at most of a prompt."""
    train_pairs: int = 32
    """Pairs of prompts of each task to train the maps and to find the edits on."""
    step: int | None = None
    """The sparse model's checkpoint of this step, by default the newest."""
    data: tuple[Path, ...] = ()
    """Files to train the maps on; by default the model's sample, or its training files."""
    cache_dir: Path | None = None
    """Folder for tokenized corpora."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Also write the result to this JSON file."""


def run(config: BridgesConfig, out: TextIO) -> None:
    """Does what `config` says and writes a report to `out`."""
    chosen = [tasks.get(name) for name in dict.fromkeys(config.tasks)]
    if len(chosen) < 2:
        raise UserError("one task has no other to compare with: give at least two --tasks")
    program.need_writable("--json", config.json)
    sparse, tokenizer = load_run(config.checkpoint, config.step)
    dense, other = load_run(config.dense)
    if other.to_str() != tokenizer.to_str() or dense.config.n_layer != sparse.config.n_layer:
        raise UserError(
            f"{config.checkpoint} and {config.dense} differ in their tokenizer or their number of "
            "layers: train both on one --data with one --n-layer"
        )
    T = config.tokens
    contexts = dense.config.context, sparse.config.context
    for option, value, least, most in (
        ("--channels", config.channels, 1, sparse.config.d_model // 2),
        ("--steps", config.steps, 0, 10**6),
        ("--pairs", config.pairs, 2, 10**5),
        ("--train-pairs", config.train_pairs, 2, 10**4),
        ("--tokens", T, 2, min(contexts)),
    ):
        program.need_whole(option, value, least, most)
    splits: dict[tasks.Split, int] = {"train": config.train_pairs, "test": config.pairs}
    asked: dict[str, list[tasks.Batch]] = {}
    for task in chosen:
        for split, count in splits.items():
            pairs = task.pairs(tokenizer, count, split=split, context=T)
            batch = tasks.collate(pairs, sparse.config.vocab_size - 1)
            asked.setdefault(task.name, []).append(batch)
    rows = corpus_sample(config.checkpoint, sparse, data=config.data, cache_dir=config.cache_dir)
    rows = rows[:, : rows.shape[1] // T * T].reshape(-1, T)
    held_out = torch.arange(len(rows)) % _HELD_OUT == 0
    dense.requires_grad_(False)
    sparse.requires_grad_(False)
    tokens, keep = _with_prompts(rows[~held_out], [train for train, _ in asked.values()])
    bridge = fit(dense, sparse, tokens, keep, steps=config.steps)
    windows = rows[held_out]
    with torch.no_grad():
        whole = torch.ones_like(windows).bool()
        nmse, kl = losses(bridge, dense, sparse, windows, whole, range(len(bridge.encoders)))
    report: dict[str, Any] = {
        "checkpoint": config.checkpoint.name,
        "dense": config.dense.name,
        "steps": config.steps,
        "nmse": nmse.tolist(),
        "kl": kl.tolist(),
        "tasks": {},
    }
    # The last token is the same in both prompts: before the first sublayer nothing differs.
    sites = range(1, len(bridge.decoders))
    edits = {
        name: {site: find(sparse, train, site, config.channels) for site in sites}
        for name, (train, _) in asked.items()
    }
    for name, (train, test) in asked.items():
        others = [found for other, found in edits.items() if other != name]
        best = choose(dense, bridge, train, edits[name], others)
        values = edits[name][best.site].values
        measured = {
            kind: flips(dense, test, best.site, changes, best.strength)
            for kind, changes in best.changes.items()
        }
        measured["edit, sparse model"] = flips(sparse, test, best.site, values, best.strength)
        channels = values[0].nonzero().flatten().tolist()
        report["tasks"][name] = {
            "site": site_name(best.site),
            "strength": best.strength,
            "channels": {channel: float(values[0, channel]) for channel in channels},
            "pairs": config.pairs,
            "flipped": {kind: asdict(interval) for kind, interval in measured.items()},
        }
    if config.json is not None:
        program.write_json(config.json, report)
    out.write(text(report))
    out.flush()


def _with_prompts(rows: Tensor, batches: Sequence[tasks.Batch]) -> tuple[Tensor, Tensor]:
    """Windows and prompts, `(R, T)`, and where they are no padding."""
    T = rows.shape[1]
    tokens, keep = [rows], [torch.ones_like(rows).bool()]
    for batch in batches:
        tokens.append(pad(batch.tokens, (0, T - batch.tokens.shape[1])))
        keep.append(torch.arange(T) <= batch.last[:, None])
    return torch.cat(tokens), torch.cat(keep)


def text(report: dict[str, Any]) -> str:
    """Two tables: the maps, and the answers that flip."""
    rows = [["before", "NMSE to sparse", "NMSE to dense", "KL by sparse", "KL by dense"]]
    for site, values in enumerate(zip(*report["nmse"], *report["kl"], strict=True)):
        rows.append([site_name(site), *(f"{value:.3f}" for value in values)])
    found = program.table(rows)
    rows = []
    for name, result in report["tasks"].items():
        flipped = result["flipped"]
        rows = rows or [["task", "before", "strength", *flipped]]
        shares = [f"{s['value']:.1%} [{s['low']:.1%}, {s['high']:.1%}]" for s in flipped.values()]
        rows.append([name, result["site"], f"{result['strength']:g}", *shares])
    return f"{found}\nanswers of the dense model that flip\n{program.table(rows)}"


main = program.entry(BridgesConfig, "bridges", lambda config: run(config, sys.stdout))


if __name__ == "__main__":
    sys.exit(main())
