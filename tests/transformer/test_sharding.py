"""Two sharded ranks: the losses and checkpoints of one whole rank, in half of its memory."""

import shutil

import pytest
import torch
from test_train import command, lines_of, losses_of, run_here, start_ranks

from sparse_transformer.train import checkpoint, sharding

STEPS = 12
# Neither 301 rows nor one sink can be halved; nine validation windows leave a rank without one in
# the last batch; step 4 lies within annealing, which ends at step 6.
OPTIONS = (
    f"--steps {STEPS} --d-model 32 --d-head 32 --n-layer 2 --context 32 --vocab-size 301 "
    "--batch-tokens 256 --density 0.25 --embedding-density 0.25 --save-every 4 --validate-every 4 "
    "--validation-tokens 288 --learning-rate 0.0128 --no-tensorboard --device cpu "
    "--rank-timeout 30 --bigram-start zero"
).split()
LINEARS = ("dense", "masked_dense")


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Without `--linear`."""
    folder = tmp_path_factory.mktemp("corpus")
    for name in ("loop", "trainer", "checkpoint", "topology"):
        shutil.copy(checkpoint.__file__.replace("checkpoint", name), folder)
    return [*OPTIONS, "--data", str(folder), "--cache-dir", str(tmp_path_factory.mktemp("cache"))]


@pytest.fixture(scope="module")
def one_rank(options, tmp_path_factory):
    """Runs of a whole model, by linear."""
    outs = {linear: tmp_path_factory.mktemp(linear) / "run" for linear in LINEARS}
    for linear, out in outs.items():
        assert run_here([*options, "--linear", linear], out) == 0
    return outs


def run_sharded(options, out):
    ranks = start_ranks(command([*options, "--shard"], out))
    errors = [process.communicate(timeout=60)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(errors)


@pytest.fixture(scope="module")
def two_ranks(options, tmp_path_factory):
    """The same runs of a sharded model; the masked one adds up its gradients in two parts."""
    outs = {linear: tmp_path_factory.mktemp(f"sharded-{linear}") / "run" for linear in LINEARS}
    run_sharded([*options, "--linear", "dense"], outs["dense"])
    run_sharded([*options, "--linear", "masked_dense", "--accumulate", "2"], outs["masked_dense"])
    return outs


def assert_same_metrics(actual, expected):
    torch.testing.assert_close(losses_of(actual), losses_of(expected), rtol=1e-5, atol=0)
    for ours, theirs in zip(lines_of(actual), lines_of(expected), strict=True):
        assert ours.keys() == theirs.keys()
        assert ours["l0"] == theirs["l0"]
        assert ours["gradient_rms"] == pytest.approx(theirs["gradient_rms"], rel=1e-4)


@pytest.mark.parametrize("linear", LINEARS)
def test_two_sharded_ranks_compute_what_one_does(one_rank, two_ranks, linear):
    assert_same_metrics(two_ranks[linear], one_rank[linear])
    lines = lines_of(two_ranks[linear])
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    if linear == "masked_dense":
        assert lines[-1]["l0"] < lines[3]["l0"] < lines[0]["l0"]


def test_sharded_checkpoint_is_that_of_one_rank(one_rank, two_ranks):
    for step in (4, STEPS):
        ours = checkpoint.load(two_ranks["dense"], step)
        theirs = checkpoint.load(one_rank["dense"], step)
        assert ours.tensors.keys() == theirs.tensors.keys()
        for name, tensor in theirs.tensors.items():
            # Gradients are divided by their RMS, so all this is of the order of 1.
            torch.testing.assert_close(ours.tensors[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("sharded_first", [True, False])
def test_checkpoint_goes_on_the_other_way(options, one_rank, two_ranks, tmp_path, sharded_first):
    begun, other = (two_ranks, one_rank) if sharded_first else (one_rank, two_ranks)
    out = shutil.copytree(begun["masked_dense"], tmp_path / "run")
    if sharded_first:
        assert run_here(["--from-step", "4", "--no-shard"], out) == 0
    else:
        run_sharded(["--from-step", "4"], out)
    assert list(out.glob(f"set-aside-*/step-{STEPS:08d}"))
    assert_same_metrics(out, other["masked_dense"])


IN_HALF = """
import sys
import torch
from torch.distributed.tensor import DTensor
from sparse_transformer.train import checkpoint
from sparse_transformer.data import prepare
from sparse_transformer.train.masked_dense import project_
from sparse_transformer.model import Transformer
from sparse_transformer.train.distributed import leave, ranks
from sparse_transformer.train.sharding import whole
from sparse_transformer.cli.train import parse
from sparse_transformer.train.trainer import Trainer

