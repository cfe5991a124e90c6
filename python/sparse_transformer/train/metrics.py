"""What a run reports: metrics.jsonl, TensorBoard, and a plot of the losses."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from sparse_transformer.errors import UserError, writing

_ADVICE = "free some space or make the folder writable, then continue with --resume"


class Metrics:
    """Lines of `metrics.jsonl`, each with `step` and `loss`, and the same in TensorBoard.

    Args:
        position: bytes of `metrics.jsonl` that are kept, what follows is cut off; the position of
            the checkpoint from which the run resumes.
        step: the step of that checkpoint, 0 at the start.

    Raises:
        UserError: the file is shorter than `position`, or cannot be written, then or later.
    """

    def __init__(self, folder: Path, position: int, step: int, *, tensorboard: bool) -> None:
        path = folder / "metrics.jsonl"
        with writing(path, _ADVICE):
            size = path.stat().st_size if path.exists() else 0
            if size < position:
                raise UserError(
                    f"{path} has {size} bytes and the checkpoint was written after {position}: "
                    f"restore the file that belongs to it"
                )
            self._file = open(path, "ab")  # noqa: SIM115
            self._file.truncate(position)
            self._file.seek(position)
        self._path = path
        self._events: Any = None
        if tensorboard:
            # Slow to import.
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(
                str(folder / "tensorboard"), purge_step=step + 1 if step else None
            )

    def write(self, line: dict[str, Any]) -> None:
        """Adds a line; it is in the file, though not yet on the disk, when this returns."""
        with writing(self._path, _ADVICE):
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()
        if self._events is not None:
            for name, value in line.items():
                if name != "step":
                    self._events.add_scalar(name, value, line["step"])

    def position(self) -> int:
        """Bytes written, all of them on the disk when this returns."""
        with writing(self._path, _ADVICE):
            os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        if self._events is not None:
            self._events.close()


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a last one that is not complete is left out."""
    content = Path(path).read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    return [json.loads(line) for line in complete.splitlines()]


def plot(
    lines: list[dict[str, Any]], path: Path, title: str, *, annealed: int | None = None
) -> None:
    """Draws training loss (thin), its running mean, and validation loss over the steps.

    Args:
        lines: of `read`.
        annealed: the step with which L0 reaches its target, which is marked.
    """
    # Without pyplot, which would look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    steps = np.array([line["step"] for line in lines])
    losses = np.array([line["loss"] for line in lines])
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=0.8)
    width = max(1, len(losses) // 50)
    if len(losses) >= width:
        mean = np.convolve(losses, np.ones(width) / width, "valid")
        axes.plot(steps[width - 1 :], mean, color="tab:blue", label=f"training, mean of {width}")
    checked = [(line["step"], line["val_loss"]) for line in lines if "val_loss" in line]
    if checked:
        axes.plot(
            *zip(*checked, strict=True),
            "o-",
            color="tab:orange",
            label="validation, on files that are not trained on",
        )
    if annealed is not None and annealed <= steps[-1]:
        axes.axvline(
            annealed, color="gray", linestyle="--", linewidth=0.8, label="L0 reaches its target"
        )
    axes.set(xlabel="step", ylabel="loss, nats per token", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    with writing(path, _ADVICE):
        figure.savefig(path, dpi=120)
