"""Attention on feature maps (B, C, H, W): SAGAN's, that of diffusion autoencoders, and a gate without softmax."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fastgen import checks as check
from fastgen import functional
from fastgen.nn._loading import LoadsOtherNames
from fastgen.nn._sublayers import merge_heads, project_heads

__all__ = ["AttentionBlock2d", "AttentionGate2d", "SelfAttention2d"]

_MAPS = ("query", "key", "value")


def require_feature_map(x: Tensor, channels: int) -> None:
    check.require_tensor("x", x)
    check.require_floating("x", x)
    if x.dim() != 4 or x.size(1) != channels:
        raise ValueError(f"x: expected (B, C, H, W) with C = {channels}, got {check.shape_of(x)}")


def require_divisible(name: str, count: int, divisor_name: str, divisor: int) -> None:
    check.require_positive(name, count)
    check.require_positive(divisor_name, divisor)
    if count % divisor != 0:
        raise ValueError(f"{name}: expected a multiple of {divisor_name} = {divisor}, got {count}")


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    return cast(Tensor, functional.scaled_dot_product_attention(query, key, value, scale=scale))


class SelfAttention2d(LoadsOtherNames):
    """The self-attention block of SAGAN: ``x + gamma * out(softmax(query(x)^T key(x)) value(x))``.

    Zhang et al., "Self-attention generative adversarial networks" (2019), section 3. Every position attends to every
    other one. The maps are 1x1 convolutions; gamma is learned and starts at 0, where the layer is the identity.

    Args:
        channels: C.
        key_channels: channels of queries and keys, over all heads; default C // 8.
        value_channels: channels of values, over all heads; default C // 2.
        num_heads: 1 in the paper.
        pool: size of the max pooling of projected keys and values, 2 in the authors' code; False for none. Rows and
            columns that do not fill a pooling window are no keys.
        scale: factor of the scores, 1 in the paper.
        spectral_norm: hold the largest singular value of each map at 1
            (``torch.nn.utils.parametrizations.spectral_norm``).
        bias: let the maps have biases.

    Shapes: x (B, C, H, W) -> (B, C, H, W). No memory of the size of the (H W)^2 scores.

    Plain maps are fused. Where a map has hooks, or is more than a 1x1 convolution (an adapter, pruned, quantised), maps
    are called instead.

    The weights ``query``, ``key``, ``value`` and ``out`` have the shapes of 1x1 convolutions. ``load_state_dict`` also
    takes the names theta, phi, g, o (BigGAN) and query_conv, key_conv, value_conv. The latter have no ``out`` (build
    this layer with ``value_channels=channels``): it becomes the identity. Weights saved with the older
    ``torch.nn.utils.spectral_norm`` are ``weight_orig``, ``weight_u`` and ``weight_v`` there, and
    ``parametrizations.weight.original``, ``parametrizations.weight.0._u`` and ``..._v`` here.

    Raises:
        ValueError: channels that the heads do not divide, or a count that is not positive.

    Example:
        >>> layer = SelfAttention2d(16, pool=2)
        >>> x = torch.randn(2, 16, 8, 8)
        >>> torch.equal(layer(x), x)
        True
    """

    other_names: ClassVar[dict[str, str]] = {
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

        def convolution(inputs: int, outputs: int) -> nn.Module:
            made = nn.Conv2d(inputs, outputs, 1, bias=bias, device=device, dtype=dtype)
            return parametrizations.spectral_norm(made) if spectral_norm else made

        self.query = convolution(channels, key_channels)
        self.key = convolution(channels, key_channels)
        self.value = convolution(channels, value_channels)
        self.out = convolution(value_channels, channels)
        self.gamma = nn.Parameter(torch.zeros((), device=device, dtype=dtype))

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, key_channels={self.key_channels}, value_channels={self.value_channels},"
            f" num_heads={self.num_heads}, pool={self.pool or False}, scale={self.scale}"
        )

    def forward(self, x: Tensor) -> Tensor:
        """Attend.

        Raises:
            TypeError: x is not a floating tensor, or has another dtype than the weights.
            ValueError: x has another shape, or is smaller than a pooling window.
        """
        require_feature_map(x, self.channels)
        query, key, value = self._pooled_heads(x) if self.pool else self._heads(x)
        attended = _attend(query, key, value, self.scale)
        return merge_heads(self, "out", attended, residual=x, gate=self.gamma, channels_first=True, convolutions=True)

    def _heads(self, x: Tensor) -> tuple[Tensor, ...]:
        heads = self.num_heads
        dims = (self.key_channels // heads, self.key_channels // heads, self.value_channels // heads)
        return project_heads(self, _MAPS, x, heads=(heads,) * 3, head_dims=dims, channels_first=True, convolutions=True)

    def _pooled_heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """Keys and values are made as one map, channels last, in which heads are contiguous after pooling."""
        height, width = x.shape[2:]
        if min(height, width) < self.pool:
            raise ValueError(f"x: expected height and width of at least pool = {self.pool}, got {check.shape_of(x)}")
        heads, rest = self.num_heads, self.key_channels + self.value_channels
        dims = (self.key_channels // heads, rest)
        query, both = project_heads(
            self, _MAPS, x, heads=(heads, 1), head_dims=dims, channels_first=True, convolutions=True
        )
        feature_map = both.squeeze(1).unflatten(1, (height, width)).permute(0, 3, 1, 2)
        pooled = F.max_pool2d(feature_map, self.pool).permute(0, 2, 3, 1).flatten(1, 2)
        parts = pooled.split((self.key_channels, self.value_channels), dim=-1)
        key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)
        return query, key, value

    def _translate(self, state_dict: dict[str, Any], prefix: str) -> None:
        without_out = any(key.startswith(f"{prefix}value_conv.") for key in state_dict)
        super()._translate(state_dict, prefix)
        if without_out and self.value_channels == self.channels:
            for name, entry in self.out.named_parameters():
                identity = (
                    torch.eye(self.channels).reshape(entry.shape) if "weight" in name else torch.zeros_like(entry)
                )
                state_dict.setdefault(f"{prefix}out.{name}", identity)


class AttentionBlock2d(LoadsOtherNames):
    """The attention block of diffusion autoencoders: ``x + out(attention(query(h), key(h), value(h)))``, h = norm(x).

    Rombach et al., "High-resolution image synthesis with latent diffusion models" (2022), the middle block of the
    autoencoder; there with one head as wide as the feature map.

    Args:
        channels: C.
        num_heads: the number of heads; or give head_dim.
        head_dim: C / num_heads.
        num_groups: of the GroupNorm.
        eps: of the GroupNorm.
        bias: let the four maps have biases.

    Shapes: x (B, C, H, W) -> (B, C, H, W). No memory of the size of the (H W)^2 scores.

    Plain maps are fused. Where a map has hooks, or is more than an ``nn.Linear`` (an adapter, pruned, quantised), maps
    are called instead, with (B, H W, C).

    The weights ``query``, ``key``, ``value`` and ``out`` are (C, C). ``load_state_dict`` also takes the names of
    diffusers' ``Attention`` (group_norm, to_q, to_k, to_v, to_out.0), of its older ``AttentionBlock`` (proj_attn) and
    of latent diffusion's ``AttnBlock`` (q, k, v, proj_out, as 1x1 convolutions).

    Raises:
        ValueError: channels that the heads or the groups do not divide, a count that is not positive, or a head_dim
            that contradicts num_heads.

    Example:
        >>> AttentionBlock2d(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    other_names: ClassVar[dict[str, str]] = {
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
        """Attend.

        Raises:
            TypeError: x is not a floating tensor, or has another dtype than the weights.
            ValueError: x has another shape.
        """
        require_feature_map(x, self.channels)
        heads, dims = (self.num_heads,) * 3, (self.channels // self.num_heads,) * 3
        query, key, value = project_heads(self, _MAPS, self.norm(x), heads=heads, head_dims=dims, channels_first=True)
        return merge_heads(self, "out", _attend(query, key, value), residual=x, channels_first=True)


class AttentionGate2d(nn.Module):
    """Multiplies features by a learned map of their own and adds them: ``x * map(x) + x``, the map in (0, 1).

    The residual attention of Wang et al., "Residual attention network for image classification" (2017), equation 1,
    ``(1 + M(x)) * x``. The map is Conv-ReLU-Conv-ReLU-Conv-Sigmoid, and resized bilinearly to x where it is smaller.

    Args:
        channels: C.
        hidden_channels: channels between the convolutions; default C.
        map_channels: 1, one map for all channels, or C.
        kernel_size: of the convolutions, odd.
        stride: of the first convolution; above 1 the map is computed at a lower resolution.

    Shapes: x (B, C, H, W) -> (B, C, H, W).

    Raises:
        ValueError: a count that is not positive, an even kernel size, or map_channels neither 1 nor C.

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

        def convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
            return nn.Conv2d(inputs, outputs, kernel_size, stride, kernel_size // 2, device=device, dtype=dtype)

        self.map = nn.Sequential(
            convolution(channels, hidden, stride),
            nn.ReLU(),
            convolution(hidden, hidden),
            nn.ReLU(),
            convolution(hidden, map_channels),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Gate.

        Raises:
            TypeError: x is not a floating tensor. ValueError: x has another shape.
        """
        require_feature_map(x, self.channels)
        attention_map: Tensor = self.map(x)
        if attention_map.shape[2:] != x.shape[2:]:
            attention_map = F.interpolate(attention_map, x.shape[2:], mode="bilinear", align_corners=False)
        return x * attention_map.to(x.dtype) + x
