"""torch's Transformer layers on fastgen's attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.checks import require_probability, require_tensor, shape_of
from fastgen.nn._nested import has_forward_hooks, hidden_positions, ignored_by_kernel
from fastgen.nn._norm import normalized
from fastgen.nn._sublayers import is_untouched
from fastgen.nn.attention import MultiheadAttention, require_heads
from fastgen.ops.transforms import transforms_active

Activation: TypeAlias = str | Callable[[Tensor], Tensor]


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """``torch.nn.TransformerEncoderLayer``, differentiable twice and in forward mode.

    Self-attention and a two-layer perceptron, each with a residual connection and a layer norm: Vaswani et al.,
    "Attention is all you need" (2017), section 3.1; with ``norm_first`` Xiong et al., "On layer normalization in the
    Transformer architecture" (2020). The constructor, state dict and forward arguments are torch's, and so are the
    outputs, but for a query that may see no key (see ``MultiheadAttention``). Nested tensors go to torch's own
    inference kernels.

    Shapes: src (B, N, E) with ``batch_first``, else (N, B, E), or (N, E) -> the same.

    Args:
        d_model: E, a multiple of nhead.
        nhead: heads.
        dim_feedforward: width of the perceptron.
        dropout: probability, of attention weights, hidden units and both branches' outputs, in [0, 1).
        activation: "relu", "gelu" or a function of a tensor.
        layer_norm_eps: added to the variance.
        batch_first: whether the batch is dim 0, or dim 1.
        norm_first: normalise what goes into each branch, not the sum that comes out.
        bias: give linear maps and norms biases.

    Raises:
        ValueError: nhead does not divide d_model; a dropout out of range; an activation of another name.

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
        _check_constructor(d_model, nhead, dropout, activation)
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
        """Encode.

        Args:
            src: see above.
            src_mask: (N, N) or (B * H, N, N). Boolean, True where a query may **not** see a key, or floating.
            src_key_padding_mask: (B, N), or (N,). Boolean, True for a key that nobody sees, or floating.
            is_causal: says that src_mask is the causal mask.

        Raises:
            TypeError, ValueError: as ``MultiheadAttention``.
        """
        require_tensor("src", src, nested=True)
        if src.is_nested:
            ignored = None if self.training or has_forward_hooks(self) else ignored_by_kernel(self)
            if ignored is not None:
                raise RuntimeError(
                    "src: expected a padded tensor and src_key_padding_mask, as torch's kernel for nested tensors would"
                    f" not call {ignored}, got a nested tensor"
                )
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        masks = (src_mask, src_key_padding_mask, is_causal)
        x = src
        if self.norm_first:
            x = self._plus_self_attention(x, normalized(self.norm1, x), *masks)
            x = x + self._ff_block(normalized(self.norm2, x))
        else:
            x = normalized(self.norm1, self._plus_self_attention(x, x, *masks))
            x = normalized(self.norm2, x + self._ff_block(x))
        return x

    def _plus_self_attention(
        self, x: Tensor, y: Tensor, attn_mask: Tensor | None, padding: Tensor | None, is_causal: bool
    ) -> Tensor:
        own = type(self)._sa_block is nn.TransformerEncoderLayer._sa_block and "_sa_block" not in vars(self)
        if own and _may_add_residual(self.self_attn, self.dropout1):
            return _attend(self.self_attn, x, y, y, attn_mask, padding, is_causal)
        return x + self._sa_block(y, attn_mask, padding, is_causal)


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """``torch.nn.TransformerDecoderLayer``, differentiable twice and in forward mode.

    Self-attention, attention to an encoder's output and a two-layer perceptron, each with a residual connection and a
    layer norm: Vaswani et al., "Attention is all you need" (2017), section 3.1. The constructor, state dict and forward
    arguments are torch's, and so are the outputs, but for a query that may see no key (see ``MultiheadAttention``).

    Shapes: tgt (B, N, E) and memory (B, M, E) with ``batch_first``, else (N, B, E) and (M, B, E), or (N, E) and
    (M, E) -> like tgt.

    Args: those of ``TransformerEncoderLayer``.

    Raises:
        ValueError: nhead does not divide d_model; a dropout out of range; an activation of another name.

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
        _check_constructor(d_model, nhead, dropout, activation)
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
        """Decode.

        Args:
            tgt, memory: see above.
            tgt_mask, memory_mask: (N, N) and (N, M), or those after B * H. Boolean, True where a query may **not** see
                a key, or floating.
            tgt_key_padding_mask, memory_key_padding_mask: (B, N) and (B, M), or (N,) and (M,). Boolean, True for a key
                that nobody sees, or floating.
            tgt_is_causal, memory_is_causal: say that tgt_mask, memory_mask is the causal mask.

        Raises:
            TypeError, ValueError: as ``MultiheadAttention``.
        """
        require_tensor("tgt", tgt)
        require_tensor("memory", memory)
        of_self = (tgt_mask, tgt_key_padding_mask, tgt_is_causal)
        of_memory = (memory_mask, memory_key_padding_mask, memory_is_causal)
        x = tgt
        if self.norm_first:
            x = self._plus_self_attention(x, normalized(self.norm1, x), *of_self)
            x = self._plus_cross_attention(x, normalized(self.norm2, x), memory, *of_memory)
            x = x + self._ff_block(normalized(self.norm3, x))
        else:
            x = normalized(self.norm1, self._plus_self_attention(x, x, *of_self))
            x = normalized(self.norm2, self._plus_cross_attention(x, x, memory, *of_memory))
            x = normalized(self.norm3, x + self._ff_block(x))
        return x

    def _plus_self_attention(
        self, x: Tensor, y: Tensor, attn_mask: Tensor | None, padding: Tensor | None, is_causal: bool
    ) -> Tensor:
        own = type(self)._sa_block is nn.TransformerDecoderLayer._sa_block and "_sa_block" not in vars(self)
        if own and _may_add_residual(self.self_attn, self.dropout1):
            return _attend(self.self_attn, x, y, y, attn_mask, padding, is_causal)
        return x + self._sa_block(y, attn_mask, padding, is_causal)

    def _plus_cross_attention(
        self, x: Tensor, y: Tensor, memory: Tensor, attn_mask: Tensor | None, padding: Tensor | None, is_causal: bool
    ) -> Tensor:
        own = type(self)._mha_block is nn.TransformerDecoderLayer._mha_block and "_mha_block" not in vars(self)
        if own and _may_add_residual(self.multihead_attn, self.dropout2):
            return _attend(self.multihead_attn, x, y, memory, attn_mask, padding, is_causal)
        return x + self._mha_block(y, memory, attn_mask, padding, is_causal)


class TransformerEncoder(nn.TransformerEncoder):
    """``torch.nn.TransformerEncoder``: layers in turn, and a norm.

    Takes fastgen's layers, torch's, or any with their arguments, and makes num_layers copies. The constructor, state
    dict and forward arguments are torch's, and so are the outputs. As in torch, with ``enable_nested_tensor``, in
    inference (eval mode, nothing that requires a gradient) and with left-aligned padding but no other mask, padded
    positions are skipped, and are 0 before the last norm; otherwise they hold what attention to the other positions
    gives. Under ``torch.func`` transforms and torch.compile nothing is skipped.

    Args:
        encoder_layer: the layer to copy. num_layers: how often.
        norm: applied last.
        enable_nested_tensor: skip padding in inference.
        mask_check: before skipping, see whether the padding is left-aligned.

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
        """Encode.

        Args:
            src, mask, src_key_padding_mask: as the layers'.
            is_causal: whether mask is the causal mask; None: look, which waits for the device, as in torch. (In
                torch.compile nobody looks, and the mask is used as it is.)

        Raises:
            TypeError, ValueError: as ``MultiheadAttention``.
        """
        require_tensor("src", src, nested=True)
        if mask is None and src_key_padding_mask is not None and self._may_skip_padding(src, src_key_padding_mask):
            hidden = hidden_positions(src_key_padding_mask)
            if hidden is not None and not hidden.all():
                return super().forward(src, None, hidden, is_causal)
            if hidden is not None:  # all is skipped; torch has no nested tensor of nothing
                return torch.zeros_like(src) if self.norm is None else normalized(self.norm, torch.zeros_like(src))
        is_causal = _is_causal(mask) if is_causal is None else is_causal
        x = src
        for layer in self.layers:
            x = layer(x, src_mask=mask, src_key_padding_mask=src_key_padding_mask, is_causal=is_causal)
        return x if self.norm is None else normalized(self.norm, x)

    def _may_skip_padding(self, src: Tensor, padding: Tensor) -> bool:
        """Whether nobody differentiates or traces, which torch's nested tensors cannot follow, and torch's kernel is
        what the layers compute."""
        if not getattr(self, "use_nested_tensor", False) or self.training or torch.compiler.is_compiling():
            return False
        if not torch.is_tensor(padding) or src.dim() != 3 or padding.shape != src.shape[:2] or src.numel() == 0:
            return False
        if src.is_meta or not torch.backends.mha.get_fastpath_enabled() or not all(map(_runs_in_kernel, self.layers)):
            return False
        recorded = torch.is_grad_enabled() and (src.requires_grad or any(p.requires_grad for p in self.parameters()))
        return not recorded and not transforms_active()


