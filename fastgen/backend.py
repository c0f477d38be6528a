"""Operator registration, the compiled libraries, and the choice between them.

Every operator exists twice: ``fastgen::name``, which a compiled library overrides for its device, and
``fastgen_torch::name``, which is always the PyTorch implementation. A backend is a namespace.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.machinery
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgen._dynamo import constant, is_dynamo_compiling
from fastgen._shared_objects import why_incomplete

COMPILED, TORCH = "fastgen", "fastgen_torch"
BACKENDS = ("auto", "torch", "compiled")
COMPILED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Definition(NamedTuple):
    """An operator, apart from its implementation."""

    name: str
    schema: str
    fake: Callable[..., Any]
    vmap: Callable[..., Any] | None


_libraries = {namespace: torch.library.Library(namespace, "DEF") for namespace in (COMPILED, TORCH)}
_operators: dict[str, list[Definition]] = {}
_added: list[torch.library.Library] = []  # of add_backend, kept alive
_derivatives: dict[str, Callable[..., Any]] = {}
_namespaces = {"torch": TORCH}  # of the backends that are nothing but a namespace


def define(
    family: str,
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    vmap: Callable[..., Any] | None = None,
    assisted: Callable[..., Any] | None = None,
    check: Callable[..., None] | None = None,
) -> None:
    """Registers an operator in both namespaces: schema, PyTorch implementation, fake and vmap rule.

    ``vmap`` is called as ``vmap(operator, info, in_dims, *args)``. ``assisted`` stands in for the implementation
    in the namespace ``fastgen``; it is PyTorch that may call compiled helper operators. ``check`` is called with the
    arguments before either of them, and raises where they do not fit; compiled kernels have checks of their own.
    """
    definition = Definition(schema.split("(", 1)[0], schema, fake, vmap)
    _operators.setdefault(family, []).append(definition)
    for namespace, library in _libraries.items():
        _define_in(namespace, library, definition)
        chosen = assisted if assisted is not None and namespace == COMPILED else implementation
        library.impl(definition.name, outside_autocast(chosen, check), "CompositeExplicitAutograd")


def outside_autocast(
    implementation: Callable[..., Any], check: Callable[..., None] | None = None
) -> Callable[..., Any]:
    """What is float32 inside an operator stays float32: autocast has chosen the arguments' dtype and is done.

    ``check`` is called with the arguments first.
    """

    @functools.wraps(implementation)
    def run(*args: Any, **options: Any) -> Any:
        if check is not None:
            check(*args, **options)
        with torch._C._DisableAutocast():
            return implementation(*args, **options)

    return run


def _of_tensors(function: Callable[..., Any], schema: str) -> Callable[..., Any]:
    """The dispatcher lets None through for a tensor. ``check`` refuses it in front of an implementation, this in front
    of a fake or a derivative, which are called before or without that."""
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
    name, schema, fake, vmap = definition
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
    """Makes ``use_backend(name)`` take operators of another namespace, which a library gives kernels afterwards.

    The operators of the families get their schema, fake and vmap rule there, and no PyTorch implementation. This is
    how the tests run the CUDA kernels in the emulator.
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
    _namespaces[name] = namespace


def differentiate(name: str, derivative: Callable[..., Any]) -> None:
    """Registers ``derivative(namespace, *args)`` as what a call of operator ``name`` records for autograd.

    fastgen's functions record their own and call operators below autograd (``call``). This one serves calls from
    elsewhere: exported programs, whose graphs name the operators.
    """
    _derivatives[name] = derivative
    for namespace, library in _libraries.items():
        _differentiate_in(namespace, library, name, derivative)


def _differentiate_in(
    namespace: str, library: torch.library.Library, name: str, derivative: Callable[..., Any]
) -> None:
    schema = next(known.schema for family in _operators.values() for known in family if known.name == name)
    checked = _of_tensors(functools.partial(derivative, namespace), schema)

    def record(*args: Any) -> Any:
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise RuntimeError(
                f"{namespace}::{name}: expected a call outside of torch.func.grad, jvp and the like, which do not reach"
                " into operators that are called by name; call the function of fastgen.functional instead"
            )
        return checked(*args)

    library.impl(name, record, "Autograd")


def refuse_other_derivatives() -> None:
    """Operators that have no derivative, being called inside of others only, raise where one would be recorded."""
    for name in (name for names in operators().values() for name in names if name not in _derivatives):
        differentiate(name, functools.partial(_refuse_derivative, name))


