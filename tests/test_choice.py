"""Which backend is taken and why, and the offer of a dense layer, which is never taken silently."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import sparse_kernels as sk
from sparse_kernels import backends
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
        name: SimpleNamespace(
            why_not=lambda _, name=name: None if name in able else f"no {name}",
            **{problem.product: None},
        )
        for name in backends.NAMES
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "BACKENDS", modules)
        explained = backends.explain(problem)
        try:
            chosen = backends.choose(problem)
        except RuntimeError:
            chosen = None
        if asked in able:
            assert backends.choose(problem, asked) == asked
        elif asked is not None:
            with pytest.raises(RuntimeError, match=f"cannot run .* no {asked}"):
                backends.choose(problem, asked)
    assert [name for name, _ in explained] == list(backends.NAMES)
    found = [name for name, sentence in explained if sentence.startswith("chosen: ")]
    assert found == ([] if chosen is None else [chosen])
    for name, sentence in explained:
        assert sentence.removeprefix("chosen: ").strip()
        assert (sentence == f"no {name}") == (name not in able)


@pytest.mark.parametrize("block", [(1, 1), (16, 16)])
@pytest.mark.parametrize("product", backends.PRODUCTS)
def test_explain_backend_on_this_machine(block, product):
    layout = layout_of(block)
    explained = sk.explain_backend(X, layout, product)
    assert explained == backends.explain(backends.problem_of(X, layout, product))
    chosen = backends.choose(backends.problem_of(X, layout, product))
    assert dict(explained)[chosen].startswith("chosen: ")
    assert "only when asked for" in dict(explained)["reference"]
    problem = backends.problem_of(X, layout, product)
    cannot = {name: backends.why_not(name, problem) for name in backends.NAMES}
    assert {item for item in cannot.items() if item[1] is not None} <= set(explained)


def test_explain_where_no_backend_is_chosen():
    explained = dict(sk.explain_backend(X.half(), layout_of()))
    assert not any(sentence.startswith("chosen: ") for sentence in explained.values())
    assert "float16" in explained["cpu"]


def test_where_no_backend_is_chosen_the_error_has_the_sentences_of_explain():
    x, layout = X.half(), layout_of((16, 16))
    explained = dict(sk.explain_backend(x, layout))
    with pytest.raises(RuntimeError) as caught:
        backends.choose(backends.problem_of(x, layout, "forward"))
    for name in ("cpu", "triton", "cuda"):
        assert f"{name}: {explained[name]}" in str(caught.value)


def test_every_rule_is_complete_and_names_its_source():
    for name, rule in backends.RULES.items():
        # Where there is no order none but the specification can run it, and `why_not` says why.
        others = {"triton", "cuda"} if rule.order else set()
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
        backends.choose(backends.problem_of(X, layout, "forward"), "abacus")


class Recorder(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("block", [(1, 1), (16, 16)])
def test_a_layer_of_density_1_still_runs_sparse(block):
    layer = sk.SparseLinear(64, 64, fan_in=64, block=block)
    x = X.clone().requires_grad_()
    with Recorder() as recorder:
        layer(x).square().sum().backward()
    ours = {f"sparse_kernels::{product}" for product in backends.PRODUCTS}
    assert ours <= recorder.names
    dense = ("linear", "mm", "addmm", "matmul", "bmm")
    assert not recorder.names & {f"aten::{name}" for name in dense}
