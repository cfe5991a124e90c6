"""Folders and the hub: what is written is read again, bit by bit; what cannot be read says why.

The hub is a server in this process that speaks as much of its protocol as huggingface_hub needs.
"""

import base64
import dataclasses
import hashlib
import json
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import test_released
import torch
from huggingface_hub import constants

from sparse_transformer import ModelConfig, Transformer, UserError, generate, load_model

TINY = ModelConfig(vocab_size=40, n_layer=1, d_model=16, context=8, d_head=4, fans={"unembed": 3})


def same(first, second):
    assert first.config == second.config
    state, other = first.state_dict(), second.state_dict()
    assert state.keys() == other.keys()
    for name, tensor in state.items():
        assert tensor.dtype == other[name].dtype
        assert torch.equal(tensor, other[name]), name


def moved(model):
    """The model with weights as training leaves them, of which none fits half precision."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.fixture(scope="module")
def small():
    return Transformer.from_pretrained("python-small")


@pytest.fixture
def unreachable(monkeypatch):
    """No hub, and no request to one either."""

    def refuse(*args, **kwargs):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)


def test_a_model_of_the_package_makes_the_round_trip(small, tmp_path, unreachable):
    folder = tmp_path / "copy"
    small.save_pretrained(folder)
    shipped = next(Path(load_model.__code__.co_filename).parent.glob("models/python-small/step-*"))
    written = (folder / "step-00000000" / "tensors.safetensors").read_bytes()
    assert written == (shipped / "tensors.safetensors").read_bytes()
    assert (folder / "tokenizer.json").read_text() == (
        shipped.parent / "tokenizer.json"
    ).read_text()
    for again in (Transformer.from_pretrained(folder), load_model(folder)):
        same(again, small)
        assert not again.training
        assert again.tokenizer.to_str() == small.tokenizer.to_str()
        assert generate(again, "def f(", 8) == generate(small, "def f(", 8)


@pytest.mark.parametrize("linear", ["sparse", "masked_dense", "dense"])
def test_weights_keep_every_bit(tmp_path, linear, unreachable):
    model = moved(Transformer(dataclasses.replace(TINY, linear=linear)))
    model.save_pretrained(tmp_path / "model")
    again = Transformer.from_pretrained(tmp_path / "model")
    same(again, model.eval())
    assert again.tokenizer is None
    same(Transformer.from_pretrained(tmp_path / "model" / "step-00000000"), model)


def test_the_card_counts_the_weights(tmp_path):
    model = Transformer(TINY)
    model.save_pretrained(tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    held = sum(layer.weight.numel() for layer in model.sparse_layers().values())
    assert f"{held:,} of {2 * 40 * 16 + 4 * 16 * 16 + 2 * 16 * 64:,} in a dense" in card
    assert 'from_pretrained("model")' in card
    model.save_pretrained(tmp_path / "other", card="mine")
    assert (tmp_path / "other" / "README.md").read_text() == "mine"


def test_folders_that_cannot_be_read_or_written(tmp_path, unreachable):
    def refused(message, name):
        with pytest.raises(UserError, match=message) as caught:
            Transformer.from_pretrained(name)
        assert "\n" not in str(caught.value)

    model, folder = Transformer(TINY), tmp_path / "model"
    model.save_pretrained(folder)
    with pytest.raises(UserError, match="is not empty: choose another folder"):
        model.save_pretrained(folder)
    with pytest.raises(UserError, match="float64"):
        Transformer(TINY, dtype=torch.float64).save_pretrained(tmp_path / "double")
    tensors = folder / "step-00000000" / "tensors.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-100])
    refused(f"{len(whole) - 100} of {len(whole)} bytes are there.*copy it again", folder)
    tensors.unlink()
    refused(r"cannot be read.*copy it again", folder)
    shutil.rmtree(tensors.parent)
    refused("its download is not complete", folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    refused("config.json is of llama, .*only models of", folder)
    (folder / "config.json").unlink()
    refused("cannot read .*name a folder with", folder)
    refused("python-smal does not exist.*did you mean python-small", "python-smal")
    with pytest.raises(UserError, match="no device 'warp'"):
        Transformer.from_pretrained(folder, device="warp")


class Hub(BaseHTTPRequestHandler):
    """Repositories by name: files by path."""

    repositories: dict[str, dict[str, bytes]]

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, content):
        self.answer(200, json.dumps(content).encode(), Content_Type="application/json")

    def files(self):
        """Of the repository in the path, or None after an answer that there is none."""
        parts = self.path.partition("?")[0].strip("/").removeprefix("api/models/").split("/")
        found = self.repositories.get("/".join(parts[:2]))
        if found is None:
            self.answer(404, X_Error_Code="RepoNotFound")
        return found

    def do_GET(self):
        files = self.files()
        if files is None:
            return
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        if "/resolve/" in self.path:
            body = files[self.path.partition("/resolve/")[2].partition("/")[2]]
            tag = f'"{hashlib.sha1(body).hexdigest()}"'
            self.answer(200, body, ETag=tag, X_Repo_Commit=commit)
        elif "/tree/" in self.path:
            self.answer_json(
                [{"type": "file", "path": p, "size": len(b), "oid": ""} for p, b in files.items()]
            )
        else:
            siblings = [{"rfilename": path} for path in files]
            self.answer_json({"id": "me/model", "sha": commit, "siblings": siblings})

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if self.path == "/api/repos/create":
            name = json.loads(body)["name"]
            self.repositories.setdefault(f"me/{name}", {})
            self.answer_json({"url": f"http://{self.headers['Host']}/me/{name}"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self.answer_json(
                {"files": [{**f, "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        elif "/commit/" in self.path:
            files = self.files()
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    del files[line["value"]["path"]]
            address = f"http://{self.headers['Host']}/me/model/commit/1"
            self.answer_json({"commitUrl": address, "commitOid": "1"})
        else:
            self.answer_json({"errors": [], "warnings": []})

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The files of its repositories."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OfThisTest", (Hub,), {"repositories": {}}))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield server.RequestHandlerClass.repositories
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_model_makes_the_round_trip_through_the_hub(hub):
    hub["me/model"] = {"step-00000007/meta.json": b"of an older upload", "notes.txt": b"kept"}
    model = moved(Transformer(TINY)).eval()
    assert model.push_to_hub("me/model", token="hf_x") == f"{constants.ENDPOINT}/me/model"
    assert {path.split("/")[0] for path in hub["me/model"]} == {
        "step-00000000", "config.json", "README.md", "notes.txt"
    }  # fmt: skip
    assert 'from_pretrained("me/model")' in hub["me/model"]["README.md"].decode()
    same(Transformer.from_pretrained("me/model", token=False), model)


def test_the_tokenizer_of_a_checkpoint_of_sparse_pretrain_comes_from_the_hub(hub, small, tmp_path):
    folder = tmp_path / "pretrain"
    folder.mkdir()
    test_released.write_pretrain(folder, "sinks", vocab_size=2048, enable_bigram_table=False)
    hub["me/model"] = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match="some/tokenizer is neither a folder here nor"):
        Transformer.from_pretrained("me/model", token=False)
    hub["some/tokenizer"] = {"tokenizer.json": small.tokenizer.to_str().encode()}
    model = Transformer.from_pretrained("me/model", token=False)
    assert model.tokenizer.to_str() == small.tokenizer.to_str()
    model.save_pretrained(tmp_path / "ours")
    again = load_model(tmp_path / "ours")
    same(again, model)
    assert generate(again, "x", 4) == generate(model, "x", 4)
    # A folder never asks the hub.
    hub.clear()
    assert Transformer.from_pretrained(folder).tokenizer is None


def test_a_hub_that_does_not_give_the_model(hub, monkeypatch):
    def refused(message, **options):
        with pytest.raises(UserError, match=message) as caught:
            Transformer.from_pretrained("me/model", token=False, **options)
        assert "\n" not in str(caught.value)

    refused("me/model is neither a folder here nor a model on the hub.*hf auth login")
    hub["me/model"] = {"config.json": b'{"settings": 1}'}
    refused("its download is not complete")
    with monkeypatch.context() as patch:
        patch.setattr(Hub, "do_GET", lambda self: self.answer(403))
        patch.setattr(Hub, "do_POST", lambda self: self.answer(403))
        refused("me/model is no folder here, and cannot be downloaded .*403", revision="new")
        with pytest.raises(UserError, match=r"me/model cannot be uploaded .*: hf auth login"):
            Transformer(TINY).push_to_hub("me/model", token=False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    refused("cannot be downloaded .*: connect to the network", revision="b")
    with pytest.raises(UserError, match=r"cannot be uploaded .*: connect to the network"):
        Transformer(TINY).push_to_hub("me/model", token=False)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused("the hub needs a package: pip install huggingface_hub")
