"""Operators on tensors that are sharded over processes (``DTensor``): rules, and errors where there is none.

A rule is registered with PyTorch when its operator is first called with a ``DTensor``: without one, nothing of
``torch.distributed.tensor`` is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from torch import Tensor

Placements = list[Any]
Rule = Callable[..., list[tuple[Placements, Placements]]]

_rules: dict[str, Rule] = {}
_registered: set[Any] = set()


def shard(name: str, rule: Rule) -> None:
    """Adds ``rule(*args)`` for operator ``name``: pairs of placements, of the outputs and of the arguments (None for
    one that is no tensor), as ``torch.distributed.tensor.experimental.register_sharding`` takes them. Tensors are
    given as their ``DTensorSpec``.
    """
    _rules[name] = rule


def has_sharded(args: Sequence[Any]) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(isinstance(tensor, module.DTensor) for tensor in _tensors(args))


def retry(overload: Any, name: str, args: tuple[Any, ...], error: Exception) -> Any:
    """The result of an operator whose call with a ``DTensor`` raised ``error``, once its rule is registered.

    Raises:
        NotImplementedError: the operator has no rule, or some of the tensors are sharded and others are not.
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.experimental import register_sharding

    if not all(isinstance(tensor, DTensor) for tensor in _tensors(args)):
        _refuse(name, "expected each tensor to be a DTensor, or none (the seed of dropout is none)", error)
    if name not in _rules:
        _refuse(name, "expected plain tensors, got DTensors, for which it has no sharding", error)
    if overload in _registered:
        raise error
    register_sharding(overload)(_rules[name])
    _registered.add(overload)
    return overload(*args)


def _refuse(name: str, text: str, error: Exception) -> NoReturn:
    raise NotImplementedError(
        f"fastgen::{name}: {text}; give it local tensors: those that ColwiseParallel returns (use_local_output=True),"
        " DTensor.to_local(), or torch.distributed.tensor.experimental.local_map"
    ) from error


def _tensors(args: Sequence[Any]) -> Iterator[Tensor]:
    for argument in args:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, (tuple, list)):
            yield from _tensors(argument)
