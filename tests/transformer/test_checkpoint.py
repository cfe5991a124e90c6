"""Checkpoints: complete or absent, whatever happens; damage is noticed and named."""

import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

from sparse_transformer.errors import UserError
from sparse_transformer.train import checkpoint


def tensors(seed: int, size: int = 1000) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(size, 1, 1, generator=generator),
        "half": torch.randn(7, generator=generator).bfloat16(),
        "indices": torch.arange(5, dtype=torch.int32),
        "state": torch.randint(256, (16,), generator=generator, dtype=torch.uint8),
        "step": torch.tensor(3.0),
        "empty": torch.empty(0, 4),
    }


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=0)


def test_what_was_saved_is_loaded(tmp_path):
    meta = {"loss": 0.1 + 0.2, "names": ["a"], "none": None}
    path = checkpoint.save(tmp_path, 7, tensors(0), meta)
    assert path == tmp_path / "step-00000007"
    for loaded in (checkpoint.load(tmp_path), checkpoint.load(path), checkpoint.load(tmp_path, 7)):
        assert (loaded.step, loaded.path, loaded.meta) == (7, path, meta)
        assert_same(loaded.tensors, tensors(0))
    assert checkpoint.load(path, prefix="ind").tensors.keys() == {"indices"}


def test_newest_is_loaded_and_old_ones_go(tmp_path):
    for step in (5, 90, 10_000_000, 123_456_789):
        checkpoint.save(tmp_path, step, tensors(step), {}, keep=2)
    assert checkpoint.steps(tmp_path) == [10_000_000, 123_456_789]
    assert_same(checkpoint.load(tmp_path).tensors, tensors(123_456_789))
    assert_same(checkpoint.load(tmp_path, 10_000_000).tensors, tensors(10_000_000))
    one = tmp_path / "step-10000000"
    assert checkpoint.load(one).step == checkpoint.load(one, 10_000_000).step == 10_000_000
    with pytest.raises(UserError, match="is the checkpoint of step 10000000 and not of step 5"):
        checkpoint.load(one, 5)
    with pytest.raises(UserError, match=r"no checkpoint of step 5.*there are 10000000, 123456789"):
        checkpoint.load(tmp_path, 5)
    with pytest.raises(ValueError, match="exists already"):
        checkpoint.save(tmp_path, 123_456_789, tensors(0), {})


def test_nothing_to_load(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="there is no checkpoint in"):
        checkpoint.load(tmp_path)
    with pytest.raises(UserError, match=r"no model of that name: there are .*python-small"):
        checkpoint.load(tmp_path / "missing")
    monkeypatch.setattr(checkpoint, "MODELS", [])
    with pytest.raises(UserError, match="missing does not exist: name the folder of a training"):
        checkpoint.load(tmp_path / "missing")


@pytest.mark.parametrize("name", ["tensors.safetensors", "meta.json"])
@pytest.mark.parametrize("damage", ["truncated", "emptied", "altered", "removed"])
def test_damage_is_noticed_and_the_older_one_named(tmp_path, name, damage):
    checkpoint.save(tmp_path, 10, tensors(10), {"a": 1})
    path = checkpoint.save(tmp_path, 20, tensors(20), {"a": 2}) / name
    content = bytearray(path.read_bytes())
    if damage == "removed":
        path.unlink()
    elif damage == "altered":
        # In the middle of the weights, or of the hash.
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        path.write_bytes(content[: len(content) // 2 if damage == "truncated" else 0])
    with pytest.raises(UserError, match=r"step-00000020 cannot be read .*--step 10") as caught:
        checkpoint.load(tmp_path)
    assert "\n" not in str(caught.value)
    assert_same(checkpoint.load(tmp_path, 10).tensors, tensors(10))
    checkpoint.remove(tmp_path, 10)
    with pytest.raises(UserError, match="there is no older one"):
        checkpoint.load(tmp_path)


def test_full_disk_harms_nothing(tmp_path):
    """A limit on the size of a file stands for the disk that is full."""
    checkpoint.save(tmp_path, 1, tensors(1), {})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"step 2 cannot be written .* step 1 is unharmed"):
            checkpoint.save(tmp_path, 2, tensors(2, size=100_000), {}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ["step-00000001"]
    assert_same(checkpoint.load(tmp_path).tensors, tensors(1))


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written .*make the folder writable"):
        checkpoint.save(tmp_path / "file", 1, tensors(1), {})


WRITER = """
import sys, torch
from sparse_transformer.train import checkpoint
step = 0
while True:
    step += 1
    tensors = {"a": torch.full((300_000,), float(step))}
    checkpoint.save(sys.argv[1], step, tensors, {"s": step}, keep=2)
    print(step, flush=True)
"""


@pytest.mark.slow
def test_killed_writer_leaves_only_complete_checkpoints(tmp_path):
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, tmp_path], stdout=subprocess.PIPE, env=environment
    )
    for delay_ms in (3, 7):
        process.stdout.readline()
        time.sleep(delay_ms / 1000)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    found = checkpoint.steps(tmp_path)
    assert found
    for step in found:
        loaded = checkpoint.load(tmp_path, step)
        assert loaded.meta == {"s": step}
        assert (loaded.tensors["a"] == step).all()
    # What it may have left behind goes with the next one.
    checkpoint.save(tmp_path, 10**7, tensors(1), {}, keep=1)
    assert os.listdir(tmp_path) == ["step-10000000"]


def test_later_ones_are_set_aside_not_deleted(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, tensors(step), {})
    moved = checkpoint.set_aside(tmp_path, 1)
    assert checkpoint.steps(tmp_path) == [1]
    assert_same(checkpoint.load(moved[-1]).tensors, tensors(3))
