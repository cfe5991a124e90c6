"""A run from its first step, or its last checkpoint, to its end; and the files that it leaves.

A run lies in one folder: `config.json`, `tokenizer.json`, `metrics.jsonl` (a line per step),
`step-*/` (checkpoints), `tensorboard/` and `loss.png`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm import tqdm

from sparse_transformer import program
from sparse_transformer.data import Corpus, prepare
from sparse_transformer.errors import UserError, writing
from sparse_transformer.files import write_atomically
from sparse_transformer.tokenizer import load_tokenizer
from sparse_transformer.train import checkpoint, metrics
from sparse_transformer.train.checkpoint import Checkpoint
from sparse_transformer.train.distributed import ranks
from sparse_transformer.train.settings import Settings
from sparse_transformer.train.topology import annealed_after
from sparse_transformer.train.trainer import Diverged, Progress, Trainer


def train(settings: Settings, out: Path, *, from_step: int | None = None) -> int:
    """Trains from the newest checkpoint in `out`, or from the beginning if there is none.

    Args:
        settings: of the run; they must agree with the checkpoint's model and corpus.
        out: the folder of the run.
        from_step: go on from the checkpoint of that step instead; later ones are set aside.

    Returns:
        0, or 128 + the signal that ended it (after saving a checkpoint): 130 for Ctrl-C.

    Raises:
        UserError: what was written before is unharmed.
    """
    config = settings.train
    if config.tensorboard and find_spec("tensorboard") is None:
        # Known before anything is written.
        raise UserError("tensorboard is not installed: pip install it, or give --no-tensorboard")
    with ranks(config.device, config.rank_timeout) as here, contextlib.ExitStack() as stack:
        if here.first:
            stack.enter_context(_claim(out))
        here.wait()
        tokenizer = None
        if config.start_from is not None:
            begun = out if checkpoint.steps(out) else checkpoint.find(config.start_from)
            tokenizer = load_tokenizer(checkpoint.tokenizer_of(begun))
        corpus = prepare(
            config.data or None,
            vocab_size=settings.model.vocab_size,
            tokenizer=tokenizer,
            cache_dir=config.cache_dir,
            progress=None if here.first else False,
        )
        point = None
        if checkpoint.steps(out):
            point = checkpoint.load(out, from_step, option="--from-step")
            _check_same(settings, corpus, point)
        elif from_step is not None:
            raise UserError(f"there is no checkpoint in {out}: leave out --from-step")
        trainer = Trainer(settings, corpus, here, point)
        here.wait()
        signals = stack.enter_context(_Signals())
        output, l0 = None, trainer.l0()
        if here.first:
            if point is not None:
                checkpoint.set_aside(out, point.step)
            write_atomically(out / "config.json", json.dumps(settings.to_dict(), indent=1) + "\n")
            text = (corpus.folder / "tokenizer.json").read_text(encoding="utf-8")
            write_atomically(out / "tokenizer.json", text)
            output = _Output(trainer, out, point, l0)
            stack.callback(output.close)
        status = _loop(trainer, signals, out, output)
        # Who leaves early takes the connection of the others with it.
        here.wait()
        return status


def _loop(trainer: Trainer, signals: _Signals, out: Path, output: _Output | None) -> int:
    """Steps until the end or until any rank is told to stop; `output` is that of the first rank."""
    config = trainer.settings.train
    while trainer.step < config.steps:
        try:
            line: dict[str, Any] = {"step": trainer.step + 1, **trainer.advance()}
            last = trainer.step == config.steps
            if last or trainer.step % config.validate_every == 0:
                line["val_loss"] = trainer.validate()
                if not math.isfinite(line["val_loss"]):
                    raise Diverged(f"the validation loss of step {trainer.step} is not finite")
            stop = trainer.agree(signals.received)
            if output is not None:
                output.write(line)
            if last or stop or trainer.step % config.save_every == 0:
                tensors, meta = trainer.state()
                if output is not None:
                    output.save(tensors, meta)
        except Diverged as error:
            raise Diverged(_way_back(error, out)) from error
        if stop:
            if output is not None:
                output.note(f"stopped after step {trainer.step}, saved; continue with --resume")
            return 128 + stop
    if output is not None:
        output.finish()
    return 0


class _Signals:
    """Inside, Ctrl-C and SIGTERM are remembered; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number


