"""Which backend is taken and why, and the offer of a dense layer, which is never taken silently."""

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import sparse_kernels as sk
from benchmarks import break_even as benchmark
from sparse_kernels import backends, break_even, cpu
from sparse_kernels.break_even import Key, Measured
from sparse_kernels.layout import Problem

ROOT = Path(__file__).resolve().parents[1]
X = torch.ones(3, 64)


def layout_of(block=(1, 1), fan_in=32):
    return sk.FanInLayout.random(64, 64, fan_in, block)


# --- explain -----------------------------------------------------------------------------------

sides = st.sampled_from([1, 2, 8, 15, 16, 32, 128])


@st.composite
def situations(draw):
    """A problem, the backends that can run it, and the one asked for, if any."""
    device = draw(st.sampled_from(["cpu", "cuda"]))
    product = draw(st.sampled_from([*backends.PRODUCTS, "abs_topk"]))
    block = (1, 1) if product == "abs_topk" else draw(st.tuples(sides, sides))
    problem = Problem(device, torch.float32, product, 3840, 3840, 1920, block)
    # The cpu backend alone is certain not to run elsewhere.
    names = [name for name in backends.NAMES if device == "cpu" or name != "cpu"]
    able = draw(st.sets(st.sampled_from(names)))
    return problem, able, draw(st.sampled_from([None, *backends.NAMES]))


@given(situations())
def test_explain_takes_what_choose_takes_and_has_a_sentence_for_each_other(situation):
    problem, able, asked = situation
    modules = {
        name: SimpleNamespace(why_not=lambda _, name=name: None if name in able else f"no {name}")
        for name in backends.NAMES
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "_MODULES", modules)
        explained = backends.explain(problem, asked)
        try:
            chosen = backends.choose(problem, asked)
        except RuntimeError:
            chosen = None
    assert [name for name, _ in explained] == list(backends.NAMES)
    taken = [name for name, sentence in explained if sentence.startswith("taken: ")]
    assert taken == ([] if chosen is None else [chosen])
    for name, sentence in explained:
        assert sentence.removeprefix("taken: ").strip()
        assert (sentence == f"no {name}") == (name not in able)


@pytest.mark.parametrize("block", [(1, 1), (16, 16)])
@pytest.mark.parametrize("product", backends.PRODUCTS)
def test_explain_backend_on_this_machine(block, product):
    layout = layout_of(block)
    explained = sk.explain_backend(X, layout, product)
    assert explained == backends.explain(backends.problem_of(X, layout, product))
    taken = backends.choose(backends.problem_of(X, layout, product))
    assert dict(explained)[taken].startswith("taken: ")
    assert "only when asked for by name" in dict(explained)["reference"]
    cannot = {name: why for name, why in sk.available_backends(X, layout) if why is not None}
    assert cannot.items() <= dict(explained).items()


def test_explain_where_no_backend_is_taken():
    explained = dict(sk.explain_backend(X.half(), layout_of()))
    assert not any(sentence.startswith("taken: ") for sentence in explained.values())
    assert "float16" in explained["cpu"]


def test_where_no_backend_is_taken_the_error_has_the_sentences_of_explain():
    x, layout = X.half(), layout_of((16, 16))
    explained = dict(sk.explain_backend(x, layout))
    with pytest.raises(RuntimeError) as caught:
        backends.choose(backends.problem_of(x, layout, "forward"))
    for name in ("cpu", "triton", "cuda"):
        assert f"{name}: {explained[name]}" in str(caught.value)


def test_every_rule_is_complete_and_names_its_source():
    for name, rule in backends.RULES.items():
        # Where there is no order none but the specification can run it, and `why_not` says why.
        others = {"reference", "triton", "cuda"} if rule.order else {"reference"}
        assert {*rule.order, *others} == rule.reasons.keys(), name
        assert all(rule.reasons.values())
        assert rule.source in (None, "not measured") or (ROOT / rule.source).is_file()


