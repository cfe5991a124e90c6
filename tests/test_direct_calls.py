"""`cpu.try_spmm`: a call about which nothing is special goes to the kernel at once, others not."""

import contextlib
import gc
import itertools
import operator
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import DTYPES, layouts, seeds
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import sparse_kernels as sk
from sparse_kernels import cpu

K, N = 24, 16
FANS = [{"fan_in": 8}, {"fan_out": 4}]


class Subclass(torch.Tensor):
    pass


@pytest.fixture
def answers(monkeypatch):
    """What `cpu.try_spmm` answered to each call."""
    answers = []
    original = cpu.try_spmm

    def recording(*arguments):
        answers.append(original(*arguments))
        return answers[-1]

    monkeypatch.setattr(cpu, "try_spmm", recording)
    return answers


def warm(dtype=torch.float32, fan=FANS[0]):
    """A layer that has its schedule, and a token; the first call goes the long way."""
    torch.manual_seed(0)
    layer, x = sk.SparseLinear(K, N, **fan, dtype=dtype), torch.randn(1, K, dtype=dtype)
    with torch.no_grad():
        layer(x)
    return layer, x


class Recorder(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.names.add(function.name())
        return function(*arguments, **(options or {}))


def in_a_mode(layer, x):
    with Recorder() as recorder, torch.no_grad():
        y = layer(x)
    assert any(name.startswith("sparse_kernels::") for name in recorder.names)
    return y


def in_a_profiler(layer, x):
    with torch.autograd.profiler.profile(use_kineto=False) as profile, torch.no_grad():
        y = layer(x)
    assert any(event.name.startswith("sparse_kernels::") for event in profile.function_events)
    return y


SHAPES = {
    "vector": lambda make: make(K),
    "token": lambda make: make(1, K),
    "no tokens": lambda make: make(0, K),
    "matrix": lambda make: make(5, K),
    "columns": lambda make: make(K, 5).t(),
    "every other": lambda make: make(10, 2 * K)[::2, ::2],
    "one row": lambda make: make(1, K).expand(7, K),
    "batch": lambda make: make(2, 3, K),
    "last of each": lambda make: make(4, 9, K)[:, -1:],
    "one of a batch": lambda make: make(1, 1, 1, K),
}


@pytest.mark.parametrize("fan", FANS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("shape", SHAPES)
def test_an_ordinary_call_is_direct_and_gives_the_same(answers, fan, dtype, mode, shape):
    layer, _ = warm(dtype, fan)
    x = SHAPES[shape](lambda *sizes: torch.randn(sizes, dtype=dtype))
    answers.clear()
    with mode():
        y = layer(x)
        assert answers[0] is y
    assert y.is_inference() == (mode is torch.inference_mode)
    assert not y.requires_grad
    assert y.is_contiguous()
    assert (y.shape, y.dtype, y.device) == ((*x.shape[:-1], N), dtype, x.device)
    assert torch.equal(y.clone(), in_a_mode(layer, x))


@given(layouts(), st.sampled_from(DTYPES), st.booleans(), st.booleans(), seeds())
def test_a_direct_product_has_the_bits_of_a_dispatched_one(layout, dtype, transpose, biased, seed):
    generator = torch.Generator().manual_seed(seed)
    sides = (layout.in_features, layout.out_features)
    width, wanted = sides[::-1] if transpose else sides
    bias = torch.randn(wanted, generator=generator).to(dtype) if biased else None
    values = torch.randn(layout.values_shape, generator=generator).to(dtype)
    for tokens in (1, 3, 70):
        x = torch.randn(tokens, width, generator=generator).to(dtype)
        sk.sparse_linear(x, values, layout, bias, transpose=transpose)
        y = cpu.try_spmm(x, values, layout, bias, transpose)
        call = getattr(torch.ops.sparse_kernels, "grad_input" if transpose else "forward")
        pattern = layout.indices, layout.in_features, layout.block
        assert torch.equal(y, call(x, values, bias, *pattern, "cpu"))


def test_a_training_step_is_direct_inside_its_function(answers):
    layer, x = warm()
    layer(x.requires_grad_()).sum().backward()
    answers.clear()
    layer(x).sum().backward()
    assert [answer is None for answer in answers] == [True, False, False]


def neg(tensor):
    return torch._neg_view(tensor.clone())


def with_weight(layer, change):
    layer.weight = torch.nn.Parameter(change(layer.weight.detach()))


def dead_wrapper(x):
    leaked = []
    torch.func.grad(lambda z: (leaked.append(z), z.sum())[1])(x)
    return leaked[0]


def scrambled(tensor):
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


# Each changes the layer or returns another x: the result is that of an ordinary call with these.
UNUSUAL = {
    "subclass": lambda layer, x: x.as_subclass(Subclass),
    "negative view": lambda layer, x: neg(-x),
    "leaked by a transform": lambda layer, x: dead_wrapper(x),
    "zeros without memory": lambda layer, x: torch._efficientzerotensor((1, K)),
    "rows that are no matrix": lambda layer, x: torch.randn(3, 2, K).transpose(0, 1),
    "negative weight": lambda layer, x: with_weight(layer, neg),
    "scrambled weight": lambda layer, x: with_weight(layer, scrambled),
    "scattered bias": lambda layer, x: setattr(
        layer, "bias", torch.nn.Parameter(torch.randn(2 * N)[::2])
    ),
}


@pytest.mark.parametrize("fan", FANS, ids=str)
@pytest.mark.parametrize("unusual", UNUSUAL)
def test_an_unusual_tensor_is_not_read(answers, fan, unusual):
    layer, x = warm(fan=fan)
    x = x if (changed := UNUSUAL[unusual](layer, x)) is None else changed
    answers.clear()
    with torch.no_grad():
        y = layer(x)
        usual = sk.SparseLinear(K, N, **fan)
        usual.load_state_dict({name: t.clone() for name, t in layer.state_dict().items()})
        assert answers[0] is None
        expected = usual(torch.zeros(1, K) if unusual.startswith("zeros") else x.clone())
    assert torch.equal(y, expected)


def recorded(layer, x):
    y = layer(x.clone().requires_grad_())
    assert y.grad_fn is not None
    return y


def of_a_learned_weight(layer, x):
    y = layer(x)
    assert y.grad_fn is not None
    return y


def in_autocast(layer, x):
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        y = layer(x)
    assert y.dtype == torch.bfloat16
    return y


def dual(layer, x):
    with forward_ad.dual_level(), torch.no_grad():
        y, tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, x)))
    torch.testing.assert_close(tangent, y - layer.bias)
    return y