class _Output:
    """Files and progress bar of the first rank."""

    def __init__(self, trainer: Trainer, out: Path, point: Checkpoint | None, l0: int) -> None:
        self._trainer, self._out = trainer, out
        self._saved = point.step if point else 0
        config = trainer.settings.train
        self._metrics = metrics.Metrics(
            out,
            point.meta["metrics_position"] if point else 0,
            self._saved,
            tensorboard=config.tensorboard,
        )
        self._seconds_before = point.meta["seconds"] if point else 0.0
        self._start = time.monotonic()
        self._bar = tqdm(
            total=config.steps * config.batch_tokens,
            initial=trainer.step * config.batch_tokens,
            unit=" tokens",
            unit_scale=True,
            disable=None,
            dynamic_ncols=True,
        )
        others = sum(
            parameter.numel()
            for name, parameter in trainer.model.named_parameters()
            if parameter.dim() == 1 or name in ("bigram", "positions")
        )
        corpus = trainer.corpus
        skipped = f" ({corpus.skipped} that are not UTF-8 text skipped)" if corpus.skipped else ""
        self.note(
            f"{out}: {trainer.settings.model.linear}, {l0:,} weights in the matrices now and "
            f"{others:,} other parameters (bigram table, biases, norms)"
        )
        self.note(
            f"{corpus.files:,} files{skipped}, {len(corpus.train):,} tokens to train on and "
            f"{len(corpus.validation):,} of other files to validate, cached in {corpus.folder}"
            + (f"; from step {point.step}" if point else "")
        )
        self._busy_noted = False
        self._note_busy()

    def note(self, text: str) -> None:
        """A line on stderr, above the bar."""
        tqdm.write(program.printable(text), file=sys.stderr)

    def write(self, line: dict[str, Any]) -> None:
        """Reports a step."""
        line["seconds"] = round(self._seconds(), 3)
        self._metrics.write(line)
        self._bar.set_postfix(step=line["step"], loss=f"{line['loss']:.3f}", refresh=False)
        self._bar.update(self._trainer.settings.train.batch_tokens)
        if "val_loss" in line:
            self.note(
                f"step {line['step']}  loss {line['loss']:.4f}  val_loss {line['val_loss']:.4f}  "
                f"L0 {line['l0']:,}  {line['tokens']:,} tokens  {line['seconds']:.0f} s"
            )
            sample = self._trainer.sample()
            if sample:
                self.note(f"  sample: {sample!r}")
            self._note_busy()

    def save(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Writes a checkpoint of the step that is done, with the trainer's state."""
        step = self._trainer.step
        meta["metrics_position"] = self._metrics.position()
        meta["seconds"] = self._seconds()
        checkpoint.save(self._out, step, tensors, meta, keep=self._trainer.settings.train.keep)
        self._saved = step

    def finish(self) -> None:
        """The plot."""
        lines = metrics.read(self._out / "metrics.jsonl")
        name = f"{self._trainer.settings.preset}, {self._trainer.settings.model.linear}"
        if lines:
            metrics.plot(lines, self._out / "loss.png", name, annealed=self._trainer.annealed_after)
            self.note(f"done: {self._out / 'loss.png'}, checkpoint of step {self._saved}")

    def _note_busy(self) -> None:
        """Says once that threads wait for processors that others use."""
        threads, processors = torch.get_num_threads(), os.cpu_count() or 1
        waiting = os.getloadavg()[0] > processors + 0.5
        on_cpu = self._trainer.ranks.device.type == "cpu"
        if waiting and threads > 1 and not self._busy_noted and on_cpu:
            self._busy_noted = True
            self.note(
                f"note: the machine is busy (load {os.getloadavg()[0]:.1f} on {processors} "
                f"processors), where {threads} threads may be slower than one: try "
                f"OMP_NUM_THREADS=1, or OMP_WAIT_POLICY=passive"
            )

    def close(self) -> None:
        self._bar.close()
        self._metrics.close()

    def _seconds(self) -> float:
        return float(self._seconds_before + time.monotonic() - self._start)


def _way_back(error: Diverged, out: Path) -> str:
    available = checkpoint.steps(out)
    if not available:
        return (
            f"{error}, and there is no checkpoint yet: start again in another folder with a lower "
            f"--learning-rate"
        )
    return (
        f"{error}: the last good checkpoint is {checkpoint.folder_of(out, available[-1])}, go on "
        f"from it with --resume and a lower --learning-rate"
    )


def _check_same(settings: Settings, corpus: Corpus, point: Checkpoint) -> None:
    """Refuses to continue a different run."""
    if point.meta.get("exported"):
        raise UserError(
            f"{point.path} is an exported model, without the state of its training: continue the "
            f"run that it comes from"
        )
    with checkpoint.damage_named(point.path, "--from-step"):
        progress = Progress.of(point)
    saved = progress.settings
    # These say how something is computed, not what.
    model = replace(settings.model, backend=saved.model.backend, abs_topk=saved.model.abs_topk)
    _refuse_changes(point, "model", saved.model, model)
    _refuse_changes(point, "topology", saved.topology, settings.topology)
    if progress.corpus != corpus.key:
        raise UserError(
            f"{point.path} was trained on other files: give --data what it began with, or start "
            f"a new run with another --out"
        )
    ends = annealed_after(progress.anneal_steps, settings.topology.anneal_share)
    anneals = settings.model.linear == "masked_dense" or (
        settings.model.linear == "sparse" and settings.topology.start_multiple > 1
    )
    if saved.train.steps != settings.train.steps and anneals and point.step <= ends:
        raise UserError(
            f"{point.path} is still annealing, as a run of {saved.train.steps} steps does until "
            f"step {ends + 1}: leave out --steps, and change it when annealing is over"
        )


def _refuse_changes(point: Checkpoint, kind: str, saved: Any, now: Any) -> None:
    changed = [name for name in vars(saved) if getattr(saved, name) != getattr(now, name)]
    if changed:
        was = ", ".join(f"{name} {getattr(saved, name)}" for name in changed)
        wanted = ", ".join(f"{name} {getattr(now, name)}" for name in changed)
        raise UserError(
            f"{point.path} has another {kind}, {was} and not {wanted}: leave those options out, or "
            f"start a new run with another --out"
        )


@contextlib.contextmanager
def _claim(out: Path) -> Iterator[None]:
    """Makes the folder, and keeps other runs out of it for as long as this process lives.

    What it made goes again if nothing is written there meanwhile.
    """
    lock = out / ".lock"
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    with writing(out, "choose another --out"):
        out.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(lock, timeout=0):
                try:
                    yield
                finally:
                    if os.listdir(out) == [lock.name]:
                        lock.unlink()
                        for folder in made:
                            folder.rmdir()
        except Timeout as error:
            raise UserError(
                f"another process is training in {out}: wait for it or choose another --out"
            ) from error
