"""Buffers that follow from a module's arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ComputedBuffers"]


class ComputedBuffers(nn.Module):
    """A module with buffers that are computed from its arguments and are not in its state dict.

    They are computed again whenever they move to new memory or another dtype. After ``to_empty`` or ``skip_init``,
    which leave memory as it comes, no state dict would fill them. ``load_state_dict(assign=True)`` takes those on the
    meta device to the device of the loaded tensors.
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

    def _leave_meta(self, device: torch.device) -> None:
        """Those that are still on the meta device move to another."""
        if device.type == "meta":
            return
        for name, value in self._values().items():
            buffer = self._buffers[name]
            if buffer is not None and buffer.is_meta:
                self._buffers[name] = value.to(device, buffer.dtype)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)  # type: ignore[no-untyped-call]
        if local_metadata.get("assign_to_params_buffers", False):
            loaded = (entry for key, entry in state_dict.items() if key.startswith(prefix))
            device = next((entry.device for entry in loaded if isinstance(entry, Tensor)), None)
            if device is not None:
                self._leave_meta(device)
