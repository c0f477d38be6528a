"""``__torch_function__``: tensor subclasses and function modes receive one call of a public function, as of torch's.
And the refusal of ``torch.jit.script``.

``overridden`` is the check at the front of every public function, 0.1 µs. Where it is true, ``relevant`` says whom the
call is handed to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import handle_torch_function as handle_torch_function
from torch.overrides import has_torch_function
from torch.overrides import has_torch_function_variadic as overridden

__all__ = ["handle_torch_function", "items", "overridden", "overridden_heads", "refuse_script", "relevant"]


_KNOWN = ("CausalBias", "NestedTensor")


def relevant(*arguments: Any) -> tuple[Any, ...]:
    """The arguments whose ``__torch_function__``, or that of a mode, is called instead of the function; () for none.

    Not those of ``CausalBias`` and nested tensors, which know torch's function only: the functions know them. A traced
    call (``torch.compile``, ``torch.export``) goes on: the tracer handles subclasses and modes in what is called.
    """
    if torch.compiler.is_compiling():
        return ()
    tensors = tuple(tensor for tensor in arguments if type(tensor).__name__ not in _KNOWN)
    return tensors if has_torch_function(tensors) else ()


def refuse_script(function: Any) -> None:
    """Lets ``torch.jit.script`` raise one error for a function, or for a class of modules, that it cannot compile."""
    hint = "use torch.compile or torch.export"
    if not isinstance(function, type):
        function.__script_unsupported = (
            f"fastgen.functional.{function.__name__} cannot be compiled by torch.jit.script; {hint}"
        )
        return

    def __prepare_scriptable__(self: Any) -> Any:
        raise RuntimeError(
            f"torch.jit.script: expected modules of PyTorch, got {type(self).__name__} of fastgen.nn; {hint}, or call"
            " fastgen.restore first if fastgen.accelerate replaced the layer"
        )

    function.__prepare_scriptable__ = __prepare_scriptable__  # type: ignore[attr-defined]


def items(*groups: Any) -> tuple[Any, ...]:
    """The items of those groups that are tuples or lists: weights of norms, tables of rotary embedding."""
    found: tuple[Any, ...] = ()
    for group in groups:
        if isinstance(group, (tuple, list)):
            found += tuple(group)
    return found


def overridden_heads(x: Any, weight: Any, bias: Any, norms: Any, rotary: Any) -> bool:
    """``overridden`` for the arguments of a projection to heads."""
    if rotary is None and type(norms) is tuple and not norms:
        return overridden(x, weight, bias)
    return overridden(x, weight, bias, *items(norms, rotary))
