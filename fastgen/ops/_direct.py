"""What the direct paths of common CPU calls have in common: see ``attention.direct`` and ``projection.direct``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.parameter import Parameter

from fastgen.backend.selection import selection

PLAIN = frozenset((Tensor, Parameter))
"""Types of tensors without behavior of their own."""

_dispatch_modes = torch._C._len_torch_dispatch_stack  # type: ignore[attr-defined]
_autocast = torch._C._is_any_autocast_enabled  # type: ignore[attr-defined]
_interpreter = torch._C._functorch.peek_interpreter_stack
_is_tracing = torch._C._is_tracing


def is_watched() -> bool:
    """Whether a mode watches operators, such as that of fake tensors, or there is autocast."""
    return bool(_dispatch_modes() or _autocast())


def is_common() -> bool:
    """Whether no backend is forced, nothing watches operators, and there is no autocast."""
    return not (selection.backend != "auto" or _dispatch_modes() or _autocast())


def is_transformed() -> bool:
    """Whether a transform or a dual level is active, or torch.jit.trace records."""
    return bool(forward_ad._current_level >= 0 or _interpreter() is not None or _is_tracing())
