"""Attention of timm's models.

Modules whose code calls torch's attention function are redirected. Where timm chooses between that call and its own
softmax by ``fused_attn``, which it sets to False for Swin Transformers, for example, redirected modules take the call.
The window attention of Swin Transformer V2, which multiplies cosines by a learned temperature, has a ``forward`` of
its own here.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.integrations import _function_mode as mode
from fastgen.integrations import redirected
from fastgen.integrations._calls import fingerprint, names_used
from fastgen.integrations._windows import cosine_heads, window_attention
from fastgen.integrations.modules import AccelerationReport, is_of_library, qualified_name
from fastgen.integrations.redirected import Choice

__all__ = ["accelerate", "check_restore", "recognizes", "restore"]

_FLAG = "fused_attn"

_KNOWN_SWIN_V2 = ("1481fa6962f7fba5", "222a933229fa3b67")
"""Fingerprints of the versions of Swin V2's ``forward`` that the one here was compared with."""

_STEPS = ("softmax", "attn_drop")

_MIXED_HEADS = ("TalkingHeadAttn",)


def recognizes(model: nn.Module) -> bool:
    return any(is_of_library(module, "timm") for module in model.modules())


def accelerate(model: nn.Module) -> AccelerationReport:
    """Redirects the modules whose code calls torch's attention function, and Swin V2's window attention.

    A module is kept, with the reason in the report, if it computes the softmax itself, as the talking heads of CaiT.
    """
    return redirected.redirect_chosen(model, lambda module: _choice(module) if is_of_library(module, "timm") else None)


restore = redirected.restore
check_restore = redirected.check_restore


def _choice(module: nn.Module) -> Choice:
    cls = mode.original_class(type(module))
    if cls.__module__ == "timm.models.swin_transformer_v2" and cls.__name__ == "WindowAttention":
        if fingerprint(cls.forward) in _KNOWN_SWIN_V2:
            return mode.Variant(_swin_v2_forward)
        return f"{qualified_name(cls)} differs from the versions that fastgen knows"
    if cls.__name__ in _MIXED_HEADS:
        return f"{qualified_name(cls)} mixes heads before and after the softmax"
    choice = redirected.choice_of(module)
    if choice == mode.REDIRECTED and _FLAG in names_used(cls) and _FLAG in vars(module):
        return mode.Variant(flag=_FLAG, steps=_STEPS)
    return choice


def _swin_v2_forward(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """``forward`` of Swin V2's window attention: the temperature is folded into the queries, with its gradient.

    x (W * B, N, C), mask (W, N, N) -> (W * B, N, C).
    """
    if not mode.can_be_skipped(self, _STEPS):
        return cast(Tensor, mode.original_class(type(self)).forward(self, x, mask))
    batch, length, channels = x.shape
    if self.q_bias is None:
        qkv = self.qkv(x)
    else:
        qkv_bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
        if getattr(self, "qkv_bias_separate", False):
            qkv = self.qkv(x) + qkv_bias
        else:
            qkv = F.linear(x, self.qkv.weight, qkv_bias)
    query, key, value = qkv.reshape(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)

    query, key = cosine_heads(query, key, self.logit_scale)
    table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
    bias = table[self.relative_position_index.view(-1)].view(length, length, -1).permute(2, 0, 1)
    bias = 16 * torch.sigmoid(bias)

    dropout_p = self.attn_drop.p if self.training else 0.0
    out = window_attention(query, key, value, bias, mask, dropout_p=dropout_p, scale=1.0)
    out = self.proj(out.transpose(1, 2).reshape(batch, length, channels))
    return cast(Tensor, self.proj_drop(out))
