"""A run that begins with the weights of another model: the same function, then more of it."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

import sparse_transformer
from sparse_transformer import ModelConfig, Transformer, UserError, export_model, load_model
from sparse_transformer.cli.train import main, parse
from sparse_transformer.train import metrics
from sparse_transformer.train.start import grown

SMALL = ModelConfig(
    vocab_size=300,
    n_layer=2,
    d_model=32,
    context=16,
    density=0.125,
    embedding_density=0.25,
    min_nonzeros=2,
)
SETTINGS = {
    "steps": 20,
    "batch_tokens": 256,
    "validation_tokens": 512,
    "sample_tokens": 0,
    "topology.period": 3,
}
MODEL = {
    "d_model": 32,
    "n_layer": 1,
    "context": 32,
    "vocab_size": 300,
    "density": 0.25,
    "embedding_density": 0.25,
}


def run(out, **options):
    """The status of a training run; `d_model=32` is `--d-model 32`."""
    named = {f"--{name.replace('_', '-')}": value for name, value in options.items()}
    pairs = [str(word) for pair in named.items() for word in pair]
    return main([*pairs, "--no-tensorboard", "--out", str(out)])


def made(config=SMALL, fan_multiple=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(config, fan_multiple=fan_multiple, generator=generator)
    with torch.no_grad():
        # Also what starts at zero.
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def logits(model):
    tokens = torch.randint(0, 300, (3, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(tokens)


@pytest.mark.parametrize("changes", [{}, {"linear": "dense"}, {"linear": "masked_dense"}])
def test_same_model_computes_the_same(changes):
    config = dataclasses.replace(SMALL, **changes)
    old, new = made(config), made(config, seed=1)
    assert not torch.equal(logits(old), logits(new))
    assert torch.equal(logits(old), logits(grown(old, new)))


def test_longer_rows_compute_the_same_and_can_learn():
    old, wanted = made(), made(fan_multiple=2.0, seed=1)
    new = grown(old, wanted)
    torch.testing.assert_close(logits(new), logits(old), rtol=1e-4, atol=1e-4)
    for name, layer in new.sparse_layers().items():
        before, target = old.sparse_layers()[name], wanted.sparse_layers()[name]
        assert layer.layout.blocks_per_row == target.layout.blocks_per_row
        assert layer.layout.blocks_per_row > before.layout.blocks_per_row
        at = torch.zeros(layer.layout.block_rows, layer.layout.block_cols, dtype=torch.bool)
        kept = at.clone().scatter_(1, before.layout.indices.long(), True)
        assert kept.gather(1, layer.layout.indices.long()).sum() == before.layout.indices.numel()
        # New connections: those of the new model, zero, with a gradient.
        added = ~kept.gather(1, layer.layout.indices.long())
        offered = at.scatter_(1, target.layout.indices.long(), True)
        assert offered.gather(1, layer.layout.indices.long())[added].all()
        assert not layer.weight.detach().flatten(1)[added].any()
    tokens = torch.randint(0, 300, (4, 17))
    new.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    layer = new.sparse_layers()["blocks.0.mlp.up"]
    assert layer.weight.grad[layer.weight == 0].any()


def test_position_channels_join():
    """Nothing reads them but new connections, and they push only small channels out of AbsTopK."""
    config = dataclasses.replace(SMALL, positions=8, active=None)
    old = made(dataclasses.replace(SMALL, active=None))
    new = grown(old, made(config, seed=1))
    torch.testing.assert_close(logits(new), logits(old), rtol=1e-4, atol=1e-4)
    assert new.positions.shape == (16, 8)
    layer = new.sparse_layers()["blocks.0.attn.qkv"]
    assert layer.layout.in_features == 40


def test_positions_start_as_sinusoids():
    """One turn, at all positions, leads from a token's channels to those of the one before."""
    values = Transformer(dataclasses.replace(SMALL, positions=8)).positions.detach()
    sines, cosines = values[:, :4], values[:, 4:]
    torch.testing.assert_close(sines**2 + cosines**2, torch.ones(16, 4))
    angle = torch.atan2(sines[1], cosines[1])
    waves = torch.tensor([4, 4 * 2 ** (7 / 3), 4 * 2 ** (14 / 3), 512])
    torch.testing.assert_close(angle, 2 * torch.pi / waves)
    before = sines[1:] * angle.cos() - cosines[1:] * angle.sin()
    torch.testing.assert_close(before, sines[:-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ({}, {"d_model": 64}, "has d_model 32 and not 64"),
        ({}, {"n_layer": 3}, "has n_layer 2 and not 3"),
        ({}, {"linear": "dense"}, "has linear sparse and not dense"),
        ({}, {"density": 0.07}, "raise --density"),
        ({"positions": 8}, {"positions": 16}, "has positions 8 and not 16"),
        ({"positions": 8}, {}, "has positions 8 and not 0"),
        ({"linear": "dense"}, {"linear": "dense", "positions": 8}, "cannot be added to a dense"),
    ],
)  # fmt: skip
def test_other_models_are_refused(old, new, said):
    with pytest.raises(UserError, match=said):
        grown(
            made(dataclasses.replace(SMALL, **old)),
            made(dataclasses.replace(SMALL, **new), seed=1),
        )


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A run on some files, and other files."""
    root = tmp_path_factory.mktemp("start")
    source = Path(sparse_transformer.__file__).parent
    for folder, files in (("corpus", "*.py"), ("other", "circuits/*.py")):
        (root / folder).mkdir()
        for file in source.glob(files):
            shutil.copy(file, root / folder)
    cache = {"cache_dir": root / "cache", "data": root / "corpus"}
    assert run(root / "run", **SETTINGS, **MODEL, **cache) == 0
    return root


def test_run_starts_from_a_run(first, tmp_path, capsys):
    """With its model, tokenizer and weights, on other files, and resumes without it."""
    old_run, new_run = tmp_path / "old", tmp_path / "new"
    shutil.copytree(first / "run", old_run)
    begins = {"start_from": old_run, "data": first / "other", "cache_dir": first / "cache"}
    still = {"learning_rate": 1e-9, "topology.drop_share": 0}
    assert run(new_run, **SETTINGS, **begins, **still) == 0
    old, new = load_model(old_run), load_model(new_run)
    assert new.config == old.config
    assert new.tokenizer.to_str() == old.tokenizer.to_str()
    assert old.state_dict().keys() == new.state_dict().keys()
    for name, tensor in old.state_dict().items():
        torch.testing.assert_close(new.state_dict()[name], tensor, rtol=0, atol=1e-5)
    stored = json.loads((new_run / "config.json").read_text())
    assert stored["train"]["start_from"] == str(old_run)
    export_model(new_run, tmp_path / "exported", data=[first / "other"])
    for path in (tmp_path / "exported").rglob("*.json"):
        assert str(tmp_path) not in path.read_text()
    shutil.rmtree(old_run)
    assert run(new_run, start_from="python-small", from_step=20) == 2
    assert "has begun: leave --start-from out" in capsys.readouterr().err
    assert run(new_run, steps=22, from_step=20) == 0
    assert metrics.read(new_run / "metrics.jsonl")[-1]["step"] == 22


def test_defaults_are_those_of_the_model(tmp_path):
    asked = ["--start-from", "python-small", "--out", str(tmp_path / "run")]
    settings, _, _ = parse(asked)
    assert settings.model == load_model("python-small").config
    assert settings.topology.start_multiple == 1
    settings, _, _ = parse([*asked, "--positions", "32", "--topology.start-multiple", "2"])
    assert settings.model.positions == 32
    assert settings.topology.start_multiple == 2


def test_what_does_not_exist_is_one_sentence(tmp_path, capsys):
    status = main(["--start-from", "python-smal", "--out", str(tmp_path / "run")])
    assert status == 2
    assert "did you mean python-small" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
