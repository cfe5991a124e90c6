"""How calls reach a kernel: alone, compiled, exported, counted, traced; and at what cost."""

import resource
import subprocess
import sys

import fuzz
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import sparse_kernels as sk
from sparse_kernels import checks, ops, reference


# PyTorch looks at .grad of what a layer before made while it compiles the next.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_equal_layers_share_their_graphs():
    torch._dynamo.reset()
    count = CompileCounterWithBackend("aot_eager")
    model = torch.nn.Sequential(*[sk.SparseLinear(16, 16, fan_in=4) for _ in range(12)])
    for layer in model:
        layer.compile(fullgraph=True, backend=count)
    x = torch.randn(3, 16)
    y = model(x)
    assert count.frame_count <= 2
    with torch.no_grad():
        expected = x
        for layer in model:
            expected = layer.forward(expected)
    assert torch.equal(y.detach(), expected)


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("fan", ["fan_in", "fan_out"])
def test_an_exported_layer_computes_no_schedule_and_takes_a_new_pattern(fan, strict):
    layer, other = (sk.SparseLinear(32, 48, **{fan: 16}) for _ in range(2))
    x = torch.randn(3, 32)
    program = torch.export.export(layer, (x,), strict=strict).module()
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    product = "forward" if fan == "fan_in" else "grad_input"
    assert f"sparse_kernels.{product}.default" in called
    assert not [name for name in called if "sort" in name or "schedule" in name]
    assert torch.equal(program(x), layer(x))
    program.load_state_dict(other.state_dict())
    assert torch.equal(program(x), other(x))
    program.load_state_dict({**other.state_dict(), "indices": torch.full_like(other.indices, 99)})
    with pytest.raises(ValueError, match="indices must lie in"):
        program(x)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_an_exported_layer_refuses_a_derivative_that_it_would_drop(strict):
    layer, x = sk.SparseLinear(8, 6, fan_in=4), torch.randn(3, 8)
    program = torch.export.export(layer, (x,), strict=strict).module()
    x.requires_grad_()
    y = program(x)
    assert torch.equal(y, layer(x))
    with pytest.raises(RuntimeError, match="no derivative by itself, as in an exported program"):
        (y.sum() + x.sum()).backward()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_packaged_model_runs_where_the_package_is_imported(tmp_path):
    """AOTInductor; the operators are Python's, so a process must import sparse_kernels first."""
    layers = [sk.SparseLinear(32, 64, fan_in=8), torch.nn.GELU()]
    model = torch.nn.Sequential(*layers, sk.SparseLinear(64, 32, fan_out=8)).eval()
    x = torch.randn(4, 32)
    path = str(tmp_path / "model.pt2")
    torch._inductor.aoti_compile_and_package(torch.export.export(model, (x,)), package_path=path)
    torch.testing.assert_close(torch._inductor.aoti_load_package(path)(x), model(x))


def test_an_op_sees_indices_that_were_written_to():
    layout, other = (sk.FanInLayout.random(8, 6, 3) for _ in range(2))
    values, x, indices = torch.randn(layout.values_shape), torch.randn(2, 6), layout.indices.clone()
    call = torch.ops.sparse_kernels.forward

    def run():
        return call(x, values, None, indices, 6, (1, 1), "cpu")

    assert torch.equal(run(), sk.sparse_linear(x, values, layout))
    indices.data.copy_(other.indices)  # does not count as a write
    assert torch.equal(run(), sk.sparse_linear(x, values, other))
    indices.data[0, 0] = 6
    with pytest.raises(ValueError, match=r"indices must lie in \[0, 6\)"):
        run()


def test_patterns_of_tensors_that_are_gone_are_forgotten():
    def gone():
        return sum(known.storage.expired() for known in ops._known.values())

    for _ in range(5):
        ops.layout_of(sk.FanInLayout.random(8, 6, 3).indices.clone(), 6, (1, 1))
    assert gone() <= 1


