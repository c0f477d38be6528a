"""Loading of state dicts that were saved by other implementations of a layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

__all__ = ["StateDictRemapping"]


def _without_trailing_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape


class StateDictRemapping(nn.Module):
    """Mixin whose ``load_state_dict`` also accepts the key names and 1x1 kernels of other implementations."""

    key_aliases: ClassVar[Mapping[str, str]] = {}
    """Maps a submodule's name in other implementations to its name in this layer."""

    def _remap_state_dict(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Renames and reshapes this layer's entries in place. ``load_state_dict`` passes a copy of the mapping."""
        for alias, name in self.key_aliases.items():
            for key in [key for key in state_dict if key.startswith(f"{prefix}{alias}.")]:
                state_dict[prefix + name + key.removeprefix(prefix + alias)] = state_dict.pop(key)
        for name, parameter in self.named_parameters():
            entry = state_dict.get(prefix + name)
            if isinstance(entry, Tensor) and _without_trailing_ones(entry.shape) == _without_trailing_ones(
                parameter.shape
            ):
                state_dict[prefix + name] = entry.reshape(parameter.shape)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        self._remap_state_dict(state_dict, prefix)
        expected = self.state_dict().keys()
        given = [key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)]
        if strict and not expected <= set(given):
            aliases = f" (or {', '.join(self.key_aliases)} for its submodules)" if self.key_aliases else ""
            error_msgs.append(
                f"state_dict: expected the entries {', '.join(expected)} of {type(self).__name__}{aliases}, got"
                f" {', '.join(given) or 'none'}; rename them, or load them into a layer built with the same arguments"
                " as the one that saved them."
            )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
