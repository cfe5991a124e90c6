"""Settings of a training run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sparse_transformer.config import ModelConfig
from sparse_transformer.ranges import need_choices, need_number, need_whole
from sparse_transformer.train.optimizer import OptimizerConfig
from sparse_transformer.train.topology import TopologyConfig


@dataclass(frozen=True)
class TrainConfig:
    """Training settings other than model, topology and optimizer.

    A value that does not fit raises a ValueError that names it.
    """

    steps: int = 1000
    """Total number of optimizer steps, including those before --resume."""
    batch_tokens: int = 32768
    """Tokens per step, over all ranks and accumulated parts."""
    accumulate: int = 1
    """Gradient accumulation steps on each rank; more of them need less memory."""
    data: tuple[Path, ...] = ()
    """Files and folders to train on; by default the standard library of the running Python."""
    task_pairs: int = 0
    """Pairs of task prompts that each step also learns; evaluation asks others."""
    tasks: tuple[str, ...] = ()
    """Names of the tasks of --task-pairs; by default all twenty."""
    start_from: Path | None = None
    """Begin with the weights and tokenizer of this run or model; larger fans and positions add."""
    bigram_start: Literal["counts", "zero"] = "counts"
    """The bigram table starts as frequencies in the training text, or at zero as published."""
    cache_dir: Path | None = None
    """Folder for tokenized corpora; by default sparse_transformer in XDG_CACHE_HOME or ~/.cache."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device; auto uses a GPU if there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of activations (autocast); parameters stay float32. float16 needs a GPU."""
    seed: int = 0
    """Random seed of the initial weights and the batches."""
    compile: bool = False
    """Use torch.compile; a sparse model is compiled once its fan-in no longer changes."""
    clip_only: bool = False
    """Divide gradients by max(RMS, 1), as in the paper, instead of by the RMS, as released."""
    projection: Literal["select", "topk"] = "select"
    """How masked_dense selects its largest weights: select is faster, topk is as released."""
    validate_every: int = 100
    """Steps between validations; the last step is always validated."""
    validation_tokens: int = 131072
    """Number of validation tokens; they are the same in every validation."""
    save_every: int = 200
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 3
    """Number of checkpoints to keep."""
    max_rise: float = 3.0
    """Stop if the smoothed loss rises this many nats above its minimum; 1e9 never stops."""
    shard: bool = False
    """Shard the state of a dense or masked_dense model over the ranks to save memory."""
    rank_timeout: float = 600.0
    """Seconds to wait for another rank before giving up."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    sample_tokens: int = 32
    """Tokens of generated text shown at each validation, by a single rank; 0 shows none."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", tuple(Path(path) for path in self.data))
        object.__setattr__(self, "tasks", tuple(self.tasks))
        for name in ("cache_dir", "start_from"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, Path(getattr(self, name)))
        for name in (
            "steps", "batch_tokens", "accumulate", "validate_every", "validation_tokens",
            "save_every", "keep",
        ):  # fmt: skip
            need_whole(self, name, 1)
        need_whole(self, "sample_tokens", 0)
        need_whole(self, "task_pairs", 0, 2**16)
        need_whole(self, "seed", 0, 2**63 - 1)
        need_choices(self)
        # A limit that no loss reaches: 1e9. Longer waits overflow the clocks below.
        need_number(self, "max_rise", 0, math.inf, above=True)
        need_number(self, "rank_timeout", 0, 1e7, above=True)


@dataclass(frozen=True)
class Settings:
    """All settings of a run except its folder and whether it is resumed."""

    preset: str = "tiny"
    train: TrainConfig = field(default_factory=TrainConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    topology: TopologyConfig = field(default_factory=TopologyConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        settings = dataclasses.asdict(self)
        train = settings["train"]
        train["data"] = [str(path.resolve()) for path in self.train.data]
        for name in ("cache_dir", "start_from"):
            train[name] = str(train[name]) if train[name] else None
        return settings

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Settings:
        """The inverse of `to_dict`; a KeyError, TypeError or ValueError for other settings."""
        return cls(
            preset=stored["preset"],
            train=TrainConfig(**stored["train"]),
            model=ModelConfig.from_dict(stored["model"]),
            topology=TopologyConfig(**stored["topology"]),
            optimizer=OptimizerConfig(**stored["optimizer"]),
        )
