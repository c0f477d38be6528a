"""Multi-head attention, a drop-in replacement for ``torch.nn.MultiheadAttention``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen import functional
from fastgen.checks import require_floating, require_probability, require_shape, require_tensor, shape_of
from fastgen.nn import _fast_path
from fastgen.nn._checks import require_divisible
from fastgen.nn._sublayers import is_pointwise, merge_heads


class MultiheadAttention(nn.MultiheadAttention):
    """Drop-in replacement for ``torch.nn.MultiheadAttention`` with fused second-order and forward-mode derivatives.

    Vaswani et al., "Attention is all you need" (2017), section 3.2.2. The constructor, parameters, state dict, forward
    arguments and outputs are the same as in torch, except for the following:

    - A fully masked query has attention output 0 and weights 0, so that its output is the bias of ``out_proj``. Some
      of torch's implementations return NaN.
    - ``need_weights=False`` never materializes the (L, S) weights, except in inference on CPU for few short sequences,
      where torch's kernel is called. ``need_weights=True``, the default as in torch, computes the weights and the
      output in plain PyTorch.
    - Masks are broadcast, never expanded: a padding mask is not copied for each head and query.
    - ``key_padding_mask`` and ``attn_mask`` may have different dtypes; they are combined into one floating mask.
    - ``out_proj`` is called if it has hooks or is not a plain ``nn.Linear`` (an adapter, for example). torch never
      calls it.
    - Nested tensors are passed to torch's own inference kernels, which raise for unsupported arguments.

    Shapes:
        - With ``batch_first``: query (B, L, E), key (B, S, kdim), value (B, S, vdim) -> output (B, L, E), weights
          (B, L, S) or None.
        - Without: query (L, B, E), key (S, B, kdim), value (S, B, vdim) -> output (L, B, E), contiguous, and weights
          (B, L, S) or None.
        - A single sequence has no batch dim: (L, E), (S, kdim), (S, vdim) -> (L, E), (L, S).

    Args:
        embed_dim: number of channels E, a multiple of ``num_heads``.
        num_heads: number of heads H.
        dropout: dropout probability of the attention weights in training, in [0, 1).
        bias: whether the projections have biases.
        add_bias_kv: appends one learned key and value that every query attends to.
        add_zero_attn: appends a zero key and value that every query attends to.
        kdim: number of channels of the keys. Default: ``embed_dim``.
        vdim: number of channels of the values. Default: ``embed_dim``.
        batch_first: whether the batch is dim 0 of inputs and output; otherwise dim 1.

    Raises:
        ValueError: if ``num_heads`` does not divide ``embed_dim``, a size is not positive, or ``dropout`` is out of
            range.

    Example:
        >>> layer = MultiheadAttention(16, 4, batch_first=True)
        >>> x = torch.randn(2, 5, 16)
        >>> out, weights = layer(x, x, x)
        >>> out.shape, weights.shape
        (torch.Size([2, 5, 16]), torch.Size([2, 5, 5]))
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        require_divisible("embed_dim", embed_dim, "num_heads", num_heads)
        require_probability("dropout", dropout)
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        residual: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Computes attention.

        Args:
            query: queries; see the class for shapes.
            key: keys. If query, key and value are the same tensor, one matrix product projects all three.
            value: values.
            key_padding_mask: (B, S), or (S,) without a batch. Boolean (True: the key is masked), or floating and added
                to the scores.
            need_weights: whether to return the attention weights.
            attn_mask: (L, S) or (B * H, L, S). Boolean (True: the query does **not** attend to the key), or floating,
                added to the scores and differentiable.
            average_attn_weights: whether to average the returned weights over the heads. If False, weights are
                (B, H, L, S).
            is_causal: hint that ``attn_mask`` is the causal mask, which is then not read. As in torch, ``attn_mask`` is
                required and a wrong hint is undefined behavior.
            residual: tensor with the shape of the output that is added to the output in the epilogue of the projection.

        Returns:
            The output, and the attention weights, or None if ``need_weights`` is False.

        Raises:
            TypeError: if an input is an integer tensor, a mask is neither boolean nor floating, or dtypes differ.
            ValueError: if shapes do not match, or ``is_causal`` is set without ``attn_mask``.
        """
        if (
            query is key
            and key is value
            and not need_weights
            and attn_mask is key_padding_mask is residual is None
            and not is_causal
            and type(self) is MultiheadAttention
        ):
            out = _fast_path.self_attention(self, query)
            if out is not None:
                return out, None
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            require_tensor(name, tensor, nested=True)
        if query.is_nested or key.is_nested or value.is_nested:
            return self._forward_nested(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal, residual
            )
        self._check_inputs(query, key, value)
        if is_causal and attn_mask is None:
            raise ValueError("attn_mask: expected the causal mask with is_causal=True, which is only a hint, got None")
        self._check_masks(query, key, attn_mask, key_padding_mask)

        batched = query.dim() == 3
        q, k, v = self._project_qkv(query, key, value)
        k, v, num_extra = self._append_extra_keys(k, v)
        # Causal masking by position would mask the appended keys, too. With padding, both masks are merged into one,
        # as in torch.
        causal = is_causal and not need_weights and num_extra == 0 and key_padding_mask is None
        mask = _merge_masks(None if causal else attn_mask, key_padding_mask, q.size(1), q.dtype, num_extra)
        dropout_p = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            heads, weights = _attend_with_weights(q, k, v, mask, dropout_p)
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights[0]
        else:
            attend = functional.scaled_dot_product_attention
            heads = attend(q, k, v, mask, dropout_p, is_causal=causal)  # type: ignore[assignment]
        return self._output_projection(heads, residual, batched), weights

    def _check_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        batched = "(B, {}, {})" if self.batch_first else "({}, B, {})"
        if query.dim() not in (2, 3):
            expected = f"{batched.format('L', self.embed_dim)} or (L, {self.embed_dim})"
            raise ValueError(f"query: expected {expected}, got {shape_of(query)}")
        layout = batched if query.dim() == 3 else "({}, {})"
        named = (("query", query, "L", self.embed_dim), ("key", key, "S", self.kdim), ("value", value, "S", self.vdim))
        for name, tensor, length, channels in named:
            require_floating(name, tensor)
            if tensor.dim() != query.dim() or tensor.size(-1) != channels:
                raise ValueError(f"{name}: expected {layout.format(length, channels)}, got {shape_of(tensor)}")
        if value.shape[:-1] != key.shape[:-1]:
            raise ValueError(
                f"value: expected key's dims {tuple(key.shape[:-1])} before its last, got {shape_of(value)}"
            )
        batch = 0 if self.batch_first else 1
        if query.dim() == 3 and key.size(batch) != query.size(batch):
            raise ValueError(f"key: expected query's batch {query.size(batch)} in dim {batch}, got {shape_of(key)}")

    def _check_masks(self, query: Tensor, key: Tensor, attn_mask: Tensor | None, padding: Tensor | None) -> None:
        for name, mask in (("attn_mask", attn_mask), ("key_padding_mask", padding)):
            require_tensor(name, mask, optional=True)
            if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
                raise TypeError(f"{name}: expected a boolean (True = masked) or floating tensor, got {mask.dtype}")
        batched = query.dim() == 3
        batch, length = (0, 1) if self.batch_first else (1, 0)
        queries, keys = (query.size(length), key.size(length)) if batched else (query.size(0), key.size(0))
        entries = query.size(batch) if batched else 1
        if padding is not None:
            expected, meaning = ((entries, keys), "(B, S)") if batched else ((keys,), "(S,)")
            require_shape("key_padding_mask", padding, expected, meaning)
        if attn_mask is not None:
            shared, own = (queries, keys), (entries * self.num_heads, queries, keys)
            if tuple(attn_mask.shape) not in (shared, own):
                raise ValueError(
                    f"attn_mask: expected (L, S) = {shared} or (B * num_heads, L, S) = {own}, got {shape_of(attn_mask)}"
                )

    def _project_qkv(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Projects query, key and value to heads, (B, H, N, D) each."""
        q_is_k, k_is_v = query is key, key is value
        batched = query.dim() == 3
        if not batched:
            query, key, value = query[None], key[None], value[None]
        if not self._qkv_same_embed_dim:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            parts = [self._project(x, w, b)[0] for x, w, b in zip((query, key, value), weights, biases, strict=True)]
        elif q_is_k and k_is_v:
            parts = self._project(query, self.in_proj_weight, self.in_proj_bias)
        else:
            sizes = [self.embed_dim, 2 * self.embed_dim] if k_is_v else [self.embed_dim] * 3
            biases = (None,) * len(sizes) if self.in_proj_bias is None else self.in_proj_bias.split(sizes)
            inputs = zip((query, key, value), self.in_proj_weight.split(sizes), biases, strict=False)
            parts = [part for x, w, b in inputs for part in self._project(x, w, b)]
        if batched and not self.batch_first:
            parts = [part.transpose(0, 2) for part in parts]
        q, k, v = parts
        return q, k, v

    def _project(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
        """Heads of each block of E rows of a packed weight. With the sequence first, dims 0 and 2 are swapped."""
        count = weight.size(0) // self.embed_dim
        dims = (self.head_dim,) * count
        return list(functional.qkv_projection(x, weight, bias, heads=(self.num_heads,) * count, head_dims=dims))

    def _append_extra_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """Appends the learned key and the zero key (and values) if enabled; also returns their number."""
        batch, heads, _, dim = k.shape
        num_extra = 0
        if self.bias_k is not None and self.bias_v is not None:
            learned = [t.to(k.dtype).reshape(1, heads, 1, dim) for t in (self.bias_k, self.bias_v)]
            k, v = (torch.cat((t, b.expand(batch, -1, -1, -1)), 2) for t, b in zip((k, v), learned, strict=True))
            num_extra += 1
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
            num_extra += 1
        return k, v, num_extra

    def _output_projection(self, heads: Tensor, residual: Tensor | None, batched: bool) -> Tensor:
        if batched and not self.batch_first:
            out = merge_heads(self, "out_proj", heads.transpose(0, 2), residual=residual)
            return out.contiguous()  # as in torch, so that callers may use view
        if batched:
            return merge_heads(self, "out_proj", heads, residual=residual)
        return merge_heads(self, "out_proj", heads, residual=residual if residual is None else residual[None])[0]

    def _forward_nested(self, *arguments: Any) -> tuple[Tensor, Tensor | None]:
        if not is_pointwise(self.out_proj):
            raise RuntimeError(
                "query: expected a padded tensor and key_padding_mask, as torch's kernel for nested tensors would not"
                " call out_proj, got a nested tensor"
            )
        *torch_arguments, residual = arguments
        out, weights = super().forward(*torch_arguments)
        return out if residual is None else residual + out, weights


def _merge_masks(
    attn_mask: Tensor | None, padding: Tensor | None, heads: int, dtype: torch.dtype, num_extra: int
) -> Tensor | None:
    """Combines torch's two masks into one that broadcasts to (B, H, L, S): boolean (True = attend), or floating.

    The last ``num_extra`` keys are not masked.
    """
    masks = []
    if attn_mask is not None:
        masks.append(attn_mask[None, None] if attn_mask.dim() == 2 else attn_mask.unflatten(0, (-1, heads)))
    if padding is not None:
        masks.append(padding if padding.dim() == 1 else padding[:, None, None, :])
    if not masks:
        return None
    if num_extra:
        masks = [F.pad(mask, (0, num_extra)) for mask in masks]
    if all(mask.dtype == torch.bool for mask in masks):
        return ~(masks[0] if len(masks) == 1 else masks[0] | masks[1])
    added = [_to_additive(mask, dtype) for mask in masks]
    return added[0] if len(added) == 1 else added[0] + added[1]


def _to_additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.is_floating_point():
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -torch.inf)


def _attend_with_weights(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """Attention in plain PyTorch. Returns the outputs of the heads and the weights (B, H, L, S) after dropout."""
    scores = (q * q.size(-1) ** -0.5) @ k.transpose(-2, -1)
    if mask is None:
        weights = scores.softmax(-1)
    else:
        attended = mask if mask.dtype == torch.bool else mask != -torch.inf
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        # Fully masked rows are filled before the softmax as well: its backward would compute 0 * NaN.
        fully_masked = ~attended.any(-1, keepdim=True)
        weights = scores.masked_fill(fully_masked, 0.0).softmax(-1).masked_fill(fully_masked, 0.0)
    weights = F.dropout(weights, dropout_p)
    return weights @ v, weights
