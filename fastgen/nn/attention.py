"""torch's multi-head attention layer on fastgen's functions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen import functional
from fastgen.checks import require_floating, require_probability, require_shape, require_tensor, shape_of
from fastgen.nn._sublayers import is_pointwise, merge_heads


class MultiheadAttention(nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention``, differentiable twice and in forward mode.

    Vaswani et al., "Attention is all you need" (2017), section 3.2.2. The constructor, parameters, state dict and
    forward arguments are torch's, and so are the outputs. What differs:

    - A query that may see no key gets attention 0 and weights 0, so that its output is the bias of ``out_proj``;
      torch gives NaN in some of its paths.
    - ``need_weights=False`` never holds the (L, S) weights. ``need_weights=True``, torch's default, computes them, and
      the output from them, in plain PyTorch.
    - Masks stay as small as they come: a padding mask is never expanded over heads and queries.
    - ``key_padding_mask`` and ``attn_mask`` may be of different kinds; a boolean one then joins the floating one.
    - ``out_proj`` is called where it has hooks or is more than an ``nn.Linear`` (an adapter); torch never calls it.
    - Nested tensors go to torch's own inference kernels, which refuse what they do not take.

    Shapes, with ``batch_first``: query (B, L, E), key (B, S, kdim), value (B, S, vdim) -> output (B, L, E) and weights
    (B, L, S) or None. Without: (L, B, E), (S, B, kdim), (S, B, vdim) -> (L, B, E), contiguous, and the same weights.
    All without B for a single sequence.

    Args:
        embed_dim: E, a multiple of num_heads.
        num_heads: H.
        dropout: probability of dropping an attention weight in training, in [0, 1).
        bias: give the projections biases.
        add_bias_kv: learn one key and one value that every query sees besides the others.
        add_zero_attn: let every query see a key and a value of zeros.
        kdim, vdim: channels of key and value; default E.
        batch_first: whether the batch is dim 0, or dim 1.

    Raises:
        ValueError: num_heads does not divide embed_dim; a size that is not positive; a dropout out of range.

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
        require_heads("embed_dim", embed_dim, "num_heads", num_heads)
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
        """Attend.

        Args:
            query, key, value: see above. Where they are one tensor, one product projects all three.
            key_padding_mask: (B, S), or (S,) without a batch. Boolean, True for a key that nobody sees, or floating,
                added to the scores.
            need_weights: return the attention weights too.
            attn_mask: (L, S), or (B * H, L, S). Boolean, True where a query may **not** see a key, or floating, added
                to the scores and differentiable.
            average_attn_weights: return the mean of the weights over the heads; if not, weights (B, H, L, S).
            is_causal: says that attn_mask is the causal mask, which then need not be read. As in torch, attn_mask must
                be there, and what comes of a wrong hint is not defined.
            residual: like the output, and added to it.

        Returns:
            The output, and the weights, or None without ``need_weights``.

        Raises:
            TypeError: integer tensors, masks that are neither boolean nor floating, dtypes that differ.
            ValueError: shapes that do not fit, or is_causal without attn_mask.
        """
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            require_tensor(name, tensor, nested=True)
        if query.is_nested or key.is_nested or value.is_nested:
            return self._forward_nested(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal, residual
            )
        self._check_inputs(query, key, value)
        if is_causal and attn_mask is None:
            raise ValueError(
                "attn_mask: expected the causal mask beside is_causal=True, which only describes it, got None"
            )
        self._check_masks(query, key, attn_mask, key_padding_mask)

        batched = query.dim() == 3
        q, k, v = self._heads(query, key, value)
        k, v, more_keys = self._with_extra_keys(k, v)
        # A causal window hides keys by position, and would hide the extra ones. Beside padding the mask is read, as in
        # torch: one mask of both is what fused kernels take.
        causal = is_causal and not need_weights and more_keys == 0 and key_padding_mask is None
        mask = _visible(None if causal else attn_mask, key_padding_mask, q.size(1), q.dtype, more_keys)
        dropout_p = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            heads, weights = _attend_with_weights(q, k, v, mask, dropout_p)
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights[0]
        else:
            attend = functional.scaled_dot_product_attention
            heads = attend(q, k, v, mask, dropout_p, is_causal=causal)  # type: ignore[assignment]
        return self._merge(heads, residual, batched), weights

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
                raise TypeError(f"{name}: expected a boolean (True = hidden) or floating tensor, got {mask.dtype}")
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

    def _heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Projected query, key and value, each (B, H, N, D)."""
        q_k, k_v = query is key, key is value
        batched = query.dim() == 3
        if not batched:
            query, key, value = query[None], key[None], value[None]
        if not self._qkv_same_embed_dim:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            parts = [self._project(x, w, b)[0] for x, w, b in zip((query, key, value), weights, biases, strict=True)]
        elif q_k and k_v:
            parts = self._project(query, self.in_proj_weight, self.in_proj_bias)
        else:
            sizes = [self.embed_dim, 2 * self.embed_dim] if k_v else [self.embed_dim] * 3
            biases = (None,) * len(sizes) if self.in_proj_bias is None else self.in_proj_bias.split(sizes)
            inputs = zip((query, key, value), self.in_proj_weight.split(sizes), biases, strict=False)
            parts = [part for x, w, b in inputs for part in self._project(x, w, b)]
        if batched and not self.batch_first:
            parts = [part.transpose(0, 2) for part in parts]
        q, k, v = parts
        return q, k, v

    def _project(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
        """The heads of each E rows of a packed weight. Sequence first, the length stands where the batch does."""
        count = weight.size(0) // self.embed_dim
        dims = (self.head_dim,) * count
        return list(functional.qkv_projection(x, weight, bias, heads=(self.num_heads,) * count, head_dims=dims))

    def _with_extra_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """Keys and values with the learned one and the one of zeros, and how many those are."""
        batch, heads, _, dim = k.shape
        more = 0
        if self.bias_k is not None and self.bias_v is not None:
            learned = [t.to(k.dtype).reshape(1, heads, 1, dim) for t in (self.bias_k, self.bias_v)]
            k, v = (torch.cat((t, b.expand(batch, -1, -1, -1)), 2) for t, b in zip((k, v), learned, strict=True))
            more += 1
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
            more += 1
        return k, v, more

    def _merge(self, heads: Tensor, residual: Tensor | None, batched: bool) -> Tensor:
        if batched and not self.batch_first:
            out = merge_heads(self, "out_proj", heads.transpose(0, 2), residual=residual)
            return out.contiguous()  # as torch's is, for those who call view on it
        if batched:
            return merge_heads(self, "out_proj", heads, residual=residual)
        return merge_heads(self, "out_proj", heads, residual=residual if residual is None else residual[None])[0]

    def _forward_nested(self, *arguments: Any) -> tuple[Tensor, Tensor | None]:
        if not is_pointwise(self.out_proj):
            raise RuntimeError(
                "query: expected a padded tensor and key_padding_mask, as torch's kernel for nested tensors would not"
                " call out_proj, got a nested tensor"
            )
        *torchs, residual = arguments
        out, weights = super().forward(*torchs)
        return out if residual is None else residual + out, weights


def require_heads(channels_name: str, channels: int, heads_name: str, heads: int) -> None:
    for name, value in ((channels_name, channels), (heads_name, heads)):
        if value < 1:
            raise ValueError(f"{name}: expected a positive integer, got {value!r}")
    if channels % heads:
        raise ValueError(f"{heads_name}: expected a divisor of {channels_name}, {channels}, got {heads}")


def _visible(
    attn_mask: Tensor | None, padding: Tensor | None, heads: int, dtype: torch.dtype, more_keys: int
) -> Tensor | None:
    """torch's two masks as one that broadcasts to (B, H, L, S): boolean, True = visible, or floating.

    The last ``more_keys`` columns are visible to all.
    """
    masks = []
    if attn_mask is not None:
        masks.append(attn_mask[None, None] if attn_mask.dim() == 2 else attn_mask.unflatten(0, (-1, heads)))
    if padding is not None:
        masks.append(padding if padding.dim() == 1 else padding[:, None, None, :])
    if not masks:
        return None
    if more_keys:
        masks = [F.pad(mask, (0, more_keys)) for mask in masks]
    if all(mask.dtype == torch.bool for mask in masks):
        return ~(masks[0] if len(masks) == 1 else masks[0] | masks[1])
    added = [_additive(mask, dtype) for mask in masks]
    return added[0] if len(added) == 1 else added[0] + added[1]


def _additive(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    if hidden.is_floating_point():
        return hidden
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(hidden, -torch.inf)


def _attend_with_weights(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """Attention in plain PyTorch: the heads' outputs, and the weights (B, H, L, S) after dropout."""
    scores = (q * q.size(-1) ** -0.5) @ k.transpose(-2, -1)
    if mask is None:
        weights = scores.softmax(-1)
    else:
        visible = mask if mask.dtype == torch.bool else mask != -torch.inf
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        # Filled before the softmax as well: 0 * NaN would come out of its derivative.
        blind = ~visible.any(-1, keepdim=True)
        weights = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
    weights = F.dropout(weights, dropout_p)
    return weights @ v, weights