class TransformerDecoder(nn.TransformerDecoder):
    """``torch.nn.TransformerDecoder``: layers in turn, and a norm.

    Takes fastgen's layers, torch's, or any with their arguments, and makes num_layers copies. The constructor, state
    dict and forward arguments are torch's, and so are the outputs.

    Args:
        decoder_layer: the layer to copy. num_layers: how often.
        norm: applied last.

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
        """Decode.

        Args:
            tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask, memory_is_causal: as the
                layers'.
            tgt_is_causal: whether tgt_mask is the causal mask; None: look, which waits for the device, as in torch. (In
                torch.compile nobody looks, and the mask is used as it is.)

        Raises:
            TypeError, ValueError: as ``MultiheadAttention``.
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
        return x if self.norm is None else normalized(self.norm, x)


class Transformer(nn.Transformer):
    """``torch.nn.Transformer``: an encoder and a decoder (Vaswani et al., "Attention is all you need", 2017).

    The constructor, state dict and forward arguments are torch's, and so are the outputs.

    Shapes: src (B, M, E) and tgt (B, N, E) with ``batch_first``, else (M, B, E) and (N, B, E), or (M, E) and (N, E)
    -> like tgt.

    Args:
        d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias: those of
            ``TransformerEncoderLayer``.
        num_encoder_layers, num_decoder_layers: layers in each stack.
        custom_encoder, custom_decoder: modules to take in place of ``TransformerEncoder``, ``TransformerDecoder``.

    Raises:
        ValueError: nhead does not divide d_model; a dropout out of range; an activation of another name.

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
        _check_constructor(d_model, nhead, dropout, activation)
        of_layer = (
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias,
            device, dtype,
        )  # fmt: skip

        def norm() -> nn.LayerNorm:
            return nn.LayerNorm(d_model, layer_norm_eps, bias=bias, device=device, dtype=dtype)

        if custom_encoder is None:
            custom_encoder = TransformerEncoder(TransformerEncoderLayer(*of_layer), num_encoder_layers, norm())
        if custom_decoder is None:
            custom_decoder = TransformerDecoder(TransformerDecoderLayer(*of_layer), num_decoder_layers, norm())
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
        """Encode src and decode tgt. Each argument goes to the encoder or decoder as it is named there.

        Raises:
            TypeError, ValueError: as ``MultiheadAttention``; src and tgt of different batches or not d_model channels.
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


