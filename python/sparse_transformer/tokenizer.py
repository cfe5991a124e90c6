"""The tokenizer: a byte-level BPE whose last id, end-of-text, stands between files."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sparse_transformer.errors import UserError

END_OF_TEXT = "<|endoftext|>"
# Answers of the circuit tasks (RECIPE) that must be one token each. Quotes come out of any Python
# code by themselves; `]]` is at the edge of 2048 tokens.
TASK_TOKENS = ('("', "('", '")', "')", "]]")
# The bytes, the task tokens, and end-of-text.
MIN_VOCAB_SIZE = 256 + len(TASK_TOKENS) + 1
# Longer runs of letters, digits, signs or spaces are cut before they are tokenized: the time for
# one grows with the square of its length.
_LONGEST_WORD = 1000
_LONG_SPACE = re.compile(rf"\s{{{_LONGEST_WORD}}}")
_LONG_WORD = re.compile(
    "|".join(rf"{kind}{{{_LONGEST_WORD}}}" for kind in (r"[^\W\d_]", r"\d", r"[^\w\s]", "_", r"\s"))
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE, in which each of `TASK_TOKENS` is a token and the last id is end-of-text.

    A UserError if there is too little text.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in pieces_of(text)), trainer)
    learned = tokenizer.get_vocab_size()
    if learned != vocab_size - 1:
        raise UserError(
            f"the corpus is too small for a vocabulary of {vocab_size}, it gave {learned + 1}: "
            f"give more text with --data, or --vocab-size {learned + 1}"
        )
    tokenizer = _with_task_tokens(tokenizer)
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def _with_task_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """Puts the task tokens that were not learned in place of the rarest ones that were.

    The new merges join two bytes and come last, so nothing else is encoded differently but what
    the rarest merges had joined.
    """
    state = json.loads(tokenizer.to_str())
    vocab, merges = state["model"]["vocab"], state["model"]["merges"]
    missing = [token for token in TASK_TOKENS if token not in vocab]
    # No merge builds on one that is dropped: those after it are dropped, too, or are of two bytes.
    others = [merge for merge in merges if "".join(merge) not in TASK_TOKENS]
    for token, merge in zip(missing, others[len(others) - len(missing) :], strict=True):
        vocab[token] = vocab.pop("".join(merge))
        merges.remove(merge)
    merges += [list(token) for token in missing]
    return Tokenizer.from_str(json.dumps(state))


def pieces_of(text: str) -> list[str]:
    """The text itself, or cut inside words longer than `_LONGEST_WORD`."""
    # Of ordinary text this looks faster than the expression.
    if max(map(len, text.split()), default=0) < _LONGEST_WORD and not _LONG_SPACE.search(text):
        return [text]
    ends = [match.end() for match in _LONG_WORD.finditer(text)]
    return [text[a:b] for a, b in itertools.pairwise((0, *ends, len(text))) if a < b]


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of a text; a UserError if it is not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the text {text[:40]!r} is not UTF-8: convert it") from error
    return [id for piece in pieces_of(text) for id in tokenizer.encode(piece).ids]


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer in `path`, which takes the end-of-text token's name for ordinary text.

    A UserError if the file is missing or is not a tokenizer.
    """
    problem = f"{path} is missing or not a tokenizer: copy tokenizer.json there"
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(problem) from error
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing more specific
        raise UserError(problem) from error
    tokenizer.encode_special_tokens = True
    return tokenizer