def _refuse_derivative(name: str, namespace: str, *args: Any) -> Any:
    if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
        raise RuntimeError(f"{namespace}::{name}: expected tensors that need no gradient; it has no derivative")
    return call(namespace, name, *args)


def operator(namespace: str, name: str) -> Callable[..., Any]:
    """The callable of an operator, for example ``operator("fastgen_torch", "attention_forward")``."""
    return getattr(getattr(torch.ops, namespace), name)  # type: ignore[no-any-return]


def call(namespace: str, name: str, *args: Any) -> Any:
    """Calls an operator below autograd: the caller records what there is to differentiate."""
    function = operator(namespace, name)
    with torch._C._AutoDispatchBelowAutograd():
        return function(*args)


def operators() -> dict[str, list[str]]:
    """Operator names by family."""
    return {family: [definition.name for definition in known] for family, known in _operators.items()}


# --------------------------------------------------------------------------------------------------
# Compiled libraries


@dataclass
class CompiledLibrary:
    """A shared library beside this file that registers kernels for one device type."""

    name: str
    device: str
    path: Path | None = None
    problem: str | None = None

    @property
    def loaded(self) -> bool:
        return self.path is not None and self.problem is None

    def load(self) -> None:
        self.path = _built(self.name)
        if self.path is None:
            self.problem = f"{self.name} was not built (see FASTGEN_BUILD in the README)"
            return
        missing = why_incomplete(self.path)
        if missing is not None:
            self.problem = f"{self.path.name} was cut short: {missing}"
            return
        try:
            torch.ops.load_library(str(self.path))
        except Exception as error:
            cause = error.__cause__ or error
            self.problem = f"{self.path.name} does not load: {str(cause).splitlines()[0].rpartition('/')[2]}"


def _built(name: str) -> Path | None:
    """The file of a compiled part, beside this one."""
    paths = (Path(__file__).with_name(name + suffix) for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((path for path in paths if path.is_file()), None)


def _load_module() -> tuple[ModuleType | None, str | None]:
    path = _built("_C")
    missing = None if path is None else why_incomplete(path)
    if path is not None and missing is not None:
        return None, f"{path.name} was cut short: {missing}"
    try:
        return importlib.import_module("fastgen._C"), None
    except ImportError as error:
        return None, f"_C was not built, or does not load: {error}"


_compiled = [CompiledLibrary("_cpu", "cpu"), CompiledLibrary("_cuda", "cuda")]
build_module, build_module_problem = _load_module()


def load_compiled() -> None:
    """Loads each compiled library, or keeps the reason why not."""
    for library in _compiled:
        library.load()


def compiled_libraries() -> list[CompiledLibrary]:
    return list(_compiled)


def compiled_architectures() -> list[str]:
    """CUDA architectures in the compiled library, such as ``["80", "90a", "120", "120+PTX"]``."""
    if build_module is None:
        return []
    return list(build_module.build_info()["cuda_architectures"])


def runs_on(capability: tuple[int, int], architectures: list[str]) -> bool:
    """Whether machine code or PTX for one of the architectures runs on a device of this capability."""
    major, minor = capability
    for name in architectures:
        number = int(name.rstrip("af+PTX"))
        built = divmod(number, 10)
        if name.endswith("+PTX"):
            if built <= (major, minor):
                return True
        elif name.endswith("a"):
            if built == (major, minor):
                return True
        elif built[0] == major and built[1] <= minor:
            return True
    return False


def has_kernel(name: str, device: torch.device) -> bool:
    """Whether a loaded library registered a kernel of operator ``name`` for this kind of device."""
    if all(library.device != device.type for library in _compiled):
        return False
    key = torch._C._dispatch_key_for_device(device.type)
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"{COMPILED}::{name}", key))


