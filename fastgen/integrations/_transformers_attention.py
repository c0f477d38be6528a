"""The attention function and the mask function that transformers calls by the name "fastgen"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_batchedtensor
from torch._subclasses.fake_tensor import FakeTensor
from transformers.masking_utils import sdpa_mask

from fastgen import functional
from fastgen.integrations._plain_attention import plain_attention

ARGUMENTS = frozenset(
    {"query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal"}
    | {"softcap", "s_aux", "position_bias", "output_attentions"}
    | {"sliding_window", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "position_ids"}
    | {"deterministic"}
)
"""Keywords of an attention function that are computed here, that repeat what the mask says, or that choose a kernel."""

_REFUSED = frozenset({"indices", "block_indices", "sinks"})
"""Keywords of some models that change the result, without an equivalent here."""


# --------------------------------------------------------------------------------------------------
# Masks


@dataclass(frozen=True, eq=False)
class WindowMask:
    """A mask (B, 1, N, M) of a window and of masked keys that is not stored: query i attends to keys
    i - left <= j <= i + right. Anything but fastgen's attention function uses it as the boolean tensor that it stands
    for.

    Attributes:
        padding: (B, M), boolean, False for masked keys; None masks none.
        left, right: bounds of the window; None is unbounded.
        size: (B, 1, N, M).
        place: the device.
    """

    padding: Tensor | None
    left: int | None
    right: int | None
    size: tuple[int, int, int, int]
    place: torch.device

    def dense(self) -> Tensor:
        _, _, queries, keys = self.size
        distance = torch.arange(keys, device=self.place) - torch.arange(queries, device=self.place)[:, None]
        mask = torch.ones_like(distance, dtype=torch.bool)
        if self.left is not None:
            mask = mask & (distance >= -self.left)
        if self.right is not None:
            mask = mask & (distance <= self.right)
        if self.padding is not None:
            mask = mask & self.padding[:, None, None]
        return mask.expand(self.size)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dense(), name)

    def __getitem__(self, index: Any) -> Tensor:
        return self.dense()[index]

    def __invert__(self) -> Tensor:
        return ~self.dense()

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def tensor(x: Any) -> Any:
            return x.dense() if isinstance(x, cls) else type(x)(map(tensor, x)) if type(x) in (list, tuple) else x

        return function(*map(tensor, args), **{name: tensor(x) for name, x in (kwargs or {}).items()})


def attention_mask(**arguments: Any) -> Tensor | WindowMask | None:
    """The mask of a model's layers, with the arguments of ``transformers.masking_utils.sdpa_mask``.

    None leaves causality to the attention function. A window and masked keys are not expanded to (N, M) where queries
    and keys are the same positions; elsewhere (a cache, packed sequences, a model's own pattern) the mask is a boolean
    tensor (B, 1, N, M).
    """
    given: Tensor | WindowMask | None = arguments.get("attention_mask")
    if isinstance(given, WindowMask):
        return given
    window = _window(arguments)
    if window is None:
        mask: Tensor | None = sdpa_mask(**arguments)
        return mask
    left, right = window
    size = (arguments["batch_size"], 1, _queries(arguments), arguments["kv_length"])
    padding = None if given is None or _known_true(given) else given[:, : size[-1]]
    if padding is None and left is None:
        return None
    if padding is not None and left is None and right is None:
        return padding[:, None, None].expand(size)
    device = arguments.get("device")
    if device is None:
        device = arguments["cache_position"].device if padding is None else padding.device
    return WindowMask(padding, left, right, size, torch.device(device))


def _window(arguments: dict[str, Any]) -> tuple[int | None, int | None] | None:
    """(left, right) of the mask that is requested, if it is a window over keys at the queries' positions, or none."""
    keys, start, local = arguments["kv_length"], arguments.get("kv_offset", 0), arguments.get("local_size")
    # These flags are set only where the mask is the plain one of its kind.
    causal = arguments.get("allow_is_causal_skip", True)
    both_sides = not causal and arguments.get("allow_is_bidirectional_skip", False)
    if not isinstance(start, int) or start or not (causal or both_sides):
        return None
    if causal or local is not None:
        # Without q_offset, before transformers 5.3: a cache without past tokens has as many keys as queries.
        offset, queries = arguments.get("q_offset", 0), _queries(arguments)
        if not isinstance(offset, int) or offset or queries != keys or queries == 1:
            return None
    given = arguments.get("attention_mask")
    if given is not None and given.shape[-1] < keys:
        return None
    config = arguments.get("config")
    if local is not None and (
        local != getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None) is not None
    ):
        return None
    bound = None if local is None or local >= keys else local
    if causal:
        return None if bound is None else bound - 1, 0
    return bound, bound


