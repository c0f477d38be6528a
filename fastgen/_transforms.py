"""Who is watching a call."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def transforms_active() -> bool:
    """Whether forward-mode derivatives or a torch.func transform may be watching."""
    return bool(forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None)
