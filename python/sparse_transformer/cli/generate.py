"""`python -m sparse_transformer.generate`: continues a prompt with a trained model."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TextIO

import tyro

from sparse_transformer import program
from sparse_transformer.generation import prompt_tokens, stream_text
from sparse_transformer.run import load_run


@dataclass(frozen=True)
class GenerateConfig:
    """Continues a prompt with a trained model, token by token."""

    checkpoint: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder of a run, of a checkpoint in it or of an exported model; or the name of a model."""
    prompt: str = ""
    """Prompt; "-" reads it from standard input. Empty: the model starts a new file."""
    tokens: int = 128
    """Maximum number of tokens; generation stops earlier at the end of a file."""
    temperature: float = 0.8
    """Sampling temperature; 0 always takes the likeliest token."""
    top_k: int | None = None
    """Sample only from this many likeliest tokens."""
    seed: int = 0
    """Random seed."""
    batch: int = 1
    """Number of continuations; the first is printed while it is generated."""
    step: int | None = None
    """Step of the checkpoint; by default the newest."""
    device: str = "cpu"
    """Device: cpu, cuda, ..."""


def run(config: GenerateConfig, out: TextIO) -> None:
    """Generates as `config` says and writes to `out`, the first continuation as it grows."""
    program.need_whole("--batch", config.batch, 1)
    program.need_whole("--tokens", config.tokens, 0)
    program.need_whole("--seed", config.seed, 0)
    model, _ = load_run(config.checkpoint, config.step, config.device)
    prompt = program.read_text(config.prompt)
    ids = program.cropped(*prompt_tokens(model, prompt))
    steps = stream_text(
        model,
        [ids] * config.batch,
        config.tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        seed=config.seed,
    )
    texts = [""] * config.batch
    for number, new in enumerate(steps):
        # Only now is it known that there is nothing to refuse.
        out.write(new[0] if number else prompt + new[0])
        out.flush()
        texts = [text + more for text, more in zip(texts, new, strict=True)]
    out.write("\n")
    for row in range(1, config.batch):
        out.write(f"\n=== {row + 1} of {config.batch}\n{prompt}{texts[row]}\n")
    out.flush()


main = program.entry(GenerateConfig, "generate", lambda config: run(config, sys.stdout))