def _queries(arguments: dict[str, Any]) -> int:
    queries: int = arguments["q_length"] if "q_length" in arguments else arguments["cache_position"].shape[0]
    return queries


def _known_true(mask: Tensor) -> bool:
    """Whether the mask masks nothing, where its values may be read."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return False
    if isinstance(mask, FakeTensor) or is_batchedtensor(mask):
        return False
    return bool(mask.all())


# --------------------------------------------------------------------------------------------------
# Attention


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | WindowMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    *,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of a layer, as ``transformers.AttentionInterface`` calls it.

    Args:
        module: the attention layer; ``is_causal`` applies where there is no mask.
        query: (B, H, N, Dk).
        key: (B, Hk, M, Dk).
        value: (B, Hk, M, Dv).
        attention_mask: broadcasts to (B, H, N, M); boolean or added to the scores. None with more than one query is
            causal, unless the layer is not.
        dropout: probability of dropping a weight.
        scaling: factor of the scores.
        is_causal: overrides the layer's.
        softcap: bound of the scores before the mask is added.
        s_aux: (H,), a logit per head that joins the softmax and has no value.
        position_bias: broadcasts to (B, H, N, M), added to the scores.
        output_attentions: also return the weights; computed with PyTorch's operators in float32, in O(N M) memory.
        others: ignored if None, or if they repeat what the mask says.

    Returns:
        out (B, N, H, Dv), and the weights (B, H, N, M) or None.

    Raises:
        TypeError: an argument that changes the result and has no equivalent here, or packed sequences that no mask
            separates.
    """
    refused = [name for name in sorted(_REFUSED & others.keys()) if others[name] is not None]
    if refused:
        raise TypeError(f"{refused[0]}: fastgen's attention has no such argument, {type(module).__name__} needs it")
    if attention_mask is None and others.get("cu_seq_lens_q") is not None and others["cu_seq_lens_q"].numel() > 2:
        raise TypeError(
            "cu_seq_lens_q: expected packed sequences with position_ids or a mask as well, got lengths alone"
        )
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    left: int | None = None
    right: int | None = None
    mask: Tensor | None
    if isinstance(attention_mask, WindowMask):
        left, right = attention_mask.left, attention_mask.right
        mask = None if attention_mask.padding is None else attention_mask.padding[:, None, None]
    else:
        mask = _without_repeated_rows(attention_mask)
        if mask is None and causal and query.size(-2) > 1:
            right = 0
            if key.size(-2) > query.size(-2):  # a cache of fixed length, filled from the start: the rest is masked
                key, value = key[..., : query.size(-2), :], value[..., : query.size(-2), :]
                position_bias = None if position_bias is None else position_bias[..., : query.size(-2)]
    if position_bias is not None:
        mask = _biased(position_bias, mask)
    weighted = output_attentions or getattr(getattr(module, "config", None), "output_attentions", False)
    weights: Tensor | None = None
    if weighted:
        scale = query.size(-1) ** -0.5 if scaling is None else scaling
        out, weights, lse = plain_attention(query, key, value, mask, (left, right), dropout, scale, softcap)
        if s_aux is not None:
            # The sink's share of the softmax: exp(lse) / (exp(lse) + exp(sink)), in the precision of lse.
            share = torch.sigmoid(lse - s_aux.to(lse.dtype).reshape(1, -1, 1))[..., None]
            out, weights = (out * share).to(out.dtype), (weights * share).to(weights.dtype)
    else:
        out = functional.scaled_dot_product_attention(  # type: ignore[assignment]
            query,
            key,
            value,
            mask,
            dropout,
            scale=scaling,
            enable_gqa=key.size(1) != query.size(1),
            window=None if left is None and right is None else (left, right),
            softcap=softcap,
            sinks=s_aux,
        )
    return out.transpose(1, 2).contiguous(), weights if weighted else None


def _without_repeated_rows(mask: Tensor | None) -> Tensor | None:
    """The mask with one row where all are the same memory, which the operator reads without expanding it."""
    return mask[..., :1, :] if mask is not None and mask.size(-2) > 1 and mask.stride(-2) == 0 else mask


def _biased(bias: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return bias
    return torch.where(mask, bias, -torch.inf) if mask.dtype == torch.bool else bias + mask
