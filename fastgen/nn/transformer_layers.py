"""Encoder and decoder layers, drop-in replacements for torch's Transformer layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.checks import require_probability, require_tensor
from fastgen.nn import _fast_path
from fastgen.nn._checks import require_divisible
from fastgen.nn._nested import has_forward_hooks, unsupported_sublayer
from fastgen.nn._norm import apply_norm
from fastgen.nn._sublayers import is_unhooked
from fastgen.nn.attention import MultiheadAttention

__all__ = ["Activation", "TransformerDecoderLayer", "TransformerEncoderLayer", "check_constructor"]

Activation: TypeAlias = str | Callable[[Tensor], Tensor]
Masks: TypeAlias = tuple[Tensor | None, Tensor | None, bool]
"""Attention mask, key padding mask and is_causal."""


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """Drop-in replacement for ``torch.nn.TransformerEncoderLayer`` with second-order and forward-mode derivatives.

    Self-attention and a feed-forward network, each with a residual connection and a layer norm: Vaswani et al.,
    "Attention is all you need" (2017), section 3.1; with ``norm_first``, Xiong et al., "On layer normalization in the
    Transformer architecture" (2020). The constructor, state dict, forward arguments and outputs are the same as in
    torch, except for fully masked queries (see ``MultiheadAttention``). Nested tensors are passed to torch's own
    inference kernels.

    Shapes:
        - src: (B, N, E) with ``batch_first``, otherwise (N, B, E); or (N, E) without a batch.
        - Output: same as src.

    Args:
        d_model: number of channels E, a multiple of ``nhead``.
        nhead: number of heads.
        dim_feedforward: hidden width of the feed-forward network.
        dropout: dropout probability of attention weights, hidden units and the outputs of both branches, in [0, 1).
        activation: "relu", "gelu" or a function of a tensor.
        layer_norm_eps: epsilon of the layer norms.
        batch_first: whether the batch is dim 0 of inputs and output; otherwise dim 1.
        norm_first: whether the layer norms are applied to the input of each branch (pre-norm); otherwise after each
            residual connection (post-norm).
        bias: whether linear layers and layer norms have biases.

    Raises:
        ValueError: if ``nhead`` does not divide ``d_model``, ``dropout`` is out of range, or ``activation`` is unknown.

    Example:
        >>> TransformerEncoderLayer(16, 4, batch_first=True)(torch.randn(2, 5, 16)).shape
        torch.Size([2, 5, 16])
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_constructor(d_model, nhead, dropout, activation)
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias,
            device, dtype,
        )  # fmt: skip
        self.self_attn.__class__ = MultiheadAttention

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Applies the layer.

        Args:
            src: input sequence; see the class for shapes.
            src_mask: (N, N) or (B * H, N, N). Boolean (True: the query does **not** attend to the key), or floating
                and added to the scores.
            src_key_padding_mask: (B, N), or (N,) without a batch. Boolean (True: the key is masked), or floating.
            is_causal: hint that ``src_mask`` is the causal mask.

        Returns:
            Tensor with the shape of src.

        Raises:
            TypeError, ValueError: see ``MultiheadAttention``.
        """
        require_tensor("src", src, nested=True)
        if src.is_nested:
            unsupported = None if self.training or has_forward_hooks(self) else unsupported_sublayer(self)
            if unsupported is not None:
                raise RuntimeError(
                    "src: expected a padded tensor and src_key_padding_mask, as torch's kernel for nested tensors would"
                    f" not call {unsupported}, got a nested tensor"
                )
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        masks = (src_mask, src_key_padding_mask, is_causal)
        x = src
        if (
            not self.training
            and src_mask is src_key_padding_mask is None
            and not is_causal
            and type(self) is TransformerEncoderLayer
            and type(self.self_attn) is MultiheadAttention
            and _fast_path.takes(self.self_attn, x)
            and unsupported_sublayer(self) is None
        ):
            out = _fast_path.encoder_layer(self, x)
            if out is not None:
                return out
        if self.norm_first:
            x = self._self_attention(x, apply_norm(self.norm1, x), masks)
            x = x + self._ff_block(apply_norm(self.norm2, x))
        else:
            x = apply_norm(self.norm1, self._self_attention(x, x, masks))
            x = apply_norm(self.norm2, x + self._ff_block(x))
        return x

    def _self_attention(self, residual: Tensor, x: Tensor, masks: Masks) -> Tensor:
        block = nn.TransformerEncoderLayer._sa_block
        return _residual_attention(self, block, self.self_attn, self.dropout1, residual, (x,), masks)


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """Drop-in replacement for ``torch.nn.TransformerDecoderLayer`` with second-order and forward-mode derivatives.

    Self-attention, cross-attention to an encoder's output and a feed-forward network, each with a residual connection
    and a layer norm: Vaswani et al., "Attention is all you need" (2017), section 3.1. The constructor, state dict,
    forward arguments and outputs are the same as in torch, except for fully masked queries (see
    ``MultiheadAttention``).

    Shapes:
        - tgt: (B, N, E) with ``batch_first``, otherwise (N, B, E); or (N, E) without a batch.
        - memory: (B, M, E) with ``batch_first``, otherwise (M, B, E); or (M, E) without a batch.
        - Output: same as tgt.

    Args:
        d_model: number of channels E, a multiple of ``nhead``.
        nhead: number of heads.
        dim_feedforward: hidden width of the feed-forward network.
        dropout: dropout probability of attention weights, hidden units and the outputs of all branches, in [0, 1).
        activation: "relu", "gelu" or a function of a tensor.
        layer_norm_eps: epsilon of the layer norms.
        batch_first: whether the batch is dim 0 of inputs and output; otherwise dim 1.
        norm_first: whether the layer norms are applied to the input of each branch (pre-norm); otherwise after each
            residual connection (post-norm).
        bias: whether linear layers and layer norms have biases.

    Raises:
        ValueError: if ``nhead`` does not divide ``d_model``, ``dropout`` is out of range, or ``activation`` is unknown.

    Example:
        >>> TransformerDecoderLayer(16, 4)(torch.randn(5, 2, 16), torch.randn(7, 2, 16)).shape
        torch.Size([5, 2, 16])
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_constructor(d_model, nhead, dropout, activation)
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias,
            device, dtype,
        )  # fmt: skip
        self.self_attn.__class__ = MultiheadAttention
        self.multihead_attn.__class__ = MultiheadAttention

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Applies the layer.

        Args:
            tgt: target sequence; see the class for shapes.
            memory: output of the encoder.
            tgt_mask: (N, N) or (B * H, N, N). Boolean (True: the query does **not** attend to the key), or floating
                and added to the scores.
            memory_mask: (N, M) or (B * H, N, M), the same for cross-attention.
            tgt_key_padding_mask: (B, N), or (N,) without a batch. Boolean (True: the key is masked), or floating.
            memory_key_padding_mask: (B, M), or (M,) without a batch, the same for cross-attention.
            tgt_is_causal: hint that ``tgt_mask`` is the causal mask.
            memory_is_causal: hint that ``memory_mask`` is the causal mask.

        Returns:
            Tensor with the shape of tgt.

        Raises:
            TypeError, ValueError: see ``MultiheadAttention``.
        """
        require_tensor("tgt", tgt)
        require_tensor("memory", memory)
        tgt_masks = (tgt_mask, tgt_key_padding_mask, tgt_is_causal)
        memory_masks = (memory_mask, memory_key_padding_mask, memory_is_causal)
        x = tgt
        if self.norm_first:
            x = self._self_attention(x, apply_norm(self.norm1, x), tgt_masks)
            x = self._cross_attention(x, apply_norm(self.norm2, x), memory, memory_masks)
            x = x + self._ff_block(apply_norm(self.norm3, x))
        else:
            x = apply_norm(self.norm1, self._self_attention(x, x, tgt_masks))
            x = apply_norm(self.norm2, self._cross_attention(x, x, memory, memory_masks))
            x = apply_norm(self.norm3, x + self._ff_block(x))
        return x

    def _self_attention(self, residual: Tensor, x: Tensor, masks: Masks) -> Tensor:
        block = nn.TransformerDecoderLayer._sa_block
        return _residual_attention(self, block, self.self_attn, self.dropout1, residual, (x,), masks)

    def _cross_attention(self, residual: Tensor, x: Tensor, memory: Tensor, masks: Masks) -> Tensor:
        block = nn.TransformerDecoderLayer._mha_block
        return _residual_attention(self, block, self.multihead_attn, self.dropout2, residual, (x, memory), masks)


def check_constructor(d_model: int, nhead: int, dropout: float, activation: Activation) -> None:
    require_divisible("d_model", d_model, "nhead", nhead)
    require_probability("dropout", dropout)
    if not callable(activation) and activation not in ("relu", "gelu"):
        raise ValueError(f"activation: expected 'relu', 'gelu' or a function, got {activation!r}")


def _residual_attention(
    layer: nn.Module,
    block: Callable[..., Tensor],
    attention: nn.Module,
    dropout: nn.Module,
    residual: Tensor,
    inputs: tuple[Tensor, ...],
    masks: Masks,
) -> Tensor:
    """Computes ``residual + block(layer, *inputs, *masks)`` for an attention block of torch's layer class.

    The attention layer adds the residual itself, in the epilogue of its output projection, unless ``block`` is
    overridden or something happens between the two.
    """
    name = block.__name__
    overridden = getattr(type(layer), name) is not block or name in vars(layer)
    if overridden or not _can_fuse_residual(attention, dropout):
        output: Tensor = getattr(layer, name)(*inputs, *masks)
        return residual + output
    attn_mask, padding, is_causal = masks
    query, memory = inputs[0], inputs[-1]
    options: dict[str, Any] = {"need_weights": False, "attn_mask": attn_mask, "is_causal": is_causal}
    result: Tensor = attention(query, memory, memory, padding, **options, residual=residual)[0]
    return result


def _can_fuse_residual(attention: nn.Module, dropout: nn.Module) -> bool:
    """Whether neither dropout nor a hook is applied between the output projection and the residual connection."""
    return (
        type(attention) is MultiheadAttention
        and type(dropout) is nn.Dropout
        and not (dropout.training and dropout.p > 0)
        and is_unhooked(attention)
        and is_unhooked(dropout)
    )
