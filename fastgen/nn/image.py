"""Attention layers for feature maps (B, C, H, W)."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fastgen import checks as check
from fastgen import functional
from fastgen.nn._checks import require_divisible, require_feature_map
from fastgen.nn._state_dict import StateDictRemapping
from fastgen.nn._sublayers import merge_heads, project_heads

__all__ = ["AttentionBlock2d", "AttentionGate2d", "SelfAttention2d"]

_QKV = ("query", "key", "value")


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    return cast(Tensor, functional.scaled_dot_product_attention(query, key, value, scale=scale))


class SelfAttention2d(StateDictRemapping):
    """Self-attention block of SAGAN: ``x + gamma * out(softmax(query(x)^T key(x)) value(x))``.

    Zhang et al., "Self-attention generative adversarial networks" (2019), section 3. Every position attends to all
    positions. ``query``, ``key``, ``value`` and ``out`` are 1x1 convolutions; ``gamma`` is a learned scalar that is
    initialized to 0, where the layer is the identity. Memory is linear in the number of positions H * W.

    The projections are fused with the attention. If one of them has hooks or is not a plain 1x1 convolution (an
    adapter, pruned, quantized), the projections are called instead.

    ``load_state_dict`` also accepts the names theta, phi, g, o (BigGAN) and query_conv, key_conv, value_conv. Layers
    with the latter names have no ``out``: construct this layer with ``value_channels=channels``, and ``out`` is set to
    the identity. Weights saved with the older ``torch.nn.utils.spectral_norm`` have to be renamed from ``weight_orig``,
    ``weight_u`` and ``weight_v`` to ``parametrizations.weight.original``, ``parametrizations.weight.0._u`` and
    ``parametrizations.weight.0._v``.

    Shapes:
        - Input: (B, C, H, W).
        - Output: (B, C, H, W).

    Args:
        channels: number of channels C.
        key_channels: number of channels of queries and keys, over all heads. Default: ``channels // 8``.
        value_channels: number of channels of values, over all heads. Default: ``channels // 2``.
        num_heads: number of heads, 1 in the paper.
        pool: kernel size of the max pooling of projected keys and values (2 in the authors' code), or False. Rows and
            columns that do not fill a pooling window are dropped.
        scale: factor of the attention scores, 1 in the paper.
        spectral_norm: whether to apply ``torch.nn.utils.parametrizations.spectral_norm`` to each projection.
        bias: whether the projections have biases.

    Raises:
        ValueError: if the number of heads does not divide the channels, or a count is not positive.

    Example:
        >>> layer = SelfAttention2d(16, pool=2)
        >>> x = torch.randn(2, 16, 8, 8)
        >>> torch.equal(layer(x), x)
        True
    """

    key_aliases: ClassVar[dict[str, str]] = {
        "query_conv": "query",
        "key_conv": "key",
        "value_conv": "value",
        "theta": "query",
        "phi": "key",
        "g": "value",
        "o": "out",
    }

    def __init__(
        self,
        channels: int,
        *,
        key_channels: int | None = None,
        value_channels: int | None = None,
        num_heads: int = 1,
        pool: int | bool = False,
        scale: float = 1.0,
        spectral_norm: bool = False,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check.require_positive("channels", channels)
        key_channels = max(1, channels // 8) if key_channels is None else key_channels
        value_channels = max(1, channels // 2) if value_channels is None else value_channels
        require_divisible("key_channels", key_channels, "num_heads", num_heads)
        require_divisible("value_channels", value_channels, "num_heads", num_heads)
        if pool is not False:
            check.require_positive("pool", pool)
        self.channels, self.key_channels, self.value_channels = channels, key_channels, value_channels
        self.num_heads, self.pool, self.scale = num_heads, int(pool), scale

        def conv1x1(in_channels: int, out_channels: int) -> nn.Module:
            conv = nn.Conv2d(in_channels, out_channels, 1, bias=bias, device=device, dtype=dtype)
            return parametrizations.spectral_norm(conv) if spectral_norm else conv

        self.query = conv1x1(channels, key_channels)
        self.key = conv1x1(channels, key_channels)
        self.value = conv1x1(channels, value_channels)
        self.out = conv1x1(value_channels, channels)
        self.gamma = nn.Parameter(torch.zeros((), device=device, dtype=dtype))

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, key_channels={self.key_channels}, value_channels={self.value_channels},"
            f" num_heads={self.num_heads}, pool={self.pool or False}, scale={self.scale}"
        )

    def forward(self, x: Tensor) -> Tensor:
        """Applies the block to a feature map.

        Args:
            x: (B, C, H, W).

        Returns:
            (B, C, H, W).

        Raises:
            TypeError: if x is not a floating-point tensor, or its dtype differs from the dtype of the weights.
            ValueError: if x has the wrong shape, or is smaller than a pooling window.
        """
        require_feature_map(x, self.channels)
        query, key, value = self._pooled_heads(x) if self.pool else self._heads(x)
        attended = _attend(query, key, value, self.scale)
        return merge_heads(self, "out", attended, residual=x, gate=self.gamma, channels_first=True, convolutions=True)

    def _heads(self, x: Tensor) -> tuple[Tensor, ...]:
        heads = self.num_heads
        dims = (self.key_channels // heads, self.key_channels // heads, self.value_channels // heads)
        return project_heads(self, _QKV, x, heads=(heads,) * 3, head_dims=dims, channels_first=True, convolutions=True)

    def _pooled_heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """Projects keys and values to one channels-last feature map, so that heads are contiguous after pooling."""
        height, width = x.shape[2:]
        if min(height, width) < self.pool:
            raise ValueError(f"x: expected height and width of at least pool = {self.pool}, got {check.shape_of(x)}")
        heads, rest = self.num_heads, self.key_channels + self.value_channels
        dims = (self.key_channels // heads, rest)
        query, both = project_heads(
            self, _QKV, x, heads=(heads, 1), head_dims=dims, channels_first=True, convolutions=True
        )
        feature_map = both.squeeze(1).unflatten(1, (height, width)).permute(0, 3, 1, 2)
        pooled = F.max_pool2d(feature_map, self.pool).permute(0, 2, 3, 1).flatten(1, 2)
        parts = pooled.split((self.key_channels, self.value_channels), dim=-1)
        key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)
        return query, key, value

    def _remap_state_dict(self, state_dict: dict[str, Any], prefix: str) -> None:
        without_out = any(key.startswith(f"{prefix}value_conv.") for key in state_dict)
        super()._remap_state_dict(state_dict, prefix)
        if without_out and self.value_channels == self.channels:
            for name, entry in self.out.named_parameters():
                identity = (
                    torch.eye(self.channels).reshape(entry.shape) if "weight" in name else torch.zeros_like(entry)
                )
                state_dict.setdefault(f"{prefix}out.{name}", identity)


class AttentionBlock2d(StateDictRemapping):
    """Attention block of diffusion autoencoders: ``x + out(attention(query(h), key(h), value(h)))`` with h = norm(x).

    Rombach et al., "High-resolution image synthesis with latent diffusion models" (2022): the middle block of the
    autoencoder, where it has a single head. Memory is linear in the number of positions H * W.

    The projections are fused with the attention. If one of them has hooks or is not a plain ``nn.Linear`` (an adapter,
    pruned, quantized), the projections are called instead, with (B, H * W, C).

    The weights of ``query``, ``key``, ``value`` and ``out`` are (C, C). ``load_state_dict`` also accepts the names of
    diffusers' ``Attention`` (group_norm, to_q, to_k, to_v, to_out.0), its older ``AttentionBlock`` (proj_attn), and
    latent diffusion's ``AttnBlock`` (q, k, v, proj_out, as 1x1 convolutions).

    Shapes:
        - Input: (B, C, H, W).
        - Output: (B, C, H, W).

    Args:
        channels: number of channels C.
        num_heads: number of heads. Default: 1, or ``channels // head_dim``.
        head_dim: number of channels of a head, an alternative to ``num_heads``.
        num_groups: number of groups of the GroupNorm.
        eps: epsilon of the GroupNorm.
        bias: whether the four projections have biases.

    Raises:
        ValueError: if the number of heads or groups does not divide ``channels``, a count is not positive, or
            ``head_dim`` contradicts ``num_heads``.

    Example:
        >>> AttentionBlock2d(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    key_aliases: ClassVar[dict[str, str]] = {
        "group_norm": "norm",
        "to_q": "query",
        "to_k": "key",
        "to_v": "value",
        "to_out.0": "out",
        "proj_attn": "out",
        "q": "query",
        "k": "key",
        "v": "value",
        "proj_out": "out",
    }

    def __init__(
        self,
        channels: int,
        *,
        num_heads: int | None = None,
        head_dim: int | None = None,
        num_groups: int = 32,
        eps: float = 1e-6,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_divisible("channels", channels, "num_groups", num_groups)
        if head_dim is not None:
            require_divisible("channels", channels, "head_dim", head_dim)
            if num_heads not in (None, channels // head_dim):
                raise ValueError(f"num_heads: expected channels / head_dim = {channels // head_dim}, got {num_heads}")
            num_heads = channels // head_dim
        num_heads = 1 if num_heads is None else num_heads
        require_divisible("channels", channels, "num_heads", num_heads)
        self.channels, self.num_heads = channels, num_heads
        self.norm = nn.GroupNorm(num_groups, channels, eps, device=device, dtype=dtype)
        self.query = nn.Linear(channels, channels, bias, device=device, dtype=dtype)
        self.key = nn.Linear(channels, channels, bias, device=device, dtype=dtype)
        self.value = nn.Linear(channels, channels, bias, device=device, dtype=dtype)
        self.out = nn.Linear(channels, channels, bias, device=device, dtype=dtype)

    def extra_repr(self) -> str:
        return f"{self.channels}, num_heads={self.num_heads}"

    def forward(self, x: Tensor) -> Tensor:
        """Applies the block to a feature map.

        Args:
            x: (B, C, H, W).

        Returns:
            (B, C, H, W).

        Raises:
            TypeError: if x is not a floating-point tensor, or its dtype differs from the dtype of the weights.
            ValueError: if x has the wrong shape.
        """
        require_feature_map(x, self.channels)
        heads, dims = (self.num_heads,) * 3, (self.channels // self.num_heads,) * 3
        query, key, value = project_heads(self, _QKV, self.norm(x), heads=heads, head_dims=dims, channels_first=True)
        return merge_heads(self, "out", _attend(query, key, value), residual=x, channels_first=True)


class AttentionGate2d(nn.Module):
    """Gates a feature map with a learned attention map in (0, 1): ``x * map(x) + x``.

    Residual attention, ``(1 + M(x)) * x``, of Wang et al., "Residual attention network for image classification"
    (2017), equation 1. The map is computed by Conv-ReLU-Conv-ReLU-Conv-Sigmoid and, with a stride, upsampled
    bilinearly to the size of x.

    Shapes:
        - Input: (B, C, H, W).
        - Output: (B, C, H, W).

    Args:
        channels: number of channels C.
        hidden_channels: number of channels between the convolutions. Default: ``channels``.
        map_channels: number of channels of the attention map: 1 (shared by all channels) or ``channels``.
        kernel_size: kernel size of the convolutions, odd.
        stride: stride of the first convolution; above 1, the map is computed at a lower resolution.

    Raises:
        ValueError: if a count is not positive, the kernel size is even, or ``map_channels`` is neither 1 nor
            ``channels``.

    Example:
        >>> AttentionGate2d(16, stride=2)(torch.randn(2, 16, 9, 7)).shape
        torch.Size([2, 16, 9, 7])
    """

    def __init__(
        self,
        channels: int,
        *,
        hidden_channels: int | None = None,
        map_channels: int = 1,
        kernel_size: int = 3,
        stride: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check.require_positive("channels", channels)
        hidden = channels if hidden_channels is None else hidden_channels
        for name, count in (("hidden_channels", hidden), ("kernel_size", kernel_size), ("stride", stride)):
            check.require_positive(name, count)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: expected an odd number, got {kernel_size}")
        if map_channels not in (1, channels):
            raise ValueError(f"map_channels: expected 1 or channels = {channels}, got {map_channels}")
        self.channels = channels

        def conv(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
            return nn.Conv2d(
                in_channels, out_channels, kernel_size, stride, kernel_size // 2, device=device, dtype=dtype
            )

        self.map = nn.Sequential(
            conv(channels, hidden, stride),
            nn.ReLU(),
            conv(hidden, hidden),
            nn.ReLU(),
            conv(hidden, map_channels),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Applies the gate to a feature map.

        Args:
            x: (B, C, H, W).

        Returns:
            (B, C, H, W).

        Raises:
            TypeError: if x is not a floating-point tensor.
            ValueError: if x has the wrong shape.
        """
        require_feature_map(x, self.channels)
        attention_map: Tensor = self.map(x)
        if attention_map.shape[2:] != x.shape[2:]:
            attention_map = F.interpolate(attention_map, x.shape[2:], mode="bilinear", align_corners=False)
        return x * attention_map.to(x.dtype) + x
