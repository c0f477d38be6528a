"""Buffers that a module's sizes decide: no part of the state dict, and right wherever the module comes from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Constants(nn.Module):
    """Base of modules with such buffers. They are computed anew when the module moves to other memory.

    ``to_empty`` leaves memory that nobody has written, as in ``torch.device("meta")``, ``to_empty``,
    ``load_state_dict``; a state dict that is assigned to a module on the meta device does not bring them along.
    """

    def constants(self) -> dict[str, Tensor]:
        """The buffers by name, on the CPU; called within ``torch.device("cpu")``."""
        raise NotImplementedError

    def register_constants(self) -> None:
        """Has to be called at the end of ``__init__``."""
        device = torch.get_default_device()
        for name, value in self._computed().items():
            self.register_buffer(name, value.to(device), persistent=False)
        self.register_load_state_dict_post_hook(_leave_meta)  # type: ignore[no-untyped-call]

    def _computed(self) -> dict[str, Tensor]:
        with torch.device("cpu"):
            return self.constants()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        computed: dict[str, Tensor] | None = None
        for name, buffer in self._buffers.items():
            if name in self._non_persistent_buffers_set and buffer is not None and buffer is not before[name]:
                computed = self._computed() if computed is None else computed
                if name in computed:
                    self._buffers[name] = computed[name].to(buffer)
        return self


def _leave_meta(module: Constants, keys: Any) -> None:
    weight = next(module.parameters(), None)
    if weight is None or weight.is_meta:
        return
    for name, value in module._computed().items():
        if getattr(module, name).is_meta:
            module._buffers[name] = value.to(weight.device)
