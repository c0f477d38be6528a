"""State dicts that other implementations of a layer have saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn


def _without_trailing_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape


class LoadsOtherNames(nn.Module):
    """A layer whose ``load_state_dict`` also takes the names and the 1x1 kernels of other implementations."""

    other_names: ClassVar[Mapping[str, str]] = {}
    """Their name of a submodule to ours."""

    def _translate(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Gives this layer's entries their names and shapes here. ``load_state_dict`` passes a copy of the mapping."""
        for theirs, ours in self.other_names.items():
            for key in [key for key in state_dict if key.startswith(f"{prefix}{theirs}.")]:
                state_dict[prefix + ours + key.removeprefix(prefix + theirs)] = state_dict.pop(key)
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
        self._translate(state_dict, prefix)
        own = self.state_dict().keys()
        given = [key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)]
        if strict and not own <= set(given):
            known = f" (or {', '.join(self.other_names)} for its submodules)" if self.other_names else ""
            error_msgs.append(
                f"state_dict: expected the entries {', '.join(own)} of {type(self).__name__}{known}, got"
                f" {', '.join(given) or 'none'}; rename them, or load them into a layer built with the same arguments"
                " as the one that saved them."
            )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
