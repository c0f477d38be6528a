"""Encoder, decoder and encoder-decoder, drop-in replacements for torch's Transformer modules."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.checks import has_data, require_tensor, shape_of
from fastgen.nn._nested import boolean_padding_mask, unsupported_sublayer
from fastgen.nn._norm import apply_norm
from fastgen.nn._sublayers import is_unhooked
from fastgen.nn.transformer_layers import (
    Activation,
    TransformerDecoderLayer,
    TransformerEncoderLayer,
    check_constructor,
)
from fastgen.ops.transforms import transforms_active

__all__ = ["Transformer", "TransformerDecoder", "TransformerEncoder"]


class TransformerEncoder(nn.TransformerEncoder):
    """Drop-in replacement for ``torch.nn.TransformerEncoder``: a stack of encoder layers and an optional final norm.

    The layer may be fastgen's, torch's, or any module with the same forward arguments. The constructor, state dict,
    forward arguments and outputs are the same as in torch. As in torch, padded positions are skipped in inference
    (eval mode, nothing requires grad) with ``enable_nested_tensor``, left-aligned padding and no other mask; they are
    then 0 before the final norm. Nothing is skipped under ``torch.func`` transforms and ``torch.compile``.

    Args:
        encoder_layer: layer that is copied ``num_layers`` times.
        num_layers: number of layers.
        norm: layer norm after the last layer, or None.
        enable_nested_tensor: whether to skip padding in inference.
        mask_check: whether to check that padding is left-aligned before skipping it.

    Example:
        >>> encoder = TransformerEncoder(TransformerEncoderLayer(16, 4, batch_first=True), num_layers=2)
        >>> encoder(torch.randn(2, 5, 16)).shape
        torch.Size([2, 5, 16])
    """

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """Applies the layers.

        Args:
            src: input sequence; see ``TransformerEncoderLayer`` for shapes.
            mask: attention mask (N, N) or (B * H, N, N).
            src_key_padding_mask: padding mask (B, N), or (N,) without a batch.
            is_causal: whether ``mask`` is the causal mask. None: detected, which synchronizes with the device, as in
                torch. Under ``torch.compile``, nothing is detected and the mask is read.

        Returns:
            Tensor with the shape of src.

        Raises:
            TypeError, ValueError: see ``MultiheadAttention``.
        """
        require_tensor("src", src, nested=True)
        if mask is None and src_key_padding_mask is not None and self._can_skip_padding(src, src_key_padding_mask):
            padding = boolean_padding_mask(src_key_padding_mask)
            if padding is not None and not padding.all():
                return super().forward(src, None, padding, is_causal)
            if padding is not None:  # all positions are skipped; torch has no empty nested tensors
                return torch.zeros_like(src) if self.norm is None else apply_norm(self.norm, torch.zeros_like(src))
        is_causal = _is_causal(mask) if is_causal is None else is_causal
        x = src
        for layer in self.layers:
            x = layer(x, src_mask=mask, src_key_padding_mask=src_key_padding_mask, is_causal=is_causal)
        return x if self.norm is None else apply_norm(self.norm, x)

    def _can_skip_padding(self, src: Tensor, padding: Tensor) -> bool:
        """Whether torch's nested-tensor fast path is equivalent: nothing is differentiated or traced, and all layers
        compute what the fast path computes."""
        if not getattr(self, "use_nested_tensor", False) or self.training or torch.compiler.is_compiling():
            return False
        if not torch.is_tensor(padding) or src.dim() != 3 or padding.shape != src.shape[:2] or src.numel() == 0:
            return False
        if (
            not has_data(src)
            or not torch.backends.mha.get_fastpath_enabled()
            or not all(map(_supports_fast_path, self.layers))
        ):
            return False
        recorded = torch.is_grad_enabled() and (src.requires_grad or any(p.requires_grad for p in self.parameters()))
        return not recorded and not transforms_active()


class TransformerDecoder(nn.TransformerDecoder):
    """Drop-in replacement for ``torch.nn.TransformerDecoder``: a stack of decoder layers and an optional final norm.

    The layer may be fastgen's, torch's, or any module with the same forward arguments. The constructor, state dict,
    forward arguments and outputs are the same as in torch.

    Args:
        decoder_layer: layer that is copied ``num_layers`` times.
        num_layers: number of layers.
        norm: layer norm after the last layer, or None.

    Example:
        >>> decoder = TransformerDecoder(TransformerDecoderLayer(16, 4, batch_first=True), num_layers=2)
        >>> decoder(torch.randn(2, 5, 16), torch.randn(2, 7, 16)).shape
        torch.Size([2, 5, 16])
    """

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Applies the layers.

        Args:
            tgt: target sequence; see ``TransformerDecoderLayer`` for shapes.
            memory: output of the encoder.
            tgt_mask: attention mask (N, N) or (B * H, N, N).
            memory_mask: mask (N, M) or (B * H, N, M) of cross-attention.
            tgt_key_padding_mask: padding mask (B, N), or (N,) without a batch.
            memory_key_padding_mask: padding mask (B, M), or (M,) without a batch.
            tgt_is_causal: whether ``tgt_mask`` is the causal mask. None: detected, which synchronizes with the device,
                as in torch. Under ``torch.compile``, nothing is detected and the mask is read.
            memory_is_causal: whether ``memory_mask`` is the causal mask.

        Returns:
            Tensor with the shape of tgt.

        Raises:
            TypeError, ValueError: see ``MultiheadAttention``.
        """
        tgt_is_causal = _is_causal(tgt_mask) if tgt_is_causal is None else tgt_is_causal
        x = tgt
        for layer in self.layers:
            x = layer(
                x,
                memory,
                tgt_mask=tgt_mask,
                memory_mask=memory_mask,
                tgt_key_padding_mask=tgt_key_padding_mask,
                memory_key_padding_mask=memory_key_padding_mask,
                tgt_is_causal=tgt_is_causal,
                memory_is_causal=memory_is_causal,
            )
        return x if self.norm is None else apply_norm(self.norm, x)


