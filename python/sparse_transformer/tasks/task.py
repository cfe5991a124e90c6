"""What a task is: pairs of prompts that one fact tells apart, and two tokens to choose between.

A task draws its pairs as texts (`Draft`); `Task.pairs` turns them into tokens (`Pair`), keeps the
two splits apart, and refuses what a tokenizer cannot express; `collate` makes a `Batch` of them.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from random import Random
from typing import Literal

import torch
from tokenizers import Tokenizer
from torch import Tensor

from sparse_transformer.errors import UserError

Split = Literal["train", "test"]

# If none of so many drafts can be asked, none can.
_TRIES = 256
# If none of so many gives a pair, or is new, there are no more.
_PATIENCE = 2000


@dataclass(frozen=True)
class Draft:
    """A pair as texts.

    Attributes:
        positive, negative: the prompts.
        right: what follows `positive` and must not follow `negative`.
        wrong: the reverse.
    """

    positive: str
    negative: str
    right: str
    wrong: str


@dataclass(frozen=True)
class Prompt:
    """A prompt and its two answers, each of which is one token after it."""

    text: str
    tokens: tuple[int, ...]
    right: int
    wrong: int


@dataclass(frozen=True)
class Pair:
    """Two prompts that one fact tells apart: what is right in one is wrong in the other."""

    positive: Prompt
    negative: Prompt

    @property
    def length(self) -> int:
        """Tokens of the longer prompt."""
        return max(len(self.positive.tokens), len(self.negative.tokens))


@dataclass(frozen=True)
class Batch:
    """P pairs, padded on the right, where nothing can influence a causal model's answer.

    Attributes:
        tokens: int64 `(2P, T)`; rows 2i and 2i + 1 are the positive and negative prompt of pair i.
        last: int64 `(2P,)`, the position of each prompt's last token.
        right, wrong: int64 `(2P,)`, the answers.
        positive: bool `(2P,)`.
    """

    tokens: Tensor
    last: Tensor
    right: Tensor
    wrong: Tensor
    positive: Tensor

    @property
    def answers(self) -> Tensor:
        """int64 `(2P, 2)`, right and wrong."""
        return torch.stack([self.right, self.wrong], 1)

    def to(self, device: torch.device | str) -> Batch:
        """The same on `device`."""
        return Batch(*(getattr(self, field.name).to(device) for field in fields(self)))

    def pick(self, rows: Tensor) -> Batch:
        """Some of the prompts, int64 `(rows,)`."""
        return Batch(*(getattr(self, field.name)[rows] for field in fields(self)))


@dataclass(frozen=True)
class Task:
    """A binary choice of the next token of Python code.

    Attributes:
        name: as in Table 1 of Gao et al. 2025 (arXiv 2511.13653).
        description: one sentence.
        draw: makes one pair from a random generator.
        first_token: answers may be longer than a token; then their first token is the answer.
        shortcut: why a few of the last tokens, or the tokens in any order, decide the published
            task; means over tasks leave such a task out.
    """

    name: str
    description: str
    draw: Callable[[Random], Draft]
    first_token: bool = False
    shortcut: str | None = None

    def pairs(
        self,
        tokenizer: Tokenizer,
        count: int,
        *,
        split: Split,
        seed: int = 0,
        context: int = 256,
        max_tokens: int = 128,
    ) -> list[Pair]:
        """`count` pairs, the same ones for the same arguments; no prompt is in two of them.

        Each prompt belongs to one split by a hash of its text, and a pair whose prompts belong to
        different ones to neither: for all seeds, no prompt is in both splits. A quarter of all
        pairs is for `train`, a quarter for `test`.

        Args:
            tokenizer: whose tokens the answers must be.
            count: how many pairs, at least 1.
            split: "train" or "test".
            seed: draws other pairs.
            context: no prompt has more tokens.
            max_tokens: nor more than this.

        Raises:
            UserError: an answer is not one token of this tokenizer, or there are not so many pairs.
        """
        if count < 1:
            raise UserError(f"the number of pairs must be at least 1, got {count}")
        if split not in ("train", "test"):
            raise UserError(f"the split must be train or test, got {split!r}: choose one of them")
        limit = min(context, max_tokens)
        found: list[Pair] = []
        refused: Counter[str] = Counter()
        since = 0
        for draft in self.drafts(split, seed):
            pair = self._encode(tokenizer, draft, limit)
            if isinstance(pair, Pair):
                found.append(pair)
                since = 0
                if len(found) == count:
                    return found
                continue
            refused[pair] += 1
            since += 1
            if since == (_PATIENCE if found else _TRIES):
                break
        raise UserError(self._why_no_more(len(found), split, limit, refused))

    def drafts(self, split: Split, seed: int = 0) -> Iterator[Draft]:
        """Pairs of a split as texts, the same ones for the same arguments; none has an old prompt.

        They end where `_PATIENCE` draws give nothing new.
        """
        # Seeded by the text itself: the same in every process.
        random = Random(f"{self.name} {split} {seed}")
        seen: set[str] = set()
        since = 0
        while since < _PATIENCE:
            since += 1
            draft = self.draw(random)
            prompts = {draft.positive, draft.negative}
            if prompts & seen or {_side(prompt) for prompt in prompts} != {split}:
                continue
            seen |= prompts
            since = 0
            yield draft

    def _encode(self, tokenizer: Tokenizer, draft: Draft, limit: int) -> Pair | str:
        """The pair, or why it cannot be asked."""
        positive = self._prompt(tokenizer, draft.positive, draft.right, draft.wrong, limit)
        if isinstance(positive, str):
            return positive
        negative = self._prompt(tokenizer, draft.negative, draft.wrong, draft.right, limit)
        if isinstance(negative, str):
            return negative
        if (positive.right, positive.wrong) != (negative.wrong, negative.right):
            return "an answer is another token after one prompt than after the other"
        return Pair(positive, negative)

    def _prompt(
        self, tokenizer: Tokenizer, text: str, right: str, wrong: str, limit: int
    ) -> Prompt | str:
        """The prompt, or why it cannot be asked."""
        tokens = tokenizer.encode(text).ids
        if len(tokens) > limit:
            return f"no prompt is as short as {limit} tokens"
        ids = []
        for answer in (right, wrong):
            longer = tokenizer.encode(text + answer).ids
            if self.first_token and len(longer) > len(tokens):
                # The answer must be a single token as well.
                first = tokenizer.decode([longer[len(tokens)]])
                longer = tokenizer.encode(text + first).ids
            if len(longer) != len(tokens) + 1 or longer[:-1] != tokens:
                return f"the answer {answer!r} is not a single token after the prompt"
            ids.append(longer[-1])
        if ids[0] == ids[1]:
            return f"the answers {right!r} and {wrong!r} begin with the same token"
        return Prompt(text, tuple(tokens), ids[0], ids[1])

    def _why_no_more(self, found: int, split: str, limit: int, refused: Counter[str]) -> str:
        if found:
            return (
                f"the task {self.name} has only {found} different pairs of at most {limit} tokens "
                f"for {split}: ask for no more"
            )
        reason = refused.most_common(1)[0][0] if refused else f"no pair is for {split}"
        return (
            f"the task {self.name} cannot be asked of this tokenizer and context, because {reason}:"
            f" leave it out, or take another tokenizer or a longer context"
        )


def prompts(pairs: Iterable[Pair]) -> list[Prompt]:
    """The two prompts of each pair, the positive one first."""
    return [prompt for pair in pairs for prompt in (pair.positive, pair.negative)]


def by_length(
    pairs: Sequence[Pair], most_tokens: int, most_pairs: int | None = None
) -> Iterator[list[int]]:
    """Places of pairs of about equal length, with at most so many tokens together when padded."""
    batch: list[int] = []
    for place in sorted(range(len(pairs)), key=lambda place: pairs[place].length):
        # The next one is the longest so far.
        tokens = 2 * (len(batch) + 1) * pairs[place].length
        if batch and (tokens > most_tokens or len(batch) == most_pairs):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def collate(pairs: Sequence[Pair], pad: int) -> Batch:
    """The pairs as one batch, padded to the longest with the token `pad`; at least one pair."""
    if not pairs:
        raise ValueError("a batch must have at least one pair, got none")
    asked = prompts(pairs)
    longest = max(pair.length for pair in pairs)
    padding = (pad,) * longest
    return Batch(
        tokens=torch.tensor([(prompt.tokens + padding)[:longest] for prompt in asked]),
        last=torch.tensor([len(prompt.tokens) - 1 for prompt in asked]),
        right=torch.tensor([prompt.right for prompt in asked]),
        wrong=torch.tensor([prompt.wrong for prompt in asked]),
        positive=torch.tensor([True, False]).repeat(len(pairs)),
    )


def _side(text: str) -> Split:
    """To which split a prompt belongs: to each, half of them."""
    return "test" if hashlib.sha256(text.encode()).digest()[0] < 128 else "train"
