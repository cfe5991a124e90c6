"""Continuing prompts with a model.

Each token costs one forward of one position: keys and values of earlier ones are kept. When the
context is full, its later half is read again and generation continues.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from torch import Tensor

from sparse_transformer.attention import KVCache
from sparse_transformer.errors import UserError
from sparse_transformer.model import Transformer
from sparse_transformer.tokenizer import END_OF_TEXT, encode

# Below this temperature the likeliest token is certain, and a quotient may overflow.
_COLDEST = 1e-8


def generate(
    model: Transformer,
    prompts: str | Sequence[str],
    tokens: int = 128,
    *,
    temperature: float = 0.8,
    top_k: int | None = None,
    seed: int = 0,
) -> list[str]:
    """Continues each prompt by up to `tokens` tokens, all of them in one batch.

    Args:
        model: of `load_model`, which gives it its tokenizer.
        prompts: one or more; an empty one begins a file. Of a longer one than the context only the
            end is read.
        tokens: at most so many for each; a continuation also ends with its file.
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: choose among this many likeliest tokens only.
        seed: of the choices.

    Returns:
        The continuations, without the prompts.

    Raises:
        UserError: a number that does not fit, or a text that is not UTF-8.
        ValueError: the model has no tokenizer.
    """
    given = [prompts] if isinstance(prompts, str) else prompts
    ids = [prompt_tokens(model, prompt)[0] for prompt in given]
    texts = [""] * len(ids)
    for new in stream_text(model, ids, tokens, temperature=temperature, top_k=top_k, seed=seed):
        texts = [text + more for text, more in zip(texts, new, strict=True)]
    return texts


def stream_text(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    *,
    temperature: float,
    top_k: int | None,
    seed: int,
) -> Iterator[list[str]]:
    """Yields what each continuation grows by; a character whose bytes are not all there waits.

    Arguments and errors are those of `generate`; `prompts` as for `stream`.
    """
    tokenizer = _tokenizer(model)
    end = tokenizer.token_to_id(END_OF_TEXT)
    generator = torch.Generator(model.norm.weight.device).manual_seed(seed)
    decoders = [DecodeStream(skip_special_tokens=True) for _ in prompts]
    waiting: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    for step in stream(
        model, prompts, tokens, temperature=temperature, top_k=top_k, generator=generator
    ):
        new = [""] * len(prompts)
        for row, token in enumerate(step):
            ended[row] = ended[row] or (token is not None and token == end)
            if token is not None and not ended[row]:
                waiting[row].append(token)
                text = decoders[row].step(tokenizer, token)
                if text is not None:
                    new[row] = str(text)
                    waiting[row].clear()
        yield new
        if all(ended):
            break
    # Bytes that are no whole character.
    yield [str(tokenizer.decode(row)) for row in waiting]


def _tokenizer(model: Transformer) -> Tokenizer:
    """The tokenizer that `load_model` gave the model; a ValueError if there is none."""
    if model.tokenizer is None:
        raise ValueError(
            "the model has no tokenizer: load it with load_model, or set its .tokenizer"
        )
    return model.tokenizer


def prompt_tokens(model: Transformer, prompt: str) -> tuple[list[int], int]:
    """The last tokens of a prompt, as many as the model reads; and how many tokens it has."""
    tokenizer = _tokenizer(model)
    # After the end of a file begins the next one.
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids = encode(tokenizer, prompt) or ([] if end is None else [end])
    return ids[-model.config.context :], len(ids)


@torch.inference_mode()
def stream(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[list[int | None]]:
    """Yields the next token of every sequence, until each has `tokens` of them.

    All sequences are read from their first token on, in step: while one is still reading its prompt
    it has no next token, and neither once it has got all of them.

    Args:
        prompts: ids, from 1 to `model.config.context` each.
        tokens, temperature, top_k: as for `generate`.
        generator: of the model's device; by default torch's global one.

    Raises:
        UserError: a prompt that is longer than the context or empty, a number that does not fit, or
            logits that are not finite.
    """
    context = model.config.context
    for prompt in prompts:
        if not 1 <= len(prompt) <= context:
            raise UserError(
                f"the prompt has {len(prompt)} tokens, and the model reads 1 to {context}: "
                f"{'shorten it' if prompt else 'give at least one'}"
            )
    if tokens < 0 or not prompts:
        raise UserError(
            f"nothing can be generated for --tokens {tokens} and {len(prompts)} prompts: "
            f"choose more"
        )
    if not 0 <= temperature < float("inf"):
        raise UserError(f"the temperature must be 0 or more, got {temperature}: change it")
    if top_k is not None and top_k < 1:
        raise UserError(f"top-k must be at least 1, got {top_k}: change it or leave it out")
    weight = model.norm.weight
    lengths = [len(prompt) for prompt in prompts]
    cache = KVCache(model.config, len(prompts), device=weight.device, dtype=weight.dtype)
    shortest = min(lengths)
    unread = torch.tensor([list(prompt[:shortest]) for prompt in prompts], device=weight.device)
    # The last `context` tokens, read again when the cache is full.
    seen = unread
    for length in range(shortest, max(lengths) + tokens):
        if cache.length + unread.shape[1] > context:
            cache.reset()
            unread = seen[:, -max(1, context // 2) :]
        logits = model(unread, cache, last_only=True)[:, -1]
        if not bool(logits.isfinite().all()):
            raise UserError("the model's logits are not finite: choose another checkpoint")
        chosen = _choose(logits, temperature, top_k, generator).tolist()
        following = [
            prompt[length] if length < len(prompt) else token
            for prompt, token in zip(prompts, chosen, strict=True)
        ]
        yield [
            token if own <= length < own + tokens else None
            for own, token in zip(lengths, chosen, strict=True)
        ]
        unread = torch.tensor(following, device=weight.device)[:, None]
        seen = torch.cat([seen, unread], 1)[:, -context:]


def _choose(
    logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None
) -> Tensor:
    """`(B, V)` to `(B,)`."""
    if temperature < _COLDEST:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is None or top_k >= logits.shape[-1]:
        return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
    largest, places = logits.topk(top_k, -1)
    drawn = torch.multinomial(largest.softmax(-1), 1, generator=generator)
    return places.gather(1, drawn).squeeze(1)
