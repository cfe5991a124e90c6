"""Selects the backend that runs a problem, by one table of rules, and explains the choice."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from sparse_kernels import checks, cpu, cuda, reference, triton
from sparse_kernels.layout import FanInLayout, Layout, Problem, check_layout


class Backend(Protocol):
    """The functions of a backend, which is a module; `reference` specifies their results."""

    def why_not(self, problem: Problem, /) -> str | None:
        """None if it can run `problem`, else a sentence that says why not."""

    def forward(
        self, x: Tensor, values: Tensor, layout: FanInLayout, bias: Tensor | None, /
    ) -> Tensor:
        """`Y = X W^T (+ b)`."""

    def grad_input(
        self, grad_output: Tensor, values: Tensor, layout: FanInLayout, bias: Tensor | None, /
    ) -> Tensor:
        """`dX = dY W (+ b)`."""

    def grad_weight(self, grad_output: Tensor, x: Tensor, layout: FanInLayout, /) -> Tensor:
        """`dW = dY^T X` at the kept blocks."""

    def bias_grad(self, grad_output: Tensor, /) -> Tensor:
        """The gradient of a bias."""

    def abs_topk(self, x: Tensor, k: int, /) -> Tensor:
        """The k entries of largest magnitude of each row."""

    def abs_topk_backward(self, grad_output: Tensor, y: Tensor, /) -> Tensor:
        """`dY` where y is not zero."""


BACKENDS: dict[str, Backend] = {
    "reference": reference,
    "cpu": cpu,
    "triton": triton,
    "cuda": cuda,
}
# Those that have AbsTopK fused with what comes before it.
FUSED = ("reference", "cpu", "cuda")
# Those that also have its results in packed form.
PACKED = ("reference", "cpu")
NAMES = tuple(BACKENDS)
PRODUCTS = ("forward", "grad_input", "grad_weight")


class Rule(NamedTuple):
    """A row of the table below."""

    # The backends to try, fastest first; the others run only when asked for by name.
    order: tuple[str, ...]
    # Why the first of `order` is chosen, and why the others are not although they can run.
    reasons: dict[str, str]
    # The result file behind the order, or "not measured"; None if speed does not matter.
    source: str | None

    def reason(self, name: str) -> str:
        """The reason for or against a backend that can run the problem."""
        return self.reasons.get(name, "it is the specification, slow, and runs only when asked for")


RULES = {
    "cpu tensors": Rule(
        ("cpu",),
        {
            "cpu": "its kernels are those for cpu tensors",
            "triton": "it interprets its kernels on cpu tensors only when asked for",
            "cuda": "its kernels run on cpu tensors only in tests, emulated",
        },
        None,
    ),
    "abs_topk": Rule(
        ("cuda", "triton"),
        {
            "cuda": "it keeps a row in registers while it selects, if the row fits",
            "triton": "it reads a row of more than 16384 entries again for each bit of a number",
        },
        "not measured",
    ),
    "attention": Rule((), {}, None),
    "both sides of the block at least 16": Rule(
        ("triton", "cuda"),
        {
            "triton": "a block with both sides at least 16 fills the operands of a tensor core",
            "cuda": "it uses tensor cores only for square blocks of 32, 64 and 128 in 16 bits on "
            "compute capability 9.0",
        },
        "not measured",
    ),
    "smaller blocks": Rule(
        ("cuda", "triton"),
        {
            "cuda": "a block with a side below 16 does not fill a tensor core, and it needs none",
            "triton": "a block with a side below 16 does not fill the operands of a tensor core",
        },
        "not measured",
    ),
}


def rule_for(problem: Problem) -> Rule:
    """The row of `RULES` for `problem`."""
    if problem.device == "cpu":
        return RULES["cpu tensors"]
    if problem.product == "abs_topk":
        return RULES["abs_topk"]
    if problem.product == "attention":
        return RULES["attention"]
    if problem.block[0] >= 16 and problem.block[1] >= 16:
        return RULES["both sides of the block at least 16"]
    return RULES["smaller blocks"]


def why_not(name: str, problem: Problem) -> str | None:
    """None if the backend `name` can run `problem`, else a sentence that says why not."""
    backend = BACKENDS[name]
    reason = backend.why_not(problem)
    if reason is None and not hasattr(backend, problem.product):
        others = [other for other in NAMES if hasattr(BACKENDS[other], problem.product)]
        return f"it has no {problem.product}, only {', '.join(others)} have it"
    return reason


def check_name(backend: object) -> None:
    """Raises TypeError or ValueError unless `backend` is None or the name of a backend."""
    if backend is None:
        return
    checks.check_type("backend", backend, str, "a str or None")
    if backend not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(NAMES)}, got {backend!r}")


def choose(problem: Problem, backend: str | None = None) -> str:
    """The backend that runs `problem`: the one asked for, or the fastest that can.

    Raises:
        TypeError, ValueError: `backend` is not None and not one of the names.
        RuntimeError: the backend asked for, or every backend except `reference`, cannot run the
            problem; the message says why.
    """
    if backend is not None:
        check_name(backend)
        reason = why_not(backend, problem)
        if reason is not None:
            raise RuntimeError(f"backend {backend!r} cannot run {problem.product}: {reason}")
        return backend
    rule = rule_for(problem)
    for name in rule.order:
        if why_not(name, problem) is None:
            return name
    reasons = [
        f"{name}: {why_not(name, problem) or rule.reason(name)}"
        for name in NAMES
        if name != "reference"
    ]
    raise RuntimeError(
        f"no backend can run {problem.product} on {problem.device} in {problem.dtype}; "
        f"backend='reference' is slow but can run it. " + "; ".join(reasons)
    )


def explain(problem: Problem) -> list[tuple[str, str]]:
    """Every backend by name, and why `choose(problem)` chooses it, or why not.

    The sentence of the one that is chosen begins with "chosen: ".
    """
    rule = rule_for(problem)
    cannot = {name: why_not(name, problem) for name in NAMES}
    chosen = next((name for name in rule.order if cannot[name] is None), None)
    source = "" if rule.source is None else f" ({rule.source})"

    def sentence(name: str) -> str:
        if name == chosen and name != rule.order[0]:
            return f"chosen: the first of {', '.join(rule.order)} that can run this" + source
        said = "chosen: " if name == chosen else ""
        return cannot[name] or said + rule.reason(name) + source

    return [(name, sentence(name)) for name in NAMES]


def choose_for(
    x: Tensor, product: str, backend: str | None = None, layout: Layout | None = None
) -> str:
    """`choose` for inputs like `x` and this layout, at once on the CPU, which has one backend."""
    if (
        (backend is None or backend == "cpu")
        and x.is_cpu
        and cpu.is_available()
        and x.dtype in checks.CPU_DTYPES
    ):
        return "cpu"
    return choose(problem_of(x, layout, product), backend)


def problem_of(x: Tensor, layout: Layout | None, product: str) -> Problem:
    """The `Problem` of running `product` on inputs like `x` with this layout, if it has one."""
    if layout is None:
        return Problem(x.device.type, x.dtype, product)
    return Problem(
        x.device.type,
        x.dtype,
        product,
        layout.out_features,
        layout.in_features,
        layout.values_shape[1] * layout.block[1],
        layout.block,
    )


def explain_backend(
    x: Tensor, layout: FanInLayout, product: str = "forward"
) -> list[tuple[str, str]]:
    """Every backend by name, and why it is chosen by default, or why it is not.

    `sparse_linear` chooses once, for "forward" ("grad_input" if `transpose`), and its derivatives
    run on the same backend.

    Args:
        x: a tensor of the device and dtype in question.
        layout: the pattern in question.
        product: "forward", "grad_input" or "grad_weight".

    Returns:
        `[(name, sentence)]` for `reference`, `cpu`, `triton`, `cuda`. The sentence of the backend
        that is chosen begins with "chosen: "; if no backend is, none does. The other sentences say
        why the backend cannot run the problem, or why it is not preferred and how that was
        measured.

    Raises:
        TypeError: `x` is not a Tensor, `layout` not a FanInLayout or `product` not a str.
        ValueError: `product` is not one of the three.
    """
    checks.check_is_tensor("x", x)
    check_layout("layout", layout)
    checks.check_type("product", product, str, "a str")
    if product not in PRODUCTS:
        raise ValueError(f"product must be one of {', '.join(PRODUCTS)}, got {product!r}")
    return explain(problem_of(x, layout, product))
