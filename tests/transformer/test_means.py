"""What is taken over the corpus: means, snippets; and the ends of a drawn circuit."""

import dataclasses

import numpy as np
import pytest
import torch
from test_model import SMALL, batch, make

from sparse_transformer import UserError, data, hooks
from sparse_transformer.circuits import activations as means
from sparse_transformer.circuits.graph import Nodes, rows_of


@pytest.fixture(scope="module")
def model():
    return make(dtype=torch.float32).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tokens():
    return batch(B=20)[0]


def test_means_are_those_of_all_tokens(model, tokens):
    found = means.mean_activations(model, tokens, progress=False)
    with hooks.recording(model) as seen:
        model(tokens)
    wanted = [*Nodes.of(SMALL).names, *(f"{layer}.attn.y" for layer in range(SMALL.n_layer))]
    assert sorted(found) == sorted(wanted)
    for name, mean in found.items():
        torch.testing.assert_close(mean, seen[name].mean((0, 1)))
        assert mean.abs().max() > 0


def test_means_are_kept_for_these_weights_and_tokens(model, tokens, tmp_path, monkeypatch):
    first = means.mean_activations(model, tokens, cache_dir=tmp_path, progress=False)
    (file,) = tmp_path.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(means, "_recorded", None)
        again = means.mean_activations(model, tokens, cache_dir=tmp_path, progress=False)
        assert all(torch.equal(first[name], again[name]) for name in first)
        with pytest.raises(TypeError):
            means.mean_activations(model, tokens[:-1], cache_dir=tmp_path, progress=False)
        other = make(seed=1, dtype=torch.float32).eval()
        with pytest.raises(TypeError):
            means.mean_activations(other, tokens, cache_dir=tmp_path, progress=False)
    file.write_bytes(b"broken")
    again = means.mean_activations(model, tokens, cache_dir=tmp_path, progress=False)
    assert all(torch.equal(first[name], again[name]) for name in first)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="choose another --cache-dir"):
        means.mean_activations(model, tokens, cache_dir=tmp_path / "file", progress=False)


def test_snippets_are_the_most_active_places(model, tokens):
    texts = [f"<{token}>" for token in range(SMALL.vocab_size)]
    place = "1.mlp.post_act"
    with hooks.recording(model) as seen:
        model(tokens)
    active = (seen[place] != 0).any(1).sum(0)  # in how many rows each neuron is
    channel, dead = int(active.argmax()), int(active.argmin())
    assert active[channel] >= 2
    assert active[dead] == 0
    found = means.top_snippets(model, tokens, [(place, channel), (place, dead)], texts, count=2)
    assert found[f"{place}:{dead}"] == ()
    values = seen[place][..., channel]
    best, second = found[f"{place}:{channel}"]
    row, column = divmod(int(values.abs().argmax()), values.shape[1])
    assert best.tokens[best.at] == texts[int(tokens[row, column])]
    assert best.activations[best.at] == pytest.approx(float(values[row, column]), abs=1e-4)
    assert len(best.tokens) == len(best.activations)
    peaks = values.abs().amax(1).sort(descending=True).values
    assert abs(second.activations[second.at]) == pytest.approx(float(peaks[1]), abs=1e-4)


def test_windows_are_cut_from_the_training_tokens(tmp_path):
    text = "".join(f"value_{number} = other({number})\n" for number in range(900))
    corpus = data.prepare(text, vocab_size=300, cache_dir=tmp_path, progress=False)
    found = data.sample(corpus, corpus.tokenizer, 32, 5)
    assert found.shape == (5, 32)
    whole = np.asarray(corpus.train).astype(np.int64)
    for row in found.numpy():
        assert any(np.array_equal(whole[s : s + 32], row) for s in range(0, len(whole) - 32, 32))
    # Another tokenizer reads the same text.
    other = data.prepare(text * 2, vocab_size=320, cache_dir=tmp_path, progress=False)
    again = data.sample(corpus, other.tokenizer, 32, 5)
    assert again.shape[1] == 32
    decoded = other.tokenizer.decode(again.flatten().tolist())
    assert corpus.tokenizer.decode(found[0].tolist()).startswith(decoded[:20])


@pytest.mark.parametrize("linear", ["sparse", "masked_dense", "dense"])
@pytest.mark.parametrize("tied", [False, True])
def test_ends_have_the_rows_of_the_tables(linear, tied):
    model = make(dataclasses.replace(SMALL, linear=linear, tied=tied), dtype=torch.float32)
    rows = [3, 0, 49]
    table = model.embed(torch.arange(SMALL.vocab_size).unsqueeze(0)).squeeze(0)
    assert torch.equal(rows_of(model.embed, rows), table[rows])
    if not tied:
        columns = model.unembed(torch.eye(SMALL.d_model))  # (D, V)
        torch.testing.assert_close(rows_of(model.unembed, rows), columns.T[rows])