def _check_constructor(d_model: int, nhead: int, dropout: float, activation: Activation) -> None:
    require_heads("d_model", d_model, "nhead", nhead)
    require_probability("dropout", dropout)
    if not callable(activation) and activation not in ("relu", "gelu"):
        raise ValueError(f"activation: expected 'relu', 'gelu' or a function, got {activation!r}")


def _is_causal(mask: Tensor | None) -> bool:
    """Whether the mask is the causal one, so that it need not be read. One that may have a derivative is kept."""
    if mask is None or torch.compiler.is_compiling() or mask.dim() != 2 or mask.size(0) != mask.size(1):
        return False
    if mask.requires_grad or mask.is_meta or transforms_active():
        return False
    if mask.dtype == torch.bool:
        return torch.equal(mask, torch.ones_like(mask).triu(1))
    return torch.equal(mask, torch.full_like(mask, -torch.inf).triu(1))


def _may_add_residual(attention: nn.Module, dropout: nn.Module) -> bool:
    """Whether the attention layer may add the residual itself: nothing is to happen, or to be seen, in between."""
    return (
        type(attention) is MultiheadAttention
        and type(dropout) is nn.Dropout
        and not (dropout.training and dropout.p > 0)
        and is_untouched(attention)
        and is_untouched(dropout)
    )


def _runs_in_kernel(layer: nn.Module) -> bool:
    forwards = (TransformerEncoderLayer.forward, nn.TransformerEncoderLayer.forward)
    known = type(layer).forward in forwards and is_untouched(layer) and not layer.training
    # torch reads weights more than once, and what computes them would run as often.
    known = known and not any("parametrizations" in module._modules for module in layer.modules())
    return known and ignored_by_kernel(cast(nn.TransformerEncoderLayer, layer)) is None


def _attend(
    attention: nn.Module,
    residual: Tensor,
    query: Tensor,
    memory: Tensor,
    attn_mask: Tensor | None,
    padding: Tensor | None,
    is_causal: bool,
) -> Tensor:
    result: Tensor = attention(
        query, memory, memory, padding, need_weights=False, attn_mask=attn_mask, is_causal=is_causal, residual=residual
    )[0]
    return result
