"""A pattern that was written to `indices` in any way is used or refused, and ranks must agree."""

import copy
import os
import pickle
import subprocess
import sys
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from oracle import to_dense

import sparse_kernels as sk
from sparse_kernels.layout import checksum

K, N = 16, 12


def pair():
    layer, other = (sk.SparseLinear(K, N, fan_in=4) for _ in range(2))
    layer(torch.randn(3, K))
    return layer, other.indices


def numpy_view(layer, indices):
    layer.indices.numpy()[:] = indices.numpy()


def swapped(layer, indices):
    torch.utils.swap_tensors(layer.indices, indices.clone())


def storage(layer, indices):
    view = torch.empty(0, dtype=torch.int32).set_(layer.indices.untyped_storage())
    view.copy_(indices.flatten())


def hidden_version(layer, indices):
    with torch.autograd._unsafe_preserve_version_counter(layer.indices):
        layer.indices.copy_(indices)


def load_hook(layer, indices):
    def write(module, incompatible_keys):
        module.indices.data.copy_(indices)

    layer.register_load_state_dict_post_hook(write)
    layer.load_state_dict(layer.state_dict())


def one_entry(layer, indices):
    """The least that a write can change."""
    free = sorted(set(range(K)) - set(layer.indices[5].tolist()))
    row = torch.tensor(sorted([*layer.indices[5, 1:].tolist(), free[0]]), dtype=torch.int32)
    layer.indices.data[5] = row


WRITES = {
    "data": lambda layer, indices: layer.indices.data.copy_(indices),
    "state dict": lambda layer, indices: layer.state_dict()["indices"].data.copy_(indices),
    "assignment": lambda layer, indices: setattr(layer, "indices", indices.clone()),
    "numpy": numpy_view,
    "swap_tensors": swapped,
    "storage": storage,
    "hidden version": hidden_version,
    "load hook": load_hook,
    "one entry": one_entry,
}


@pytest.mark.parametrize("name", WRITES)
def test_a_pattern_is_used_however_it_was_written(name):
    layer, indices = pair()
    before = layer.layout
    WRITES[name](layer, indices)
    x = torch.randn(3, K, dtype=torch.float64)
    layer.double()
    weight = to_dense(layer.weight.detach(), sk.FanInLayout(layer.indices, K))
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, weight, layer.bias))
    assert layer.layout != before


@pytest.mark.parametrize("name", [name for name in WRITES if name != "one entry"])
def test_a_bad_pattern_is_refused_however_it_was_written(name):
    layer, indices = pair()
    WRITES[name](layer, torch.full_like(indices, 2**30))
    with pytest.raises(ValueError, match="indices"):
        layer(torch.randn(3, K))


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_follows_what_is_written_into_it(copier):
    """Its counter of writes may well agree with the one that the original had."""
    layer, indices = pair()
    made = copier(layer)
    with torch.no_grad():
        made.indices.copy_(indices)
    assert torch.equal(made.layout.indices, indices)
    assert not torch.equal(layer.layout.indices, indices)


def test_an_average_of_a_rewired_layer_is_of_its_pattern():
    layer, indices = pair()
    average = torch.optim.swa_utils.AveragedModel(layer, use_buffers=True)
    sk.rewire_(layer, None, sk.FanInLayout(indices, K))
    for _ in range(2):
        average.update_parameters(layer)
    x = torch.randn(3, K)
    assert average.module.layout == layer.layout
    torch.testing.assert_close(average(x), layer(x))


def test_a_layer_built_in_inference_mode_sees_writes():
    with torch.inference_mode():
        layer, indices = pair()
        layer.indices.copy_(indices)
        layer(torch.randn(3, K))
        assert torch.equal(layer.layout.indices, indices)


def test_compiled_code_uses_or_refuses_a_hidden_write():
    layer, indices = pair()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, K)
    before = compiled(x)
    layer.indices.data.copy_(indices)
    after = compiled(x)
    assert layer.layout == sk.FanInLayout(indices, K)
    torch.testing.assert_close(after, layer(x))
    assert not torch.allclose(before, after)
    layer.indices.data.fill_(2**30)
    with pytest.raises(ValueError, match="must lie in"):
        compiled(x)


def test_emptied_memory_is_no_pattern_until_one_is_written():
    layer, indices = pair()
    layer.to_empty(device="cpu")
    with pytest.raises(RuntimeError, match="no pattern"):
        layer(torch.randn(3, K))
    layer.indices.data.copy_(indices)
    assert torch.equal(layer.layout.indices, indices)


# ---- the checksum


def test_checksum_sees_changes_that_cancel_in_sums():
    """Differences of third order, at the distance of one lane's entries."""
    entries = torch.arange(4096, dtype=torch.int32)
    changed = entries.clone()
    changed[torch.arange(4) * 8 + 100] += torch.tensor([1, -3, 3, -1], dtype=torch.int32)
    assert checksum(changed) != checksum(entries)


