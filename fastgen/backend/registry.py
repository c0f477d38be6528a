"""Registration of operators: schema, PyTorch implementation, fake, vmap rule and derivative.

Every operator exists twice: ``fastgen::name``, which a compiled library overrides for its device, and
``fastgen_torch::name``, which is always the PyTorch implementation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgen.backend import sharded

COMPILED, TORCH = "fastgen", "fastgen_torch"


class Definition(NamedTuple):
    """An operator, apart from its implementation.

    ``parts``: compiled CPU operators that do a part of its work, each with a phrase that says which part.
    """

    name: str
    schema: str
    fake: Callable[..., Any]
    vmap: Callable[..., Any] | None
    parts: dict[str, str]


_libraries = {namespace: torch.library.Library(namespace, "DEF") for namespace in (COMPILED, TORCH)}
_operators: dict[str, list[Definition]] = {}
_added: list[torch.library.Library] = []  # libraries of add_backend, kept alive
_derivatives: dict[str, Callable[..., Any]] = {}
_decompositions: dict[str, Callable[..., Any]] = {}
namespaces = {"torch": TORCH}  # backends that are one namespace for every operator


def define(
    family: str,
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    vmap: Callable[..., Any] | None = None,
    *,
    check: Callable[..., None] | None = None,
    parts: dict[str, str] | None = None,
    takes_namespace: bool = False,
    decomposition: Callable[..., Any] | None = None,
) -> None:
    """Registers an operator in both namespaces: schema, PyTorch implementation, fake and vmap rule.

    Args:
        family: the folder of ``fastgen.ops`` that the operator belongs to, or "helpers".
        implementation: called with the operator's arguments; with ``takes_namespace`` after the namespace, which
            ``helper`` needs.
        vmap: called as ``vmap(operator, info, in_dims, *args)``.
        check: called with the arguments before the implementation, and raises where they do not fit. Compiled kernels
            have checks of their own.
        parts: compiled CPU operators that do a part of the work, each with a phrase that says which part.
        decomposition: the operator as a few of PyTorch's, for exporters that do not know it: ``torch.onnx.export``, and
            ``decompositions``. Called with the operator's arguments, whose sizes may be symbolic.
    """
    definition = Definition(schema.split("(", 1)[0], schema, fake, vmap, parts or {})
    _operators.setdefault(family, []).append(definition)
    for namespace, library in _libraries.items():
        _define_in(namespace, library, definition)
        chosen = functools.partial(implementation, namespace) if takes_namespace else implementation
        library.impl(definition.name, outside_autocast(chosen, check), "CompositeExplicitAutograd")
    if decomposition is not None:
        _decompositions[definition.name] = decomposition


def outside_autocast(
    implementation: Callable[..., Any], check: Callable[..., None] | None = None
) -> Callable[..., Any]:
    """The implementation with autocast disabled: what it computes in float32 stays float32. Autocast has already chosen
    the arguments' dtype. ``check`` is called with the arguments first.
    """

    def run(*args: Any, **options: Any) -> Any:
        if check is not None:
            check(*args, **options)
        with torch._C._DisableAutocast():
            return implementation(*args, **options)

    return run


def _of_tensors(function: Callable[..., Any], schema: str) -> Callable[..., Any]:
    """``function`` with a check for None, which the dispatcher accepts in place of a tensor.

    An implementation has ``check`` for that; fakes and derivatives are called before it or without it.
    """
    arguments = enumerate(torch._C.parse_schema(schema).arguments)
    tensors = [(at, argument.name) for at, argument in arguments if str(argument.type) == "Tensor"]

    def run(*args: Any) -> Any:
        for at, name in tensors:
            if args[at] is None:
                raise TypeError(f"{name}: expected a tensor, got None")
        try:
            return function(*args)
        except IndexError as error:  # a tensor of fewer dims
            raise ValueError(f"{schema.partition('(')[0]}: expected shapes as in {schema}; {error}") from None

    return run


def _define_in(namespace: str, library: torch.library.Library, definition: Definition) -> None:
    name, schema, fake, vmap, _ = definition
    library.define(schema)
    torch.library.register_fake(f"{namespace}::{name}", _of_tensors(fake, schema), lib=library)
    if vmap is not None:
        operator = getattr(getattr(torch.ops, namespace), name)
        torch.library.register_vmap(
            f"{namespace}::{name}",
            lambda info, in_dims, *args, operator=operator: vmap(operator, info, in_dims, *args),
            lib=library,
        )


def add_backend(name: str, namespace: str, families: Iterable[str]) -> None:
    """Adds the backend ``name``: the operators of another namespace, whose kernels a library registers afterwards.

    The operators of the families get their schema, fake and vmap rule there, and no PyTorch implementation. The tests
    run the CUDA kernels in the emulator this way.
    """
    library = torch.library.Library(namespace, "DEF")
    _added.append(library)
    names = set()
    for family in families:
        for definition in _operators[family]:
            _define_in(namespace, library, definition)
            names.add(definition.name)
    for known in _derivatives.keys() & names:
        _differentiate_in(namespace, library, known, _derivatives[known])
    namespaces[name] = namespace


def differentiate(name: str, derivative: Callable[..., Any]) -> None:
    """Registers ``derivative(namespace, *args)`` for the Autograd key of operator ``name``.

    fastgen's functions record their own derivatives and call operators below autograd (``call``). This one serves
    exported programs, whose graphs name the operators.
    """
    _derivatives[name] = derivative
    for namespace, library in _libraries.items():
        _differentiate_in(namespace, library, name, derivative)


def _differentiate_in(
    namespace: str, library: torch.library.Library, name: str, derivative: Callable[..., Any]
) -> None:
    checked = _of_tensors(functools.partial(derivative, namespace), definition_of(name).schema)

    def record(*args: Any) -> Any:
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise RuntimeError(
                f"{namespace}::{name}: expected a call outside of torch.func.grad, jvp and the like, which do not reach"
                " into operators that are called by name; call the function of fastgen.functional instead"
            )
        return checked(*args)

    library.impl(name, record, "Autograd")


def refuse_other_derivatives() -> None:
    """Operators without a derivative, which only other operators call, raise where one would be recorded."""
    for name in (name for names in operators().values() for name in names if name not in _derivatives):
        differentiate(name, functools.partial(_refuse_derivative, name))


def _refuse_derivative(name: str, namespace: str, *args: Any) -> Any:
    if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
        raise RuntimeError(f"{namespace}::{name}: expected tensors that need no gradient; it has no derivative")
    return call(namespace, name, *args)


def operator(namespace: str, name: str) -> Callable[..., Any]:
    """The callable of an operator, for example ``operator("fastgen_torch", "attention_forward")``."""
    return getattr(getattr(torch.ops, namespace), name)  # type: ignore[no-any-return]


_overloads: dict[tuple[str, str], Callable[..., Any]] = {}


def overload(namespace: str, name: str) -> Callable[..., Any]:
    """An operator's only overload: called without the search for one, which ``operator`` makes in each call."""
    found = _overloads.get((namespace, name))
    if found is None:
        found = _overloads[namespace, name] = operator(namespace, name).default  # type: ignore[attr-defined]
    return found


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Operators of both namespaces as a few of PyTorch's, for ``torch.export.ExportedProgram.run_decompositions``.

    They are not in PyTorch's own table: fake tensors with symbolic sizes would take their layouts from it.
    """
    return {
        operator(namespace, name).default: function  # type: ignore[attr-defined]
        for namespace in _libraries
        for name, function in _decompositions.items()
    }


def call(namespace: str, name: str, *args: Any) -> Any:
    """Calls an operator below autograd: the caller records its derivative.

    View tracking is off, too: results are not views, which could not have tangents of another layout.

    While ``torch.onnx.export`` traces a model, the operator's decomposition is called instead.
    """
    function = overload(namespace, name)
    if torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export():
        function = _decompositions.get(name, function)
    with torch._C._AutoDispatchBelowADInplaceOrView():
        try:
            return function(*args)
        except RuntimeError as error:
            if not sharded.has_sharded(args):
                raise
            return sharded.retry(function, name, args, error)


def operators() -> dict[str, list[str]]:
    """Operator names by family."""
    return {family: [definition.name for definition in known] for family, known in _operators.items()}


def definition_of(name: str) -> Definition:
    return next(known for family in _operators.values() for known in family if known.name == name)
