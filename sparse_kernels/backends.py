"""Which backend can run a problem, and a sentence why each other one cannot."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from sparse_kernels import cpu, cuda, reference, triton
from sparse_kernels.layout import FanInLayout, Problem

_MODULES: dict[str, ModuleType] = {
    "reference": reference,
    "cpu": cpu,
    "triton": triton,
    "cuda": cuda,
}
NAMES = ("reference", "cpu", "triton", "cuda")


def order(problem: Problem) -> tuple[str, ...]:
    """The backends to try for `problem`, fastest first.

    | block                        | first  | because                                            |
    |------------------------------|--------|----------------------------------------------------|
    | both sides at least 16       | triton | such a block fills the operands of a tensor core   |
    | smaller, and no block at all | cuda   | each weight is one multiply-add for each token     |

    `reference` is a specification and runs only when it is asked for by name.
    """
    return ("triton", "cuda", "cpu") if min(problem.block) >= 16 else ("cuda", "triton", "cpu")


def module(name: str) -> ModuleType:
    """The module that implements the backend `name`; KeyError if this release has none."""
    return _MODULES[name]


def why_not(name: str, problem: Problem) -> str | None:
    """None if the backend `name` can run `problem`, else a sentence that says why not."""
    if name in _MODULES:
        reason: str | None = _MODULES[name].why_not(problem)
        return reason
    return f"not built yet: this release has no {name} backend, which will need an NVIDIA GPU"


def check_name(backend: object) -> None:
    """Raises TypeError or ValueError unless `backend` is None or the name of a backend."""
    if backend is None:
        return
    if not isinstance(backend, str):
        raise TypeError(f"backend must be a str or None, got {type(backend).__name__}")
    if backend not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(NAMES)}, got {backend!r}")


def choose(problem: Problem, backend: str | None = None) -> str:
    """The backend that runs `problem`: the one asked for, or the fastest that can.

    Raises:
        TypeError, ValueError: `backend` is not None and not one of the names.
        RuntimeError: the backend asked for, or every one but `reference`, cannot run the problem.
            The message says why. Nothing falls back silently.
    """
    check_name(backend)
    if backend is not None:
        reason = why_not(backend, problem)
        if reason is not None:
            raise RuntimeError(f"backend {backend!r} cannot run {problem.product}: {reason}")
        return backend
    reasons = []
    for name in order(problem):
        reason = why_not(name, problem)
        if reason is None and name == "triton" and problem.device == "cpu":
            reason = "it interprets its kernels on cpu tensors only when asked for by name"
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    raise RuntimeError(
        f"no backend can run {problem.product} on {problem.device} in {problem.dtype}; "
        f"backend='reference' is slow but always there. " + "; ".join(reasons)
    )


def problem_of(x: Tensor, layout: FanInLayout, product: str) -> Problem:
    """The `Problem` of running `product` on inputs like `x` with this layout."""
    return Problem(
        x.device.type,
        x.dtype,
        product,
        layout.out_features,
        layout.in_features,
        layout.fan_in,
        layout.block,
    )


def available_backends(x: Tensor, layout: FanInLayout) -> list[tuple[str, str | None]]:
    """Every backend by name, with None if it can run `sparse_linear(x, values, layout)`.

    Args:
        x: a tensor of the device and dtype in question.
        layout: the pattern in question.

    Returns:
        `[(name, None | sentence)]` for `reference`, `cpu`, `triton`, `cuda`; the sentence says why
        that backend cannot run the problem.

    Raises:
        TypeError: `x` is not a Tensor or `layout` not a FanInLayout.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if not isinstance(layout, FanInLayout):
        raise TypeError(f"layout must be a FanInLayout, got {type(layout).__name__}")
    problem = problem_of(x, layout, "forward")
    return [(name, why_not(name, problem)) for name in NAMES]