def test_explain_refuses_what_it_cannot_read():
    layout = layout_of()
    for error, message, arguments in [
        (TypeError, "x must be a torch.Tensor, got int", (3, layout)),
        (TypeError, "layout must be a FanInLayout, got int", (X, 3)),
        (TypeError, "product must be a str, got int", (X, layout, 3)),
        (ValueError, "product must be one of forward, .*got 'abs_topk'", (X, layout, "abs_topk")),
    ]:
        with pytest.raises(error, match=message):
            sk.explain_backend(*arguments)
    with pytest.raises(ValueError, match="backend must be one of"):
        backends.explain(backends.problem_of(X, layout, "forward"), "abacus")


# --- the offer of a dense layer ------------------------------------------------------------------


def table(monkeypatch, densities, dtype="float32"):
    """Pretends that these break-even densities, by block, were measured on this machine."""
    family = break_even.family(torch.device("cpu"))
    entries = {
        Key("cpu", family, dtype, block): Measured(density, "some/file.json")
        for block, density in densities.items()
    }
    monkeypatch.setattr(break_even, "TABLE", entries)


@pytest.mark.parametrize(
    ("block", "nearest"),
    [
        ((1, 1), (1, 1)),
        ((2, 1), (1, 1)),  # as near to 4x1: the smaller one
        ((8, 1), (4, 1)),  # as near to 16x1
        ((16, 2), (16, 1)),
        ((16, 8), (16, 16)),
        ((1, 16), (1, 1)),  # as near to 16x16
        ((64, 64), (32, 32)),
    ],
)
def test_the_nearest_measured_block_counts(block, nearest, monkeypatch):
    densities = {(1, 1): 0.1, (4, 1): 0.2, (16, 1): 0.3, (16, 16): 0.4, (32, 32): 0.45}
    table(monkeypatch, densities)
    layout = layout_of(block, 64)
    assert sk.break_even_density(X, layout) == densities[nearest]
    advice = sk.advise_dense(X, layout)
    assert f"{nearest[0]}x{nearest[1]} blocks" in advice
    assert ("nearest" in advice) == (block != nearest)


def test_advice_says_what_was_measured_and_what_to_do(monkeypatch):
    table(monkeypatch, {(1, 1): 0.25})
    advice = sk.advise_dense(X, layout_of(fan_in=32))
    family = break_even.family(X.device)
    assert advice == (
        f"a dense layer is expected to be faster: 1x1 blocks in float32 on cpu ({family}) break "
        "even at density 0.25 (some/file.json), and this layout has 0.5; layer.to_dense() or "
        "densify_(model, filter_fn=...) gives you one"
    )
    assert sk.advise_dense(X, layout_of(fan_in=16)) is None
    assert sk.advise_dense(X, layout_of(fan_in=17)) is not None


def test_no_advice_without_a_measurement(monkeypatch):
    full = layout_of(fan_in=64)
    table(monkeypatch, {(1, 1): math.inf})
    assert sk.break_even_density(X, full) == math.inf
    assert sk.advise_dense(X, full) is None
    assert sk.break_even_density(X.double(), full) is None
    assert sk.advise_dense(X.double(), full) is None
    assert sk.break_even_density(X.to("meta"), full) is None
    table(monkeypatch, {(1, 1): 0.5}, dtype="bfloat16")
    assert sk.break_even_density(X, full) is None
    assert sk.break_even_density(X.bfloat16(), full) == 0.5
    # Another instruction set, and matrix units, are other processors.
    isas = cpu.isas()
    if len(isas) > 1:
        with cpu.use_isa(isas[0] if cpu.isa() != isas[0] else isas[-1]):
            assert sk.break_even_density(X.bfloat16(), full) is None
    has_amx = break_even._has_amx()
    monkeypatch.setattr(break_even, "_has_amx", lambda: not has_amx)
    assert sk.break_even_density(X.bfloat16(), full) is None