@pytest.mark.parametrize("size", [1, 7, 63, 64, 65, 127, 128, 1000, 4096])
def test_checksum_sees_every_change_and_order(size):
    generator = torch.Generator().manual_seed(size)
    entries = torch.randint(2048, (size,), generator=generator, dtype=torch.int32)
    seen = {checksum(entries)}
    assert checksum(entries.clone()) in seen
    for place in range(size):
        changed = entries.clone()
        changed[place] += 1
        seen.add(checksum(changed))
    assert len(seen) == size + 1
    # Swaps of different neighbours at every distance, and sums that cancel.
    others = set()
    for distance in range(1, size):
        changed = entries.clone()
        changed[0] -= 5
        changed[distance] += 5
        others.add(checksum(changed))
    for step in range(1, size // 2):
        changed = entries.clone()
        changed[[0, step, 2 * step]] += torch.tensor([1, -2, 1], dtype=torch.int32)
        others.add(checksum(changed))
    assert len(others) == max(size - 1, 0) + max(size // 2 - 1, 0)
    assert not others & seen


def test_checksum_does_not_depend_on_strides():
    table = torch.arange(600, dtype=torch.int32).view(20, 30)
    assert checksum(table.t()) == checksum(table.t().contiguous()) != checksum(table)


# ---- ranks


def initialized(rank, port, run, *arguments):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    patience = timedelta(minutes=2)  # a rank that waits in vain is a failure
    dist.init_process_group("gloo", timeout=patience, rank=rank, world_size=2)
    try:
        run(rank, *arguments)
    finally:
        dist.destroy_process_group()


def spawn(run, *arguments):
    port = int(np.random.default_rng().integers(20000, 60000))
    mp.start_processes(initialized, (port, run, *arguments), 2, start_method="forkserver")


def same_everywhere(indices):
    first = indices.clone()
    dist.broadcast(first, 0)
    return torch.equal(first, indices)


def follow_the_first_rank(rank):
    torch.manual_seed(rank)
    layer, x = sk.SparseLinear(K, N, fan_in=4), torch.ones(3, K)
    layer(x)
    assert same_everywhere(layer.indices) == (rank == 0)
    for tensor in layer.state_dict().values():
        dist.broadcast(tensor, 0)
    layer(x)
    assert torch.equal(layer.layout.indices, layer.indices)
    if rank == 0:
        dist.send(sk.FanInLayout.random(N, K, 4).indices, 1)
    else:
        dist.recv(layer.indices, 0)
        layer(x)
        assert torch.equal(layer.layout.indices, layer.indices)

    torch.manual_seed(rank)
    wrapped = torch.nn.parallel.DistributedDataParallel(sk.SparseLinear(K, N, fan_in=4))
    wrapped(x)
    if rank == 1:
        sk.rewire_(wrapped.module, None, sk.FanInLayout.random(N, K, 4))
    wrapped(x)
    assert same_everywhere(wrapped.module.layout.indices)


@pytest.mark.slow
def test_ranks_follow_collectives_and_broadcast_buffers():
    spawn(follow_the_first_rank)


def without_broadcast(rank):
    DDP = torch.nn.parallel.DistributedDataParallel
    torch.manual_seed(0)
    same = DDP(sk.SparseLinear(K, N, fan_in=4), broadcast_buffers=False)
    for _ in range(2):
        same(torch.ones(3, K)).sum().backward()
    torch.manual_seed(rank)
    model = torch.nn.Sequential(
        sk.SparseLinear(K, N, fan_in=4), torch.nn.ReLU(), sk.SparseLinear(N, N, fan_in=4)
    )
    different = DDP(model, broadcast_buffers=False)
    with pytest.raises(RuntimeError, match=r"different patterns .* in 0, 2"):
        different(torch.ones(3, K))

    sk.check_ranks(same)
    sk.check_ranks(torch.nn.ReLU())
    layout = sk.FanInLayout.random(N, K, 4)  # drawn from a seed that is the rank's
    if rank == 1:
        sk.rewire_(same.module, None, layout)
    same(torch.ones(3, K)).sum().backward()  # compared at the first forward alone
    with pytest.raises(RuntimeError, match=r"different patterns .* in module: .*same layout"):
        sk.check_ranks(same)
    dist.broadcast(same.module.indices, 0)
    sk.check_ranks(same.module)


@pytest.mark.slow
def test_ranks_with_different_patterns_are_refused_where_nothing_is_broadcast():
    spawn(without_broadcast)


def with_different_layers(rank):
    def layer(in_features=K, block=(1, 1), **fan):
        return sk.SparseLinear(in_features, N, block=block, **(fan or {"fan_in": 4}))

    def nested(*layers):
        return torch.nn.Sequential(*layers)

    with torch.device("meta"):
        meta = layer()
    base = layer()
    indices = sk.FanInLayout.random(K, K, 4, generator=torch.Generator().manual_seed(0)).indices
    fans = [sk.SparseLinear(K, K, **{fan: 4}) for fan in ("fan_in", "fan_out")]
    for one in fans:
        one.indices.copy_(indices)
    for other, message in (
        (torch.nn.ReLU(), "number, names, shapes, blocks, direction"),
        (nested(base, layer()), "number, names"),
        (nested(base), r"layers, in their names: build"),
        (layer(2 * K), r"in their shapes: build"),
        (layer(block=(2, 1)), "in their shapes, blocks: build"),
        (meta, r"different patterns \(indices\) in the model: build"),
    ):
        with pytest.raises(RuntimeError, match=message):
            sk.check_ranks(base if rank == 0 else other)
    with pytest.raises(RuntimeError, match=r"in their direction \(fan_in or fan_out\): build"):
        sk.check_ranks(fans[rank])
    sk.check_ranks(meta)
    sk.check_ranks(fans[0])
    sk.check_ranks(torch.nn.ReLU())


@pytest.mark.slow
def test_ranks_with_different_layers_are_refused():
    spawn(with_different_layers)


def with_one_rank_evaluating(rank):
    torch.manual_seed(0)
    layer, x = sk.SparseLinear(K, N, fan_in=4), torch.ones(3, K)
    # A comparison of one rank alone waits this long for the others and then fails.
    group = dist.new_group(timeout=timedelta(seconds=20))
    model = torch.nn.parallel.DistributedDataParallel(
        layer, process_group=group, broadcast_buffers=False
    )
    if rank == 0:
        with torch.no_grad():
            model(x)
    dist.barrier()
    if rank == 1:
        sk.rewire_(layer, None, sk.FanInLayout.random(N, K, 4))
    with pytest.raises(RuntimeError, match=r"different patterns .* in the model"):
        model(x)


@pytest.mark.slow
def test_one_rank_may_evaluate_alone_before_patterns_are_compared():
    spawn(with_one_rank_evaluating)


def with_uneven_inputs(rank):
    torch.manual_seed(0)
    layer, x = sk.SparseLinear(K, N, fan_in=4), torch.ones(3, K)
    group = dist.new_group(timeout=timedelta(seconds=20))
    model = torch.nn.parallel.DistributedDataParallel(
        layer, process_group=group, broadcast_buffers=False
    )
    with model.join():
        for _ in range(2 * rank):
            model(x).sum().backward()


@pytest.mark.slow
def test_a_rank_without_inputs_may_join():
    spawn(with_uneven_inputs)


def test_check_ranks_takes_a_module():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        sk.check_ranks([1])


def sharded_from_meta(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(rank)
    with torch.device("meta"):
        model = torch.nn.Sequential(
            sk.SparseLinear(K, N, fan_in=4), sk.SparseLinear(N, N, fan_in=4)
        )
    mesh = init_device_mesh("cpu", (2,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    for layer in model:
        layer.reset_parameters()
    y = model(torch.ones(3, K))
    y.sum().backward()
    for layer in model:
        assert same_everywhere(layer.layout.indices)
    assert same_everywhere(y.detach())


@pytest.mark.slow
def test_sharded_layers_made_on_meta_get_one_pattern():
    spawn(sharded_from_meta)


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("name", ["x", "weight", "bias", "indices"])
def test_a_tensor_whose_memory_was_given_back_is_not_read(name, recorded):
    layer, _ = pair()
    tensors = {"x": torch.randn(3, K), **dict(layer.named_parameters()), "indices": layer.indices}
    tensors[name].untyped_storage().resize_(0)
    with torch.set_grad_enabled(recorded), pytest.raises(RuntimeError, match="resized to 0"):
        layer(tensors["x"])


@pytest.mark.parametrize("name", ["weight", "indices"])
def test_a_state_whose_memory_was_given_back_is_not_assigned(name):
    layer, _ = pair()
    state = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    state[name].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=f"{name}.* storage was resized to 0"):
        layer.load_state_dict(state, assign=True)


@pytest.mark.parametrize("recorded", [True, False])
def test_a_layer_without_its_buffer_does_not_use_its_last_pattern(recorded):
    (removed, _), (moved, _) = pair(), pair()
    removed.indices = None
    moved.indices = moved.indices.to("meta")
    for layer, message in ((removed, "needs its buffer"), (moved, "has no pattern")):
        with torch.set_grad_enabled(recorded), pytest.raises(RuntimeError, match=message):
            layer(torch.randn(3, K))


def test_a_traced_graph_reads_the_buffer():
    layer, indices = pair()
    x = torch.randn(3, K)
    graph = torch.fx.experimental.proxy_tensor.make_fx(layer)(x)
    layer.indices.copy_(indices)
    assert torch.equal(graph(x), layer(x))


AT_EXIT = """
import sys, time
import torch.distributed as dist
import sparse_kernels
time.sleep = lambda seconds: print("waits")
if sys.argv[1] == "group":
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
"""


@pytest.mark.parametrize(("has_group", "said"), [("group", "waits\n"), ("none", "")])
def test_a_process_that_ends_with_a_group_lets_gloo_end(has_group, said):
    """Else a thread of gloo that still frees what was broadcast aborts some of these processes."""
    done = subprocess.run(
        [sys.executable, "-c", AT_EXIT, has_group], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, said), done.stderr
