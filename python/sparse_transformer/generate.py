"""`python -m sparse_transformer.generate`: continues a prompt with a trained model.

Each token costs one forward of one position: keys and values of earlier ones are kept. When the
context is full, its later half is read again and generation continues.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import torch
import tyro
from torch import Tensor

from sparse_transformer import program
from sparse_transformer.attention import KVCache
from sparse_transformer.errors import UserError
from sparse_transformer.model import Transformer
from sparse_transformer.run import load_run

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class GenerateConfig:
    """Continues a prompt with a trained model, token by token."""

    checkpoint: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """The folder of a training run, or of one checkpoint in it."""
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


@torch.inference_mode()
def generate(
    model: Transformer,
    prompt: Tensor,
    tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Yields the next token of every sequence, `tokens` times.

    Args:
        model: the model, whose weights' device and dtype the cache takes.
        prompt: int64 `(B, P)`, P from 1 to `model.config.context`.
        tokens: how many times.
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: choose among this many likeliest tokens only.
        generator: of the model's device; by default torch's global one.

    Yields:
        int64 `(B,)`.

    Raises:
        UserError: a prompt that is longer than the context or empty, or a number that does not fit.
    """
    B, P = prompt.shape
    context = model.config.context
    if not 1 <= P <= context:
        raise UserError(
            f"the prompt has {P} tokens, and the model reads 1 to {context}: "
            f"{'shorten it' if P else 'give at least one'}"
        )
    if tokens < 0 or B < 1:
        raise UserError(f"nothing can be generated for --tokens {tokens} --batch {B}: choose more")
    if not 0 <= temperature < float("inf"):
        raise UserError(f"the temperature must be 0 or more, got {temperature}: change it")
    if top_k is not None and top_k < 1:
        raise UserError(f"top-k must be at least 1, got {top_k}: change it or leave it out")
    weight = model.norm.weight
    cache = KVCache(model.config, B, device=weight.device, dtype=weight.dtype)
    # The last `context` tokens, read again when the cache is full.
    seen = prompt
    unread = prompt
    for _ in range(tokens):
        if cache.length + unread.shape[1] > context:
            cache.reset()
            unread = seen[:, -max(1, context // 2) :]
        logits = model(unread, cache, last_only=True)[:, -1]
        chosen = _choose(logits, temperature, top_k, generator)
        yield chosen
        unread = chosen[:, None]
        seen = torch.cat([seen, unread], 1)[:, -context:]


def _choose(
    logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None
) -> Tensor:
    """`(B, V)` to `(B,)`."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is None or top_k >= logits.shape[-1]:
        return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
    largest, places = logits.topk(top_k, -1)
    drawn = torch.multinomial(largest.softmax(-1), 1, generator=generator)
    return places.gather(1, drawn).squeeze(1)


class _Text:
    """The text of a growing list of tokens; a character whose bytes are not all there waits."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._done = ""

    def add(self, token: int) -> str:
        """What can be shown now and could not before."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        return self._advance(text)

    def rest(self) -> str:
        """What is left at the end, whole or not."""
        return self._advance(self._tokenizer.decode(self._ids))

    def _advance(self, text: str) -> str:
        new = text[len(self._done) :]
        self._done = text
        return new


def run(config: GenerateConfig, out: TextIO) -> None:
    """Generates as `config` says and writes to `out`, the first continuation as it grows.

    Raises:
        UserError: a checkpoint that cannot be read, a tokenizer that does not belong to it, or what
            `generate` refuses.
    """
    if config.batch < 1:
        raise UserError(f"--batch must be at least 1, got {config.batch}: choose more")
    model, tokenizer = load_run(config.checkpoint, config.step, config.device)
    device = model.norm.weight.device
    generator = torch.Generator(device).manual_seed(config.seed)
    prompt = sys.stdin.read() if config.prompt == "-" else config.prompt
    end = model.config.vocab_size - 1
    # After the end of a file begins the next one.
    ids = tokenizer.encode(prompt).ids or [end]
    steps = generate(
        model,
        torch.tensor([ids], device=device).expand(config.batch, -1),
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
        for row, token in enumerate(step.tolist()):
            ended[row] = ended[row] or token == end
            if not ended[row]:
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
    config = tyro.cli(GenerateConfig, prog="sparse_transformer.generate", args=arguments)
    return program.status(lambda: run(config, sys.stdout))


if __name__ == "__main__":
    sys.exit(main())
