"""The choice of an implementation: the backend in force, the namespace that serves a call, and its compiled helpers."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastgen._dynamo import constant, is_dynamo_compiling
from fastgen.backend import libraries
from fastgen.backend.registry import COMPILED, TORCH, namespaces, operator

BACKENDS = ("auto", "torch", "compiled")


class _Selection:
    """The selected backend, a plain attribute on which torch.compile guards."""

    backend: str = "auto"


selection = _Selection()


_RENAMED = {"reference": "torch"}  # names of backends before version 0.1


def _checked_backend(name: str, source: str) -> str:
    if name in _RENAMED:
        warnings.warn(f"{source}: backend {name!r} is called {_RENAMED[name]!r}", DeprecationWarning, stacklevel=4)
        name = _RENAMED[name]
    if name not in BACKENDS and name not in namespaces:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


selection.backend = _checked_backend(os.environ.get("FASTGEN_BACKEND", "auto"), "FASTGEN_BACKEND")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Context manager that selects the implementation of the fastgen functions called inside the block.

    Args:
        name: ``"auto"`` uses a compiled kernel where there is one and PyTorch elsewhere; ``"torch"`` always uses
            PyTorch; ``"compiled"`` raises where there is no kernel. Outside any block the environment variable
            ``FASTGEN_BACKEND`` applies (default ``auto``).

    The setting is global to the process, like torch's own backend flags. A backward pass uses the backend of its
    forward pass.

    Raises:
        ValueError: ``name`` is not a backend.

    Example:
        >>> with fastgen.use_backend("torch"):
        ...     z = fastgen.functional.reparameterize(torch.zeros(2, 3), torch.zeros(2, 3))
    """
    previous = selection.backend
    selection.backend = _checked_backend(name, "use_backend")
    try:
        yield
    finally:
        selection.backend = previous


def current_backend() -> str:
    """Name of the backend in force: ``"auto"``, ``"torch"`` or ``"compiled"``."""
    return selection.backend


_places: dict[tuple[str, torch.device, torch.dtype], tuple[str, str | None]] = {}


def _place(name: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str | None]:
    """The namespace that serves these tensors in ``auto``, and why it is not a compiled kernel."""
    key = (name, device, dtype)
    place = _places.get(key)
    if place is None:
        reason = libraries.why_not_compiled(name, device, dtype)
        # With no kernel for the device, ``fastgen`` still holds PyTorch, which calls compiled helpers; with one
        # that does not take these tensors, only ``fastgen_torch`` can serve.
        refused = reason is not None and libraries.has_kernel(name, device)
        place = (TORCH if refused else COMPILED, reason)
        # What is assumed for a GPU that this machine lacks does not hold once CUDA_VISIBLE_DEVICES shows one.
        if device.type != "cuda" or libraries.device_capability(device) is not None:
            _places[key] = place
    return place


@constant
def _constant_place(name: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str | None]:
    return _place(name, device, dtype)


def select(
    name: str, tensor: Tensor, refused: str | None = None, *, slower: bool = False, forward: str | None = None
) -> str:
    """The namespace that serves operator ``name`` for tensors like this one, under the backend in force.

    Args:
        refused: why the compiled kernel, if there is one, does not take these tensors.
        slower: the kernel takes them, but PyTorch is expected to be faster: ``auto`` then takes PyTorch.
        forward: for the operator of a derivative, the namespace that served the forward pass. It serves the derivative
            too, except that PyTorch replaces a kernel that is ``refused``.

    Raises:
        RuntimeError: ``compiled`` is forced and no kernel serves.
    """
    backend, reason = selection.backend, None
    if forward is not None:
        if forward != COMPILED or refused is None or not libraries.has_kernel(name, tensor.device):
            return forward
        namespace, reason = TORCH, refused
    elif backend in namespaces:
        return namespaces[backend]
    else:
        place = _constant_place if is_dynamo_compiling() else _place
        namespace, reason = place(name, tensor.device, tensor.dtype)
        if refused is not None and reason is None:
            namespace, reason = TORCH, refused
    if backend == "compiled" and reason is not None:
        raise RuntimeError(f"backend 'compiled' was requested, but {reason}; use 'auto' or 'torch'")
    return TORCH if slower and reason is None and backend == "auto" else namespace


def helper(namespace: str, name: str, device: torch.device) -> Callable[..., Any] | None:
    """The compiled kernel ``name`` for the device, as a callable; None where PyTorch does its work.

    Only namespace ``fastgen`` has kernels. An implementation there calls this for the parts of its work that are
    compiled.
    """
    if namespace != COMPILED or not libraries.has_kernel(name, device):
        return None
    return operator(COMPILED, name)


def _tf32_allowed() -> bool:
    # What torch.backends.cuda.matmul.fp32_precision reads, after a search that takes ten times as long.
    return bool(torch._C._get_fp32_precision_getter("cuda", "matmul") == "tf32")  # type: ignore[attr-defined]


@constant
def _constant_tf32_allowed() -> bool:
    return _tf32_allowed()


def may_use_tf32(tensor: Tensor) -> bool:
    """Whether ``torch.backends.cuda.matmul`` allows TF32 for products of tensors like this one.

    torch.compile treats the setting as a constant.
    """
    if not tensor.is_cuda or tensor.dtype != torch.float32:
        return False
    return _constant_tf32_allowed() if is_dynamo_compiling() else _tf32_allowed()