def test_the_family_of_a_gpu_is_its_compute_capability(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert break_even.family(torch.device("cuda", 0)) == "compute capability 9"


@pytest.mark.parametrize("function", [sk.break_even_density, sk.advise_dense])
def test_the_offer_refuses_what_it_cannot_read(function):
    with pytest.raises(TypeError, match=r"x must be a torch.Tensor, got int"):
        function(3, layout_of())
    with pytest.raises(TypeError, match="layout must be a FanInLayout, got int"):
        function(X, 3)


class Recorder(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("block", [(1, 1), (16, 16)])
def test_a_layer_of_density_1_still_runs_sparse(block, monkeypatch):
    table(monkeypatch, {(1, 1): 0.01})
    layer = sk.SparseLinear(64, 64, fan_in=64, block=block)
    assert sk.advise_dense(X, layer.layout) is not None
    x = X.clone().requires_grad_()
    with Recorder() as recorder:
        layer(x).square().sum().backward()
    ours = {f"sparse_kernels::{product}" for product in backends.PRODUCTS}
    assert ours <= recorder.names
    dense = ("linear", "mm", "addmm", "matmul", "bmm")
    assert not recorder.names & {f"aten::{name}" for name in dense}


def entries(path):
    """What the table should have from a result file."""
    content = json.loads(path.read_text())
    assert content["complete"]
    assert content["machine"]["commit"]
    assert "dirty" not in content["machine"]["commit"]
    assert content["results"] == benchmark.summarize(content["rows"])
    source = path.relative_to(ROOT).as_posix()
    expected = {}
    for result in content["results"]:
        out, _, into = result["block"].partition("x")
        key = Key(result["device"], result["family"], result["dtype"], (int(out), int(into)))
        density = {
            "crossed": result["density"],
            "never": math.inf,
            "at once": result["lowest"],
        }[result["found"]]
        expected[key] = Measured(density, source)
    return expected


def test_the_table_is_what_the_committed_files_say():
    expected = {}
    for path in sorted((ROOT / "benchmarks/results").glob("break-even-*.json")):
        expected |= entries(path)
    assert expected
    assert expected == break_even.TABLE


# --- the measurement -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("points", "density", "found"),
    [
        # Half way, in logarithms: the geometric mean of 1/4 and 1.
        ([(1 / 4, 1 / 2), (1, 2)], 1 / 2, "crossed"),
        # From 1/8 to 8 in 6 doublings, 3 of them below 1; the density doubles twice in all.
        ([(1 / 4, 1 / 8), (1, 8)], 1 / 2, "crossed"),
        # One doubling of 4 below 1: a quarter of the way.
        ([(1 / 16, 1 / 4), (1 / 8, 1 / 2), (1 / 4, 8)], 2 ** (-3 + 1 / 4), "crossed"),
        ([(1 / 4, 1 / 2), (1 / 2, 1), (1, 2)], 1 / 2, "crossed"),
        # Several crossings: the last.
        ([(1 / 8, 1 / 2), (1 / 4, 2), (1 / 2, 1 / 2), (1, 2)], 2**-0.5, "crossed"),
        ([(1 / 4, 1 / 8), (1, 0.999)], None, "never"),
        ([(1 / 4, 2), (1, 0.999)], None, "never"),
        ([(1 / 4, 1), (1, 3)], None, "at once"),
        ([(1, 3)], None, "at once"),
        ([(1, 0.5)], None, "never"),
    ],
)
def test_break_even_by_hand(points, density, found):
    assert benchmark.find(points) == (
        None if density is None else pytest.approx(density, rel=1e-12),
        found,
    )


def row(density, ratio, correct=True, block="1x1"):
    made = {"device": "cpu", "family": "f", "dtype": "float32", "block": block, "density": density}
    times = {"time_ms": 3 * ratio, "dense_ms": 3.0} if correct else {}
    return {**made, "correct": correct, **times}


def test_results_leave_out_what_is_wrong():
    rows = [row(0.1, 0.5), row(1.0, 2.0), row(0.1, 0.5, block="4x1"), row(1.0, 0, False, "4x1")]
    (result,) = benchmark.summarize(rows)
    assert result == {
        "device": "cpu",
        "family": "f",
        "dtype": "float32",
        "block": "1x1",
        "density": 0.316,
        "found": "crossed",
        "lowest": 0.1,
        "highest": 1.0,
    }


def test_densities_with_a_slow_dense_product_are_disturbed():
    rows = [row(density, 1.0) for density in (0.1, 0.2, 0.3, 0.4)]
    assert benchmark.disturbed(rows) == []
    rows[2]["dense_ms"] = 1.21 * 3
    rows[3] = {**row(0.4, 1.0), "dtype": "bfloat16", "dense_ms": 100.0}
    assert benchmark.disturbed([*rows, row(0.5, 1.0, correct=False)]) == [2]


def test_disturbed_densities_are_measured_again(tmp_path, monkeypatch):
    times = iter([10.0, 1.0, 1.0, 1.0, 9.0, 11.0, 1.1])
    measured = []

    def measure(case, device, **options):
        measured.append(case.fan_in)
        return {**row(case.density, 0.5), "dense_ms": next(times), "error": 0.0, "fan_in": 1}

    monkeypatch.setattr(benchmark, "measure_point", measure)
    path = tmp_path / "rows.json"
    words = ["--smoke", "--block", "1x1", "--dtype", "float32", "--json", str(path)]
    assert benchmark.main(words) == 0
    assert measured == [1, 4, 16, 64, 1, 1, 1]
    rows = json.loads(path.read_text())["rows"]
    assert [row["dense_ms"] for row in rows] == [1.1, 1.0, 1.0, 1.0]
    assert [row["attempts"] for row in rows] == [4, 1, 1, 1]


@pytest.mark.parametrize("block_in", [1, 16, 32])
def test_densities_are_multiples_of_the_block_up_to_1(block_in):
    measured = benchmark.fan_ins(1024, block_in, benchmark.FACTOR)
    assert measured[0] == max(block_in, 16)
    assert measured[-1] == 1024
    assert all(fan_in % block_in == 0 for fan_in in measured)
    for low, high in itertools.pairwise(measured):
        assert low < high <= 2 * low


def test_break_even_smoke(tmp_path, capsys):
    path = tmp_path / "rows.json"
    words = ["--smoke", "--block", "16x16", "--dtype", "bfloat16", "--json", str(path)]
    assert benchmark.main(words) == 0
    content = json.loads(path.read_text())
    assert content["complete"]
    assert content["machine"]["command"].startswith("python -m benchmarks.break_even --smoke")
    assert [row["fan_in"] for row in content["rows"]] == [16, 64]
    for measured in content["rows"]:
        assert measured["correct"]
        assert measured["backend"] == "cpu"
        for name in ("time_ms", "dense_ms"):
            parts = [times[name] for times in measured["products"].values()]
            assert len(parts) == 3
            assert min(parts) > 0
            assert measured[name] == pytest.approx(sum(parts))
    assert content["results"] == benchmark.summarize(content["rows"])
    assert "break-even density" in capsys.readouterr().out


def test_wrong_products_are_not_timed(monkeypatch, capsys):
    right = benchmark.baselines.ours
    monkeypatch.setattr(
        benchmark.baselines,
        "ours",
        lambda operands, product, backend: lambda: right(operands, product, backend)() * 1.01,
    )
    assert benchmark.main(["--smoke", "--block", "32x32", "--dtype", "float32"]) == 1
    printed = capsys.readouterr().out
    assert printed.count("FAIL: error") == 2
    assert "2 of 2 rows are WRONG" in printed


def test_interrupted_measurement_keeps_its_rows(tmp_path, monkeypatch, capsys):
    right, calls = benchmark.measure_point, []

    def measure(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return right(*arguments, **options)

    monkeypatch.setattr(benchmark, "measure_point", measure)
    path = tmp_path / "rows.json"
    words = ["--smoke", "--block", "32x32", "--dtype", "float32", "--json", str(path)]
    assert benchmark.main(words) == benchmark.INTERRUPTED
    content = json.loads(path.read_text())
    assert (content["complete"], content["results"], len(content["rows"])) == (False, [], 1)
    assert "interrupted after 1 of 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "tpu"], "it must be one of cpu, cuda"),
        (["--json", "no/such/folder/rows.json"], "does not exist"),
        (["--block", "3x3"], "invalid choice"),
        (["--dtype", "float16"], "no case is left: on cpu"),
        (["--threads", "0"], "needs a positive whole number"),
        (["--repeats", "x"], "needs a positive whole number"),
    ],
)
def test_bad_options_of_the_measurement_are_refused(words, message, capsys):
    with pytest.raises(SystemExit) as caught:
        benchmark.main(words)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_gpu_that_is_not_there_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        benchmark.main(["--device", "cuda"])
    assert "--device cuda: PyTorch finds no GPU" in capsys.readouterr().err
