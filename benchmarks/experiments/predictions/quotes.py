"""What the circuit for quotes predicts.

Gao et al. 2025 (arXiv 2511.13653): the kind of a quote is held by one node at the opening quote,
and a head takes it from every quote before: so setting that node flips the answer, and closed
strings in the other quotes pull towards theirs. An algorithm that looks at the open string only
would not be pulled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benchmarks.experiments.predictions.dose_response import (
    Prediction,
    accuracy,
    dose_response,
    logit_diff_of,
    logit_diffs_of,
    single_token,
)
from sparse_transformer import hooks, tasks
from sparse_transformer.circuits.circuit import Circuit
from sparse_transformer.interventions import Intervention, Nodes, Set
from sparse_transformer.model import Transformer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# A model that answers so many prompts of each kind of quote rightly has a node for the kind, if
# setting one to the mean of the other kind turns right answers into wrong ones on so many prompts,
# and to that of its own kind on at most so many.
SOLVED, FLIPPED, FLIPPED_ANYWAY = 0.75, 0.5, 0.1
_QUOTES = "single_double_quote"
# How many of the closed strings before an open one have the other quotes.
_STRINGS = (0, 1, 2, 3, 4)
# How many nodes are tried where no circuit says which ones matter.
_TRIED = 16
# So many of these are set together.
_TOGETHER = (1, 2, 4, 8, 16)


def single_double_quote(
    model: Transformer,
    tokenizer: Tokenizer,
    circuit: Circuit | None = None,
    *,
    prompts: int = 32,
    seed: int = 0,
) -> list[Prediction]:
    """What follows from a node that holds the kind of quote, and a head that reads all quotes.

    Args:
        model: in evaluation.
        tokenizer: the model's.
        circuit: of this task, whose neurons and v channels are looked at; None for all of them.
        prompts: how many pairs of each split of the task, at least 2; the node is chosen on the
            training split and measured on the test split.
        seed: draws them.

    Raises:
        UserError: the task cannot be asked of this model.
    """
    most = _STRINGS[-1]
    before = {
        single_token(tokenizer, f"{own})"): {
            n: tokenizer.encode(f"f({other}x{other})\n" * n + f"f({own}x{own})\n" * (most - n)).ids
            for n in _STRINGS
        }
        for own, other in ("\"'", "'\"")
    }
    context = model.config.context
    longest = max(len(ids) for texts in before.values() for ids in texts.values())
    train, test = (
        tasks.get(_QUOTES).pairs(
            tokenizer,
            prompts,
            split=split,
            seed=seed,
            context=context,
            max_tokens=context - longest,
        )
        for split in ("train", "test")
    )
    asked = [prompt for pair in test for prompt in (pair.positive, pair.negative)]
    answers = torch.tensor([[prompt.right, prompt.wrong] for prompt in asked])
    diffs = {
        n: logit_diffs_of(model, [[*before[p.right][n], *p.tokens] for p in asked], answers)
        for n in _STRINGS
    }
    # Half of the prompts have either answer, and diffs are right over wrong.
    gap = 2 * float(diffs[0].mean())
    sentence = (
        f"the more of {most} closed strings before an open one have the other kind of quote, the "
        f"less is the right quote preferred"
    )
    return [
        _quote_node(model, circuit, train, test),
        dose_response("other_quotes_before", _QUOTES, sentence, diffs, -1, gap),
    ]


@dataclass(frozen=True)
class _Quotes:
    """Prompts of pairs, and where the two of a pair differ; B in all.

    Attributes:
        tokens: int64 `(B, T)`.
        last: int64 `(B,)`.
        answers: int64 `(B, 2)`, right and wrong.
        positive: bool `(B,)`.
        differ: bool `(B, T)`.
    """

    tokens: Tensor
    last: Tensor
    answers: Tensor
    positive: Tensor
    differ: Tensor

    @classmethod
    def of(cls, model: Transformer, pairs: Sequence[tasks.Pair]) -> _Quotes:
        batch = tasks.collate(pairs, model.config.vocab_size - 1).to(model.norm.weight.device)
        # The two prompts of a pair follow each other.
        other = batch.tokens.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
        answers = torch.stack([batch.right, batch.wrong], 1)
        return cls(batch.tokens, batch.last, answers, batch.positive, batch.tokens != other)

    def diffs(self, model: Transformer, changes: Sequence[Intervention] = ()) -> Tensor:
        """Right over wrong, `(B,)`."""
        return logit_diff_of(model, self.tokens, self.answers, changes, self.last)

    def changes(
        self,
        model: Transformer,
        nodes: Sequence[str],
        means: Mapping[str, Tensor],
        *,
        own: bool = False,
    ) -> list[Set]:
        """Sets `nodes`, where the prompts of a pair differ, to their mean there.

        The mean is that of the other kind of prompt, or of the prompt's own.
        """
        kinds = self.positive if own else ~self.positive
        found = []
        for node in nodes:
            where = Nodes.parse(model, node)
            mean = means[where.place][kinds.long(), where.first]  # (B,)
            found.append(Set(node, mean.view(-1, 1, 1), at=self.differ))
        return found


def _quote_node(
    model: Transformer,
    circuit: Circuit | None,
    train: Sequence[tasks.Pair],
    test: Sequence[tasks.Pair],
) -> Prediction:
    """Chosen on `train`, which has the means as well; measured on `test`."""
    seen, unseen = _Quotes.of(model, train), _Quotes.of(model, test)
    means = _means(model, seen)
    if circuit is None:
        nodes = _influential(model, seen, means)
    else:
        nodes = [node.id for node in circuit.nodes if node.kind in ("neuron", "v")]

    before = seen.diffs(model).mean()
    drops = {}
    for node in nodes:
        after = seen.diffs(model, seen.changes(model, [node], means))
        drops[node] = float(before - after.mean())
    order = sorted(drops, key=drops.__getitem__, reverse=True)
    untouched = unseen.diffs(model)

    def flipped(nodes: Sequence[str], own: bool = False) -> float:
        """Share of prompts whose right answer becomes a wrong one."""
        after = unseen.diffs(model, unseen.changes(model, nodes, means, own=own))
        return float(((untouched > 0) & (after <= 0)).double().mean())

    solved = min(accuracy(untouched[0::2]), accuracy(untouched[1::2]))
    other, itself = flipped(order[:1]), flipped(order[:1], own=True)
    # How many of them it takes, if one is not enough.
    together = [count for count in _TOGETHER if count <= len(order)]
    return Prediction(
        "quote_node",
        _QUOTES,
        "one node, set at the opening quote to its mean at the other kind of quote, flips the "
        "answer, and set to its mean at its own kind does not",
        solved >= SOLVED and other >= FLIPPED and itself <= FLIPPED_ANYWAY,
        {
            "node": order[0] if order else None,
            "solved": solved,
            "flipped": other,
            "flipped_by_own_mean": itself,
            "together": [order[:count] for count in together],
            "flipped_together": [flipped(order[:count]) for count in together],
            "tried": len(order),
            "prompts": len(unseen.tokens),
        },
    )


def _candidates(model: Transformer) -> list[str]:
    """Places of neurons and v channels."""
    return [name for name in hooks.names(model) if name.endswith((".post_act", ".v"))]


@torch.no_grad()
def _means(model: Transformer, quotes: _Quotes) -> dict[str, Tensor]:
    """By place `(2, width)`: mean where pairs differ, of negative and of positive prompts."""
    with hooks.recording(model, _candidates(model)) as seen:
        model(quotes.tokens, at=quotes.last)
    return {
        place: torch.stack(
            [
                values[quotes.differ & (quotes.positive == kind).unsqueeze(1)].mean(0)
                for kind in (False, True)
            ]
        )
        for place, values in seen.items()
    }


def _influential(model: Transformer, quotes: _Quotes, means: Mapping[str, Tensor]) -> list[str]:
    """Nodes whose step to the other kind's mean should lower the margin most, to first order."""
    names = _candidates(model)
    # All activations recorded from here on have a gradient, even if the parameters have none.
    begin = {"0.attn.act_in": lambda x: x.detach().requires_grad_()}
    with torch.enable_grad(), hooks.replacing(model, begin), hooks.recording(model, names) as seen:
        logits = model(quotes.tokens, at=quotes.last).squeeze(1)
        both = logits.gather(1, quotes.answers)
        slopes = torch.autograd.grad((both[:, 0] - both[:, 1]).sum(), [seen[n] for n in names])
    effects: dict[str, float] = {}
    for name, slope in zip(names, slopes, strict=True):
        step = means[name][(~quotes.positive).long()].unsqueeze(1) - seen[name].detach()
        effect = (slope * step * quotes.differ.unsqueeze(-1)).sum((0, 1))  # (width,)
        effects |= {f"{name}:{channel}": value for channel, value in enumerate(effect.tolist())}
    return sorted(effects, key=effects.__getitem__)[:_TRIED]
