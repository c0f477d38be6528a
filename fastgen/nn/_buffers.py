"""Non-persistent buffers that are recomputed from a module's constructor arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ComputedBuffers"]


class ComputedBuffers(nn.Module):
    """Base class of modules with non-persistent buffers that depend on constructor arguments only.

    The buffers are recomputed whenever they are moved or cast, so that they are valid after ``to_empty`` and
    ``skip_init``, which allocate uninitialized memory that no state dict fills. ``load_state_dict(assign=True)`` moves
    buffers on the meta device to the device of the loaded tensors.
    """

    def _computed(self) -> dict[str, Tensor]:
        """Maps each buffer's name to its value. Called with the CPU as default device."""
        raise NotImplementedError

    def _register_computed(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        """Registers the buffers on ``device``; floating-point buffers are cast to ``dtype`` if given."""
        device = torch.get_default_device() if device is None else device
        for name, value in self._values().items():
            buffer_dtype = dtype if dtype is not None and value.is_floating_point() else value.dtype
            self.register_buffer(name, value.to(device, buffer_dtype), persistent=False)

    def _values(self) -> dict[str, Tensor]:
        with torch.device("cpu"):
            return self._computed()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ComputedBuffers:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # Buffers that did not move may be shared with other processes or read by a captured CUDA graph: leave them.
        moved = {name for name, buffer in self._buffers.items() if buffer is not None and buffer is not before[name]}
        if moved:
            with torch.no_grad():
                for name, value in self._values().items():
                    if name in moved:
                        self._buffers[name].copy_(value)  # type: ignore[union-attr]
        return self

    def _leave_meta(self, device: torch.device) -> None:
        """Materializes buffers that are on the meta device on ``device``."""
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