def mapped(layer, x):
    return torch.func.vmap(layer)(x[None])[0]


def differentiated(layer, x):
    with torch.no_grad():
        y, gradient = torch.func.vjp(layer, x)
        assert gradient(torch.ones_like(y))[0].any()
    return y


def with_reference(layer, x):
    layer.backend = "reference"
    with torch.no_grad():
        return layer(x)


SPECIAL = [recorded, of_a_learned_weight, in_a_mode, in_a_profiler]
SPECIAL += [in_autocast, dual, mapped, differentiated, with_reference]


@pytest.mark.parametrize("special", SPECIAL)
def test_a_call_that_something_watches_is_seen_by_it(answers, special):
    layer, x = warm()
    with torch.no_grad():
        expected = layer(x)
    assert answers[-1] is not None
    tolerance = {"atol": 0.02, "rtol": 0.02} if special is in_autocast else {}
    y = special(layer, x).detach()
    torch.testing.assert_close(y, expected, check_dtype=False, **tolerance)


WRONG = {
    "int": (TypeError, "x must be a torch.Tensor", lambda x: 3),
    "none": (TypeError, "x must be a torch.Tensor", lambda x: None),
    "sparse": (TypeError, "x must be a strided tensor", lambda x: x.to_sparse()),
    "mkldnn": (TypeError, "x must be a strided tensor", lambda x: x.to_mkldnn()),
    "integers": (TypeError, "x must be one of float32", lambda x: x.int()),
    "float16": (TypeError, "float16 runs on GPUs only", lambda x: x.half()),
    "other dtype": (TypeError, "values must be torch.float64", lambda x: x.double()),
    "meta": (ValueError, "x must be on the layout's device", lambda x: x.to("meta")),
    "scalar": (ValueError, "as its last dimension", lambda x: torch.tensor(1.0)),
    "too wide": (ValueError, "as its last dimension", lambda x: torch.ones(1, K + 1)),
    "no features": (ValueError, "as its last dimension", lambda x: torch.ones(K, 0)),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_input_is_named_after_an_ordinary_call(answers, wrong):
    layer, x = warm()
    error, message, change = WRONG[wrong]
    answers.clear()
    with torch.no_grad(), pytest.raises(error, match=message):
        layer(change(x))
    assert set(answers) == {None}


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, "values must have shape", lambda v, b: (v[1:], b)),
        (ValueError, "values must have shape", lambda v, b: (v[..., 0], b)),
        (TypeError, "values must be torch.float32", lambda v, b: (v.double(), b)),
        (TypeError, "values must be a torch.Tensor", lambda v, b: (None, b)),
        (ValueError, "bias must have shape", lambda v, b: (v, b[1:])),
        (ValueError, "bias must have shape", lambda v, b: (v, b[None])),
        (TypeError, "bias must be torch.float32", lambda v, b: (v, b.bfloat16())),
        (ValueError, "bias must be on cpu", lambda v, b: (v, b.to("meta"))),
        (TypeError, "bias must be a torch.Tensor", lambda v, b: (v, 3)),
    ],
)
def test_wrong_weights_are_named_after_an_ordinary_call(answers, error, message, change):
    layer, x = warm()
    values, bias = change(layer.weight.detach(), layer.bias.detach())
    with torch.no_grad(), pytest.raises(error, match=message):
        sk.sparse_linear(x, values, layer.layout, bias)
    assert answers[-1] is None


