"""A model with a circuit that is known: the first token decides the answer."""

import torch

from sparse_transformer import ModelConfig, Transformer, hooks
from sparse_transformer.circuits.budget import Budget
from sparse_transformer.circuits.objective import (
    Subgraph,
    TaskLoss,
)
from sparse_transformer.tasks import Pair, Prompt

V, D = 12, 8
A, B, END = 0, 1, V - 1
ANSWERS = (8, 9)


class PlantedTask:
    """The first token, 0 or 1, decides whether 8 or 9 follows; tokens 2 to 7 in between."""

    name, description = "planted", "Say which token came first."

    def pairs(self, tokenizer, count, *, split, seed=0, context=256, max_tokens=None):
        generator = torch.Generator().manual_seed(2 * seed + (split == "test"))
        found = []
        for _ in range(count):
            length = int(torch.randint(2, 9, (), generator=generator))
            rest = torch.randint(2, 8, (length,), generator=generator).tolist()
            sides = [
                Prompt(f"{first} {rest}", (first, *rest), ANSWERS[first], ANSWERS[1 - first])
                for first in (A, B)
            ]
            found.append(Pair(*sides))
        return found


def planted(noise=0.02, seed=0, positions=0):
    """Layer 0 reads channel 0, v channel 5 takes the mean over positions, channel 3 is written."""
    config = ModelConfig(
        vocab_size=V, n_layer=2, d_model=D, d_head=4, context=16, active=None, linear="dense",
        sinks=False, bigram=False, positions=positions,
    )  # fmt: skip
    model = Transformer(config, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, noise, generator=torch.Generator().manual_seed(len(name)))
        model.embed.weight[:, 1] = 3.0
        model.embed.weight[A, 0], model.embed.weight[B, 0] = 3.0, -3.0
        block = model.blocks[0].attn
        block.qkv.weight[2 * D + 5, 0] = 2.0
        block.out.weight[3, 5] = 8.0
        model.unembed.weight[ANSWERS[0], 3], model.unembed.weight[ANSWERS[1], 3] = 4.0, -4.0
    return model


PLANTED_NODES = {"0.attn.act_in:0", "0.attn.v:5", "0.attn.resid_delta:3"}


def planted_means(model):
    generator = torch.Generator().manual_seed(9)
    tokens = torch.randint(V, (64, 12), generator=generator)
    with hooks.recording(model) as seen, torch.no_grad():
        model(tokens)
    return {name: value.mean((0, 1)) for name, value in seen.items()}


def planted_task(seed=0, test_pairs=32):
    return task_of(planted(), seed, test_pairs)


def task_of(model, seed=0, test_pairs=32):
    return TaskLoss(
        model, PlantedTask(), None, planted_means(model), train_pairs=64, fit_pairs=24,
        test_pairs=test_pairs, seed=seed,
    )  # fmt: skip


def everything(task):
    return Subgraph(torch.ones(task.nodes.total, dtype=torch.bool))


def ids(task, keep):
    return {task.nodes.id(number) for number in keep.nonzero().squeeze(1).tolist()}


BUDGET = Budget(trials=4, steps=60, pairs=8, finalists=1)


def chosen(task, *names):
    keep = torch.zeros(task.nodes.total, dtype=torch.bool)
    for name in names:
        keep[task.nodes.index(name)] = True
    return Subgraph(keep)


def with_paths(*weights):
    """The planted task; v channels 5, 6 and 7 write to channel 3 with these weights."""
    model = planted()
    with torch.no_grad():
        for channel, weight in enumerate(weights, 5):
            model.blocks[0].attn.qkv.weight[2 * D + channel, 0] = 2.0
            model.blocks[0].attn.out.weight[3, channel] = weight
    return task_of(model)


def deaf(task):
    """The planted task, whose model reads channel 3 for its two answers alone."""
    model = planted(noise=0.0)
    return task_of(model)
