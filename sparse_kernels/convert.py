"""Whole models: every `nn.Linear` to a `SparseLinear` in place, and back.

One matrix is converted by `from_dense` and `to_dense`, one layer by `SparseLinear.from_dense` and
`SparseLinear.to_dense`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import nn
from torch.utils._pytree import tree_leaves

from sparse_kernels.checks import check_type, memory_of
from sparse_kernels.linear import SparseLinear

Model = TypeVar("Model", bound=nn.Module)
Layer = TypeVar("Layer", bound=nn.Module)
Fan = int | Callable[[str, nn.Linear], int]


def sparsify_(
    model: Model,
    fan_in: Fan | None = None,
    *,
    fan_out: Fan | None = None,
    block: tuple[int, int] = (1, 1),
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    backend: str | None = None,
) -> Model:
    """Replaces every selected `nn.Linear` of `model` by a SparseLinear of its largest weights.

    Only modules whose type is exactly `nn.Linear` are selected: a subclass may have its own
    forward, or a parent that reads its weight (as `nn.MultiheadAttention` does). The fused
    inference of a `nn.TransformerEncoderLayer` with a selected module is switched off, because it
    reads dense weights. A module that occurs several times is converted once and stays shared. If
    an error is raised, the model is unchanged. Make the optimizer afterwards: the weights are new
    Parameters, with the attributes of the old ones.

    Args:
        model: the model to change; not itself an `nn.Linear`.
        fan_in: as for SparseLinear, or a function of the module's qualified name and the module
            that returns it. Exactly one of `fan_in` and `fan_out` is given.
        fan_out: like `fan_in`.
        block: as for SparseLinear.
        backend: as for SparseLinear.
        filter_fn: called with a module and its qualified name; False leaves the module dense.

    Returns:
        `model`.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: a size that does not fit (the message names the module); a selected weight or
            bias that another module uses too, such as a tied embedding; a selected module or
            parameter that a parent also keeps in another attribute, such as a list (as
            DistributedDataParallel does); hooks or a replaced `forward` on a selected module, or
            hooks on its parameters, which would be lost; no module selected; or a model that is
            itself an `nn.Linear`.
    """
    chosen = _choose(model, nn.Linear, filter_fn, "SparseLinear.from_dense(model, ...)")
    if (fan_in is None) == (fan_out is None):
        raise ValueError("exactly one of fan_in and fan_out must be given")
    if not chosen:
        raise ValueError("filter_fn must select at least one nn.Linear of the model, got none")
    _check_replaceable(model, chosen)
    made: dict[nn.Module, nn.Module] = {}
    for name, linear in chosen.items():
        if linear in made:
            continue
        try:
            made[linear] = SparseLinear.from_dense(
                linear,
                fan_in=fan_in(name, linear) if callable(fan_in) else fan_in,
                fan_out=fan_out(name, linear) if callable(fan_out) else fan_out,
                block=block,
                backend=backend,
            )
        except (TypeError, ValueError) as error:
            raise type(error)(f"module {name!r}: {error}") from error
    _replace(model, chosen, made)
    _stop_fused_inference(model)
    return model


def densify_(model: Model, *, filter_fn: Callable[[nn.Module, str], bool] | None = None) -> Model:
    """Replaces every selected SparseLinear of `model` by the `nn.Linear` that computes the same.

    Only modules whose type is exactly SparseLinear are selected: a subclass may compute something
    else.

    Args:
        model: the model to change; not itself a SparseLinear.
        filter_fn: of a module and its qualified name; False leaves the module sparse.

    Returns:
        `model`.

    Raises:
        TypeError: an argument of a wrong type. ValueError: a model that is itself a SparseLinear;
            a parameter that is shared, or hooks that would be lost, as for `sparsify_`.
    """
    chosen = _choose(model, SparseLinear, filter_fn, "model.to_dense()")
    _check_replaceable(model, chosen)
    _replace(model, chosen, {layer: layer.to_dense() for layer in chosen.values()})
    return model


def _choose(
    model: nn.Module,
    kind: type[Layer],
    filter_fn: Callable[[nn.Module, str], bool] | None,
    instead: str,
) -> dict[str, Layer]:
    """The selected modules whose type is exactly `kind`, by each of their names."""
    check_type("model", model, nn.Module, "a torch.nn.Module")
    check_type("filter_fn", filter_fn, (Callable, type(None)), "callable or None")
    if isinstance(model, kind):
        raise ValueError(
            f"model is itself a {kind.__name__} and cannot be replaced in place: use {instead}"
        )
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if type(module) is kind and (filter_fn is None or filter_fn(module, name))
    }


def _check_replaceable(model: nn.Module, chosen: Mapping[str, nn.Module]) -> None:
    """Raises ValueError for chosen modules that something else depends on.

    That is hooks, a replaced forward, shared parameters, or another attribute that has them.
    """
    users: dict[int, set[nn.Module]] = {}
    names: dict[int, list[str]] = {}
    keepers: dict[int, str] = {}
    for name, module in model.named_modules():
        for part, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                users.setdefault(memory_of(tensor), set()).add(module)
                names.setdefault(memory_of(tensor), []).append(f"{name}.{part}")
        for attribute, value in vars(module).items():
            if attribute not in ("_modules", "_parameters", "_buffers"):
                kept = f"{name}.{attribute}".lstrip(".")
                keepers |= {id(leaf): kept for leaf in tree_leaves(value)}
    for name, module in chosen.items():
        parameters = dict(module.named_parameters(name, recurse=False))
        for part, old in {name: module, **parameters}.items():
            if id(old) in keepers:
                raise ValueError(
                    f"{part!r} is also in the attribute {keepers[id(old)]!r}, which would keep the "
                    f"old one: remove it there, or leave module {name!r} out with filter_fn"
                )
        hooks = [value for key, value in vars(module).items() if key.endswith("_hooks")]
        if any(hooks) or "forward" in vars(module):
            raise ValueError(
                f"module {name!r} has hooks or a replaced forward, which its replacement would "
                f"lose: remove them first, or leave it out with filter_fn"
            )
        for part, parameter in parameters.items():
            if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
                raise ValueError(
                    f"parameter {part!r} has hooks, which its replacement would lose: remove them "
                    f"first, or leave the module out with filter_fn"
                )
            if len(users[memory_of(parameter)]) > 1:
                tied = " and ".join(names[memory_of(parameter)])
                raise ValueError(
                    f"{tied} are one tensor or share memory, which the replacement cannot: leave "
                    f"it out with filter_fn, or untie it"
                )


def _replace(
    model: nn.Module, chosen: Mapping[str, nn.Module], made: Mapping[nn.Module, nn.Module]
) -> None:
    for name, module in chosen.items():
        new = made[module]
        for part, parameter in module.named_parameters(recurse=False):
            vars(new.get_parameter(part)).update(vars(parameter))  # marks, as optimizers read them
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)


def _stop_fused_inference(model: nn.Module) -> None:
    """Switches off the dense kernel of encoder layers in eval mode, which reads the weights.

    PyTorch sets these attributes itself for layers that it cannot fuse.
    """
    for layer in model.modules():
        if isinstance(layer, nn.TransformerEncoderLayer) and not (
            type(layer.linear1) is type(layer.linear2) is nn.Linear
        ):
            layer.activation_relu_or_gelu = 0
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and not all(
            layer.activation_relu_or_gelu for layer in encoder.layers
        ):
            encoder.use_nested_tensor = False