def test_fake_tensors_are_not_read(answers):
    layer, x = warm()
    answers.clear()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        assert layer(mode.from_tensor(x)).shape == (1, N)
    with torch.no_grad():  # after its mode
        assert layer(mode.from_tensor(x)).shape == (1, N)
    assert all(answer is None for answer in answers)


@pytest.mark.parametrize("fan", FANS, ids=str)
@pytest.mark.parametrize("how", ["data", "numpy"])
def test_a_pattern_that_changed_between_direct_calls_is_used(answers, fan, how):
    layer, x = warm(fan=fan)
    other = sk.SparseLinear(K, N, **fan)
    other.load_state_dict({**layer.state_dict(), "indices": other.indices.clone()})
    with torch.no_grad():
        before = layer(x)
        assert answers[-1] is before
        to = layer.indices.data if how == "data" else torch.from_numpy(layer.indices.numpy())
        to.copy_(other.indices)
        after = layer(x)
        assert torch.equal(after, other(x))
        assert not torch.equal(after, before)
        to[0, 0] = 1000
        with pytest.raises(ValueError, match="indices must lie in"):
            layer(x)


def test_calls_from_many_threads_at_once():
    layer, _ = warm()
    xs = [torch.randn(1 + i % 3, K) for i in range(64)]

    def call(x):
        with torch.no_grad():
            return [layer(x) for _ in range(50)]

    with torch.no_grad():
        expected = [layer(x) for x in xs]
    with ThreadPoolExecutor(8) as pool:
        for ys, wanted in zip(pool.map(call, xs), expected, strict=True):
            assert all(torch.equal(y, wanted) for y in ys)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_threads_are_those_that_torch_has_at_the_call():
    """OpenMP makes its threads when they are first wanted."""
    program = """
import os, torch, sparse_kernels as sk
torch.set_num_threads(1)
layer, x = sk.SparseLinear(64, 64, fan_in=8), torch.randn(1, 64)
with torch.no_grad():
    layer(x), layer(x)
    alone = len(os.listdir("/proc/self/task"))
    torch.set_num_threads(3)
    layer(x)
    print(len(os.listdir("/proc/self/task")) - alone)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert done.stdout.strip() == ("2" if cpu._extension.has_openmp() else "0"), done.stderr


def resident_mb():
    """Without files, whose pages come and go."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) >> 10


def refused(layer, x):
    with contextlib.suppress(ValueError):
        layer(x[:, 1:])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("count", "call"),
    [
        (10_000, lambda layer, x: layer(x)),
        (2_000, refused),
        (2_000, lambda layer, x: layer(x.as_subclass(Subclass))),
        (300, lambda layer, x: layer(x.expand(80_000, K))),  # 5 MB: memory of its own
    ],
    ids=["ordinary", "refused", "unusual", "large"],
)
def test_calls_keep_nothing(count, call):
    layer, x = warm()
    held = x, layer.weight, layer.bias, layer.indices, layer.layout

    def state():
        gc.collect()
        return [*map(sys.getrefcount, held), len(gc.get_objects()) // 50, resident_mb() // 2]

    def calls():
        for _ in range(count):
            call(layer, x)
        return state()

    with torch.no_grad():
        states = [calls() for _ in range(4)]
    # What is made once may be counted once; what a call keeps grows each time.
    pairs = itertools.pairwise(states)
    assert any(all(map(operator.le, after, before)) for before, after in pairs), states


@pytest.mark.parametrize("rows", [1, 80_000])
def test_a_result_outlives_what_it_was_made_of(rows):
    layer, x = warm()
    with torch.no_grad():
        y = layer(x.expand(rows, K))
        expected = y.clone()
    del layer, x
    row = y.numpy()[-1]
    assert y.untyped_storage().nbytes() == rows * N * 4
    assert y.data_ptr() % 64 == 0
    del y
    gc.collect()
    torch.randn(rows, N)
    assert torch.equal(torch.from_numpy(row), expected[-1])