class Transformer(nn.Transformer):
    """Drop-in replacement for ``torch.nn.Transformer``: an encoder and a decoder.

    Vaswani et al., "Attention is all you need" (2017). The constructor, state dict, forward arguments and outputs are
    the same as in torch, except for fully masked queries (see ``MultiheadAttention``).

    Shapes:
        - src: (B, M, E) with ``batch_first``, otherwise (M, B, E); or (M, E) without a batch.
        - tgt: (B, N, E) with ``batch_first``, otherwise (N, B, E); or (N, E) without a batch.
        - Output: same as tgt.

    Args:
        d_model: number of channels E, a multiple of ``nhead``.
        nhead: number of heads.
        num_encoder_layers: number of encoder layers.
        num_decoder_layers: number of decoder layers.
        dim_feedforward: hidden width of the feed-forward networks.
        dropout: dropout probability, in [0, 1); see ``TransformerEncoderLayer``.
        activation: "relu", "gelu" or a function of a tensor.
        custom_encoder: module to use instead of ``TransformerEncoder``.
        custom_decoder: module to use instead of ``TransformerDecoder``.
        layer_norm_eps: epsilon of the layer norms.
        batch_first: whether the batch is dim 0 of inputs and output; otherwise dim 1.
        norm_first: whether the layer norms are applied to the input of each branch; see ``TransformerEncoderLayer``.
        bias: whether linear layers and layer norms have biases.

    Raises:
        ValueError: if ``nhead`` does not divide ``d_model``, ``dropout`` is out of range, or ``activation`` is unknown.

    Example:
        >>> model = Transformer(16, 4, 1, 1, dim_feedforward=32)
        >>> model(torch.randn(7, 2, 16), torch.randn(5, 2, 16)).shape
        torch.Size([5, 2, 16])
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = F.relu,
        custom_encoder: nn.Module | None = None,
        custom_decoder: nn.Module | None = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_constructor(d_model, nhead, dropout, activation)
        layer_args = (
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias,
            device, dtype,
        )  # fmt: skip

        def norm() -> nn.LayerNorm:
            return nn.LayerNorm(d_model, layer_norm_eps, bias=bias, device=device, dtype=dtype)

        if custom_encoder is None:
            custom_encoder = TransformerEncoder(TransformerEncoderLayer(*layer_args), num_encoder_layers, norm())
        if custom_decoder is None:
            custom_decoder = TransformerDecoder(TransformerDecoderLayer(*layer_args), num_decoder_layers, norm())
        super().__init__(
            d_model, nhead, custom_encoder=custom_encoder, custom_decoder=custom_decoder, batch_first=batch_first
        )

    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        src_is_causal: bool | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Encodes src and decodes tgt.

        Args:
            src: input sequence of the encoder; see the class for shapes.
            tgt: input sequence of the decoder.
            src_mask: attention mask (M, M) or (B * H, M, M) of the encoder.
            tgt_mask: attention mask (N, N) or (B * H, N, N) of the decoder.
            memory_mask: mask (N, M) or (B * H, N, M) of cross-attention.
            src_key_padding_mask: padding mask (B, M), or (M,) without a batch, of the encoder.
            tgt_key_padding_mask: padding mask (B, N), or (N,) without a batch, of the decoder.
            memory_key_padding_mask: padding mask (B, M), or (M,) without a batch, of cross-attention.
            src_is_causal: whether ``src_mask`` is the causal mask; None: detected.
            tgt_is_causal: whether ``tgt_mask`` is the causal mask; None: detected.
            memory_is_causal: whether ``memory_mask`` is the causal mask.

        Returns:
            Tensor with the shape of tgt.

        Raises:
            TypeError, ValueError: see ``MultiheadAttention``; src and tgt with different batch sizes or other channels.
        """
        for name, tensor in (("src", src), ("tgt", tgt)):
            require_tensor(name, tensor)
            if tensor.dim() not in (2, 3) or tensor.dim() != src.dim() or tensor.size(-1) != self.d_model:
                expected = f"(N, {self.d_model}) or, with a batch, {'(B, N, ' if self.batch_first else '(N, B, '}"
                raise ValueError(f"{name}: expected {expected}{self.d_model}), got {shape_of(tensor)}")
        batch = 0 if self.batch_first else 1
        if src.dim() == 3 and src.size(batch) != tgt.size(batch):
            raise ValueError(f"tgt: expected src's batch {src.size(batch)} in dim {batch}, got {shape_of(tgt)}")
        return super().forward(
            src, tgt, src_mask, tgt_mask, memory_mask, src_key_padding_mask, tgt_key_padding_mask,
            memory_key_padding_mask, src_is_causal, tgt_is_causal, memory_is_causal,
        )  # fmt: skip


def _is_causal(mask: Tensor | None) -> bool:
    """Whether the mask is the causal mask, so that it need not be read. False if it may be differentiated."""
    if mask is None or torch.compiler.is_compiling() or mask.dim() != 2 or mask.size(0) != mask.size(1):
        return False
    if mask.requires_grad or not has_data(mask) or transforms_active():
        return False
    if mask.dtype == torch.bool:
        return torch.equal(mask, torch.ones_like(mask).triu(1))
    return torch.equal(mask, torch.full_like(mask, -torch.inf).triu(1))


def _supports_fast_path(layer: nn.Module) -> bool:
    forwards = (TransformerEncoderLayer.forward, nn.TransformerEncoderLayer.forward)
    supported = type(layer).forward in forwards and is_unhooked(layer) and not layer.training
    # torch reads each weight several times, and would evaluate parametrizations each time.
    supported = supported and not any("parametrizations" in module._modules for module in layer.modules())
    return supported and unsupported_sublayer(cast(nn.TransformerEncoderLayer, layer)) is None