def held(slices):
    storages = [piece.to_local().untyped_storage() for piece in slices]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

def gradients(compute=None):
    trainer._compiled = compute
    trainer._gradients()
    return [whole(parameter.grad).clone() for parameter in parameters]

def assert_close(actual, expected):
    # Gradients that were divided by their RMS.
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)

settings, out, step = parse()
train = settings.train
corpus = prepare(train.data, vocab_size=settings.model.vocab_size, cache_dir=train.cache_dir)
point = checkpoint.load(out, step)
model = Transformer.from_state(settings.model, checkpoint.part(point.tensors, "model"))
with ranks("cpu", 30) as here:
    trainer = Trainer(settings, corpus, here, point)

    # What was read is what would be written, bit for bit, by the first rank.
    tensors, _ = trainer.state()
    assert tensors.keys() == (point.tensors.keys() if here.first else set())
    assert all(torch.equal(tensor, point.tensors[name]) for name, tensor in tensors.items())

    # While a block computes, another is in slices; so is all after a validation.
    pieces = []
    first, second = trainer.model.blocks
    def look(*_):
        pieces.extend([first.attn.sinks, second.attn.sinks])
    second.register_forward_hook(look, prepend=True)
    trainer.validate()
    assert [isinstance(piece, DTensor) for piece in pieces[:2]] == [True, False]
    assert all(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())

    parameters = list(trainer.model.parameters())
    compiled = torch.compile(trainer.model.loss, backend="aot_eager")
    assert_close(gradients(compiled), gradients())
    assert sum(p.to_local().numel() for p in parameters) < sum(p.numel() for p in parameters)
    half = 2 * sum(p.numel() for p in parameters)
    states = [trainer.optimizer.state[p] for p in parameters]
    for kind, slices in {
        "parameters": parameters,
        "gradients": [p.grad for p in parameters],
        "first moments": [state["exp_avg"] for state in states],
        "second moments": [state["exp_avg_sq"] for state in states],
    }.items():
        assert 0.98 * half < held(slices) < 1.02 * half, (kind, held(slices), half)

    before = model.get_parameter("blocks.1.mlp.up.weight").clone()
    project_(model)
    project_(trainer.model)
    assert not torch.equal(model.get_parameter("blocks.1.mlp.up.weight"), before)
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(whole(parameter), model.get_parameter(name)), name
    # Not those of the weights that were there when it was compiled.
    assert_close(gradients(compiled), gradients())
leave(0)
"""


def test_rank_holds_half_and_loses_nothing(one_rank):
    """From a checkpoint: what is read, held, computed, projected and would be written again."""
    arguments = ["--shard", "--from-step", "4", "--out", str(one_rank["masked_dense"])]
    processes = start_ranks(["-c", IN_HALF, *arguments])
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)


@pytest.mark.parametrize(
    ("linear", "match"),
    [
        ("sparse", "the state of --linear sparse is proportional to L0"),
        ("dense", "needs several ranks and this is one alone: start with torchrun"),
    ],
)
def test_shard_that_cannot_be_is_refused(options, tmp_path, capsys, linear, match):
    assert run_here([*options, "--linear", linear, "--shard"], tmp_path / "run") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert match in error
    assert "leave --shard out" in error
    assert checkpoint.steps(tmp_path / "run") == []


def test_sparse_model_is_refused_on_two_ranks_too():
    assert "L0" in sharding.why_not("sparse", 2)
    assert [sharding.why_not(linear, 2) for linear in LINEARS] == [None, None]
