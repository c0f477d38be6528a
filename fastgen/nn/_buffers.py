"""Buffers that follow from a module's arguments."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["ComputedBuffers"]


class ComputedBuffers(nn.Module):
    """A module with buffers that are computed from its arguments and are not in its state dict.

    They are computed again whenever they move to new memory or another dtype. After ``to_empty`` or ``skip_init``,
    which leave memory as it comes, no state dict would fill them.
    """

    def _computed(self) -> dict[str, Tensor]:
        """Name of a buffer -> its value. Called with the CPU as default device."""
        raise NotImplementedError

    def _register_computed(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        """Registers them, on ``device``, floating ones in ``dtype`` where there is one."""
        device = torch.get_default_device() if device is None else device
        for name, value in self._values().items():
            wanted = dtype if value.is_floating_point() else None
            self.register_buffer(name, value.to(device, wanted or value.dtype), persistent=False)

    def _values(self) -> dict[str, Tensor]:
        with torch.device("cpu"):
            return self._computed()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ComputedBuffers:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # Those that stay where they are may be shared with other processes, or read by a captured CUDA graph.
        moved = {name for name, buffer in self._buffers.items() if buffer is not None and buffer is not before[name]}
        if moved:
            with torch.no_grad():
                for name, value in self._values().items():
                    if name in moved:
                        self._buffers[name].copy_(value)  # type: ignore[union-attr]
        return self