@pytest.mark.parametrize("block", [(1, 1), (4, 2)])
def test_the_flop_counter_counts_the_products(block):
    layer = sk.SparseLinear(32, 64, fan_in=8, block=block)
    x = torch.randn(3, 5, 32, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 15 * 64 * 8


@pytest.mark.slow
def test_the_flop_counter_is_not_imported_before_it_is_wanted():
    program = "import sys, sparse_kernels; print('torch.utils.flop_counter' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "False"


@pytest.mark.filterwarnings("ignore:.*jit:DeprecationWarning")
def test_tracers_are_refused_with_a_sentence():
    layer, x = sk.SparseLinear(6, 8, fan_in=3), torch.randn(2, 6)
    with pytest.raises(RuntimeError, match=r"use torch\.export"):
        torch.jit.trace(layer, (x,))
    with pytest.raises(RuntimeError, match=r"trace .* use torch\.export"):
        torch.jit.trace(lambda x: sk.grad_weight(x[:, :1].expand(2, 8), x, layer.layout), (x,))
    with pytest.raises(RuntimeError, match=r"script .* use torch\.export"):
        torch.jit.script(torch.nn.Sequential(layer))
    with pytest.raises(TypeError, match=r"symbolic_trace cannot trace it: use torch\.export"):
        torch.fx.symbolic_trace(torch.nn.Sequential(layer))


def test_fake_tensors_meet_no_kernel():
    layer, x = sk.SparseLinear(6, 8, fan_in=3), torch.randn(2, 6)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = layer(mode.from_tensor(x))
    assert (y.shape, y.dtype) == ((2, 8), torch.float32)


@pytest.mark.parametrize("fan", ["fan_in", "fan_out"])
def test_a_layer_made_in_a_fake_mode_gives_shapes(fan):
    with FakeTensorMode():
        layer = sk.SparseLinear(6, 8, **{fan: 4})
        x = torch.randn(2, 6, requires_grad=True)
        y = torch.nn.Sequential(layer)(x)
        y.sum().backward()
        assert (y.shape, y.dtype) == ((2, 8), torch.float32)
        assert (x.grad.shape, layer.weight.grad.shape) == ((2, 6), layer.weight.shape)
        layer.reset_parameters()
        layer.load_state_dict(layer.state_dict())
        with pytest.raises(RuntimeError, match=r"no pattern yet: .* FakeTensorMode"):
            _ = layer.layout


def test_what_reads_values_refuses_fake_tensors():
    layout = sk.FanInLayout.random(8, 6, 3)
    with FakeTensorMode() as mode:
        indices, linear = mode.from_tensor(layout.indices), torch.nn.Linear(6, 8)
        calls = {
            "indices": lambda: sk.FanInLayout(indices, 6),
            "a random layout": lambda: sk.FanInLayout.random(8, 6, 3),
            "weight": lambda: sk.from_dense(linear.weight, 3),
            "module '0': weight": lambda: sk.sparsify_(torch.nn.Sequential(linear), fan_in=3),
        }
        for name, call in calls.items():
            with pytest.raises(ValueError, match=f"^{name} must hold values, got a FakeTensor"):
                call()


def test_lists_are_not_built_while_a_cuda_graph_is_captured(monkeypatch):
    """What is allocated during a capture belongs to the graph: caching it would give garbage."""
    with FakeTensorMode():
        indices = torch.empty(8, 3, dtype=torch.int32, device="cuda:0")
    layout = sk.FanInLayout._wrap(indices, 64, (16, 16))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for build in (
        lambda: ops.layout_of(indices, 64, (16, 16)),
        lambda: layout.derive("cuda.rows", lambda this: (this.indices,)),
    ):
        with pytest.raises(RuntimeError, match="while a CUDA graph is captured: run the step once"):
            build()
    checks.refuse_capture(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    checks.refuse_capture(torch.device("cuda"))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_pruned_spreads_nothing(backend, bad):
    layout = sk.FanInLayout(torch.tensor([[1, 2], [0, 2]]), 4)
    values = torch.ones(layout.values_shape)
    x = torch.tensor([[1.0, 2.0, 3.0, bad]])
    y = sk.sparse_linear(x, values, layout, backend=backend)
    assert torch.equal(y, torch.tensor([[5.0, 4.0]]))
    grad_output = torch.tensor([[bad, 1.0]])
    grad = sk.sparse_linear(grad_output, values, layout, backend=backend, transpose=True)
    assert torch.equal(grad[:, [0, 3]], torch.tensor([[1.0, 0.0]]))


@pytest.mark.parametrize("lopsided", [False, True])
def test_a_long_sum_over_few_blocks_is_as_exact_as_a_dense_one(lopsided):
    """Many outputs that share few inputs: the scatter would add them up one by one."""
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        layout = sk.FanInLayout.random(8192, 16, 2, (4, 1), generator=generator)
        if lopsided:  # few blocks for each input, but for the first, which all outputs read
            indices = torch.randint(1, 2048, (2048, 1), generator=generator)
            layout = sk.FanInLayout(torch.nn.functional.pad(indices, (1, 0)), 2048, 8192, (4, 1))
        values = torch.randn(layout.values_shape, generator=generator)
        grad_output = torch.randn(40, 8192, generator=generator)
        weight = reference.to_dense(values, layout)
        truth = grad_output.double() @ weight.double()
        actual = sk.sparse_linear(grad_output, values, layout, transpose=True)
        own = (grad_output @ weight - truth)[:, :16].abs().max()
        error = (actual - truth)[:, :16].abs().max()
        assert error <= 2 * own + torch.finfo(torch.float32).eps * truth.abs().max()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_the_default_device_is_not_that_of_results(backend):
    """What a kernel writes to lies where the inputs do: a pointer into meta memory is null."""
    x, grad, weight = torch.randn(3, 8), torch.randn(3, 6), torch.randn(8)
    qkv, sinks = torch.randn(2, 5, 3, 2, 4), torch.randn(2)
    states = [sk.SparseLinear(8, 6, **fan).state_dict() for fan in ({"fan_in": 4}, {"fan_out": 3})]

    def run():
        results = []
        for state, transpose in zip(states, (False, True), strict=True):
            layout = sk.FanInLayout(state["indices"], *((6, 8) if transpose else (8, 6)))
            leaves = [t.clone().requires_grad_() for t in (x, state["weight"], state["bias"])]
            y = sk.sparse_linear(
                *leaves[:2], layout, leaves[2], backend=backend, transpose=transpose
            )
            results += y.detach(), *torch.autograd.grad(y, leaves, grad)
        y, scales = ops.norm_abs_topk(x, weight, 2, 1e-6, backend)
        results += y, scales, *ops.norm_abs_topk_backward(x, y, x, weight, scales, backend)
        y = ops.gelu_abs_topk(x, 2, backend)
        results += y, ops.gelu_abs_topk_backward(x, y, x, backend)
        y, lse = ops.attention(*qkv.unbind(2), sinks, backend)
        results += y, lse, *ops.attention_backward(qkv, sinks, y, lse, y, backend)
        return results

    wanted = run()
    with torch.device("meta"):
        got = run()
    for one, other in zip(got, wanted, strict=True):
        assert one.is_cpu
        assert torch.equal(one, other)


@pytest.mark.slow
def test_large_results_do_not_fault_page_by_page():
    torch.use_deterministic_algorithms(False)  # it would fill the memory, and fault first
    layer = sk.SparseLinear(2048, 8192, fan_in=8)
    x = torch.randn(2048, 2048)
    with torch.no_grad():
        layer(x)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        layer(x)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    small_pages = 2048 * 8192 * 4 // 4096
    assert faults < small_pages / 8


@pytest.mark.parametrize("seed", range(20))
def test_fuzzer(seed):
    fuzz.check(seed)


@pytest.mark.parametrize("isa", sk.cpu.isas())
@pytest.mark.parametrize("seed", [501389, 2000311])
def test_what_the_fuzzer_found(seed, isa):
    """Sums over 2,100 tokens: of equal terms in float64, and of very different ones in float32."""
    fuzz.check(seed, [isa])
