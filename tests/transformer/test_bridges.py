"""Bridges: exact where they can be, and edits that steer a model across them."""

import json

import pytest
import torch

from sparse_transformer import ModelConfig, Transformer, UserError, load_model, tasks
from sparse_transformer.bridges import __main__ as program
from sparse_transformer.bridges import bridge, steering
from sparse_transformer.run import corpus_sample

CONFIG = ModelConfig(
    vocab_size=50, n_layer=2, d_model=16, d_head=8, context=12, linear="dense", active=None
)


def model_of(seed):
    model = Transformer(CONFIG, generator=torch.Generator().manual_seed(seed))
    # Larger than at the start of a training, so that sublayers matter.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(1.0 if "norm" in name or parameter.dim() == 1 else 10.0)
    return model.eval().requires_grad_(False)


def permuted(model, order):
    """The same function, with other numbers for the channels of the residual stream."""
    other = Transformer(CONFIG)
    state = {}
    for name, tensor in model.state_dict().items():
        reads = name.endswith(("qkv.weight", "up.weight")) or name in (
            "embed.weight",
            "unembed.weight",
        )
        writes = name.endswith(("out.weight", "out.bias", "down.weight", "down.bias"))
        state[name] = tensor[:, order] if reads else tensor[order] if writes else tensor
    other.load_state_dict(state)
    return other.eval().requires_grad_(False)


@pytest.fixture
def tokens():
    return torch.randint(50, (40, 12), generator=torch.Generator().manual_seed(3))


def test_streams_are_the_sums_of_what_is_added(tokens):
    model = model_of(0)
    with bridge.recorded(model) as streams:
        logits = model(tokens)
    x = model.embed(tokens)
    for site, stream in enumerate(streams):
        torch.testing.assert_close(stream, x, rtol=1e-5, atol=1e-5)
        block = model.blocks[site // 2]
        x = x + (block.mlp(x, None) if site % 2 else block.attn(x, None, None, 0))
        other = stream.flip(0)
        with bridge.replaced(model, site, lambda _, other=other: other):
            found = model(tokens)
        # All that the tokens themselves still decide is the bigram table, which is zero.
        torch.testing.assert_close(found, logits.flip(0), rtol=1e-4, atol=1e-4)


def test_least_squares_finds_a_permutation(tokens):
    dense = model_of(0)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    sparse = permuted(dense, order)
    torch.testing.assert_close(sparse(tokens), dense(tokens), rtol=1e-4, atol=1e-4)
    keep = torch.ones_like(tokens).bool()
    maps = bridge.fit(dense, sparse, tokens, keep, steps=0)
    wanted = torch.eye(16)[order]
    for site in range(4):
        torch.testing.assert_close(maps.encoders[site].weight, wanted, rtol=0, atol=0.02)
        torch.testing.assert_close(maps.decoders[site].weight, wanted.T, rtol=0, atol=0.02)
    for values in bridge.losses(maps, dense, sparse, tokens, keep, range(4)):
        assert values.max() < 1e-3


def test_training_brings_hybrids_closer_and_padding_does_not_count(tokens):
    dense, sparse = model_of(0), model_of(1)
    keep = torch.arange(12) < torch.arange(40)[:, None] % 9 + 4
    other = torch.where(keep, tokens, 7)
    first, second, padded = (
        bridge.fit(dense, sparse, rows, keep, steps=steps, learning_rate=3e-3)
        for rows, steps in ((tokens, 0), (tokens, 40), (other, 40))
    )
    before, after = (
        bridge.losses(maps, dense, sparse, tokens, keep, range(4))[1] for maps in (first, second)
    )
    assert (after.sum(1) < 0.9 * before.sum(1)).all()
    for name, value in second.state_dict().items():
        torch.testing.assert_close(padded.state_dict()[name], value)


@pytest.fixture(scope="module")
def small():
    return load_model("python-small").requires_grad_(False)


def asked(model, name, split, count):
    pairs = tasks.get(name).pairs(model.tokenizer, count, split=split, context=48)
    return tasks.collate(pairs, model.config.vocab_size - 1)


def test_edits_steer_and_controls_do_not(small):
    """Across the identity, so that only the edits can fail."""
    same = bridge.Bridge(4, 256, 256)
    for maps in (*same.encoders, *same.decoders):
        torch.nn.init.eye_(maps.weight)
    same.requires_grad_(False)
    name, other = "bracket_counting", "lambda_func"
    train, test = (asked(small, name, split, 12) for split in ("train", "test"))
    edit = steering.find(small, train, 3, 8)
    control = steering.find(small, asked(small, other, "train", 12), 3, 8)
    found = steering.choose(small, same, train, {3: edit}, [{3: control}])
    torch.testing.assert_close(found.changes["edit"], edit.values)
    assert edit.values.count_nonzero() == 8
    assert not edit.elsewhere[:, edit.values[0] != 0].any()
    for change in found.changes.values():
        torch.testing.assert_close(change.norm(dim=1), edit.values.norm().expand(len(change)))
    shares = {
        kind: steering.flips(small, test, 3, change, found.strength).value
        for kind, change in found.changes.items()
    }
    assert shares["edit"] > 0.8
    assert max(shares["other channels"], shares["other tasks"]) < 0.2
    wrong = tasks.Batch(test.tokens, test.last, test.wrong, test.right, test.positive)
    with pytest.raises(UserError, match="no pair of prompts right"):
        steering.flips(small, wrong, 3, edit.values, 1.0)


def test_the_program_reports_what_it_found(small, tmp_path, monkeypatch, capsys):
    rows = corpus_sample("python-small", small)[:4]
    monkeypatch.setattr(program, "corpus_sample", lambda *_, **__: rows)
    given = "--checkpoint python-small --dense python-small --steps 1 --pairs 2 --train-pairs 2"
    arguments = [*given.split(), "--tokens", "48", "--json", str(tmp_path / "found.json")]
    assert program.main(arguments) == 0
    report = json.loads((tmp_path / "found.json").read_text())
    assert capsys.readouterr().out == program.text(report)
    for result in report["tasks"].values():
        assert len(result["channels"]) == 8
    assert torch.tensor([report["nmse"], report["kl"]]).shape == (2, 2, 4)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--tasks", "for_while"], "give at least two --tasks"),
        (["--channels", "129"], "--channels must be at most 128"),
        (["--tokens", "257"], "--tokens must be at most 256"),
        (["--pairs", "1"], "--pairs must be at least 2"),
    ],
)
def test_bad_input_is_a_sentence(capsys, arguments, sentence):
    given = ["--checkpoint", "python-small", "--dense", "python-small"]
    assert program.main([*given, *arguments]) == 2
    assert sentence in capsys.readouterr().err
