"""`python -m sparse_transformer.generate`: continues a prompt with a trained model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import torch
import tyro
from tokenizers.decoders import DecodeStream

from sparse_transformer import program
from sparse_transformer.generation import prompt_tokens, stream
from sparse_transformer.run import load_run

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class GenerateConfig:
    """Continues a prompt with a trained model, token by token."""

    checkpoint: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """The folder of a training run, or of one checkpoint in it."""
    prompt: str = ""
    """Prompt; "-" reads it from standard input. Empty: the model starts a new file. Of a prompt
    that is longer than the context only the end is read."""
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


class _Text:
    """The text of a growing list of tokens; a character whose bytes are not all there waits."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._waiting: list[int] = []

    def add(self, token: int) -> str:
        """What can be shown now and could not before."""
        self._waiting.append(token)
        new = self._stream.step(self._tokenizer, token)
        if new is None:
            return ""
        self._waiting.clear()
        return str(new)

    def rest(self) -> str:
        """What is left at the end, whole or not."""
        return str(self._tokenizer.decode(self._waiting))


def run(config: GenerateConfig, out: TextIO) -> None:
    """Generates as `config` says and writes to `out`, the first continuation as it grows.

    Raises:
        UserError: a checkpoint that cannot be read, a tokenizer that does not belong to it, or what
            `generate` refuses.
    """
    program.need_whole("--batch", config.batch, 1)
    program.need_whole("--tokens", config.tokens, 0)
    program.need_whole("--seed", config.seed, 0)
    model, tokenizer = load_run(config.checkpoint, config.step, config.device)
    generator = torch.Generator(model.norm.weight.device).manual_seed(config.seed)
    prompt = program.read_text(config.prompt)
    end = model.config.vocab_size - 1
    ids = program.cropped(*prompt_tokens(model, prompt))
    steps = stream(
        model,
        [ids] * config.batch,
        config.tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        generator=generator,
    )
    texts = [_Text(tokenizer) for _ in range(config.batch)]
    others = [""] * config.batch
    ended = [False] * config.batch
    for number, step in enumerate(steps):
        if number == 0:
            # Only now is it known that there is nothing to refuse.
            out.write(prompt)
        for row, token in enumerate(step):
            ended[row] = ended[row] or token == end
            if token is not None and not ended[row]:
                others[row] += (new := texts[row].add(token))
                if row == 0:
                    out.write(new)
                    out.flush()
        if all(ended):
            break
    out.write(texts[0].rest() + "\n")
    for row in range(1, config.batch):
        out.write(f"\n=== {row + 1} of {config.batch}\n{prompt}{others[row]}{texts[row].rest()}\n")
    out.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit status: 2 after an error, 130 after Ctrl-C."""
    config = tyro.cli(GenerateConfig, prog="python -m sparse_transformer.generate", args=arguments)
    return program.status(lambda: run(config, sys.stdout))