def why_not_compiled(name: str, device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """None when a compiled kernel of operator ``name`` serves the device, else the reason. Meta tensors have shapes and
    nothing to compute: any backend serves them."""
    if device.type == "meta":
        return None
    library = next((library for library in _compiled if library.device == device.type), None)
    if library is None:
        return f"there are no kernels for device type '{device.type}'"
    if library.problem is not None:
        return library.problem
    if not has_kernel(name, device):
        return f"no {device.type} kernel is written for {name} yet"
    if dtype is not None and dtype not in COMPILED_DTYPES:
        return f"{name} has no compiled kernel for {dtype}"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if not runs_on(capability, compiled_architectures()):
            return f"the kernels are compiled for {', '.join(compiled_architectures())}, not for {capability}"
    return None


class _Selection:
    """The chosen backend. A plain attribute, so that torch.compile guards on it."""

    backend: str = "auto"


_selection = _Selection()


_RENAMED = {"reference": "torch"}  # backends under the names that they had before version 0.1


def _checked_backend(name: str, source: str) -> str:
    if name in _RENAMED:
        warnings.warn(f"{source}: backend {name!r} is called {_RENAMED[name]!r}", DeprecationWarning, stacklevel=4)
        name = _RENAMED[name]
    if name not in BACKENDS and name not in _namespaces:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_selection.backend = _checked_backend(os.environ.get("FASTGEN_BACKEND", "auto"), "FASTGEN_BACKEND")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Chooses the implementation of every fastgen function called inside the block.

    Args:
        name: ``"auto"`` takes a compiled kernel where there is one and PyTorch elsewhere;
            ``"torch"`` always takes PyTorch; ``"compiled"`` raises where there is no kernel.
            Outside any block the environment variable ``FASTGEN_BACKEND`` decides (default ``auto``).

    The choice holds for the whole process, as for torch's own backend flags. A backward pass uses the
    backend of its forward pass.

    Raises:
        ValueError: the name is none of these.

    Example:
        >>> with fastgen.use_backend("torch"):
        ...     z = fastgen.functional.reparameterize(torch.zeros(2, 3), torch.zeros(2, 3))
    """
    previous = _selection.backend
    _selection.backend = _checked_backend(name, "use_backend")
    try:
        yield
    finally:
        _selection.backend = previous


def current_backend() -> str:
    """The backend in force: ``"auto"``, ``"torch"`` or ``"compiled"``."""
    return _selection.backend


_places: dict[tuple[str, torch.device, torch.dtype], tuple[str, str | None]] = {}


def _place(name: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str | None]:
    """The namespace that serves these tensors in ``auto``, and why it is not a compiled kernel."""
    key = (name, device, dtype)
    if key not in _places:
        reason = why_not_compiled(name, device, dtype)
        # With no kernel for the device, ``fastgen`` still holds PyTorch, assisted by compiled helpers; with one
        # that does not take these tensors, only ``fastgen_torch`` can serve.
        refused = reason is not None and has_kernel(name, device)
        _places[key] = (TORCH if refused else COMPILED, reason)
    return _places[key]


@constant
def _constant_place(name: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str | None]:
    return _place(name, device, dtype)


def select(name: str, tensor: Tensor, refused: str | None = None, slower: bool = False) -> str:
    """The namespace that serves operator ``name`` for tensors like this one, under the backend in force.

    ``refused``: why a kernel, if there is one, does not take these tensors. ``slower``: it does, but PyTorch is the
    better choice where nobody forces one.

    Raises:
        RuntimeError: ``compiled`` is forced and there is no such kernel.
    """
    backend = _selection.backend
    if backend in _namespaces:
        return _namespaces[backend]
    place = _constant_place if is_dynamo_compiling() else _place
    namespace, reason = place(name, tensor.device, tensor.dtype)
    if refused is not None and reason is None:
        namespace, reason = TORCH, refused
    if backend == "compiled" and reason is not None:
        raise RuntimeError(f"backend 'compiled' was asked for, but {reason}; use 'auto' or 'torch'")
    return TORCH if slower and reason is None and backend == "auto" else namespace


def namespace_for_derivative(namespace: str, name: str, tensor: Tensor, refused: str | None) -> str:
    """The namespace of the operator that goes on where a forward pass was served by ``namespace``.

    ``refused``: why its kernel, if there is one, does not take tensors like this one.

    Raises:
        RuntimeError: ``compiled`` is forced and there is no such kernel.
    """
    if namespace == COMPILED and refused is not None and has_kernel(name, tensor.device):
        if _selection.backend == "compiled":
            raise RuntimeError(f"backend 'compiled' was asked for, but {refused}; use 'auto' or 'torch'")
        namespace = TORCH
    return namespace


def _tf32_allowed() -> bool:
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


@constant
def _constant_tf32_allowed() -> bool:
    return _tf32_allowed()


def may_use_tf32(tensor: Tensor) -> bool:
    """Whether the user lets float32 products of CUDA tensors round to tf32, as for torch's own.

    torch.compile keeps what it finds.
    """
    if tensor.dtype != torch.float32 or tensor.device.type != "cuda":
        return False
    return _constant_tf32_allowed() if is_dynamo_compiling() else _tf32_allowed()
