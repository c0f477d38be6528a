"""Valid arguments for every public function, and the results of the plain formula in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgen import functional, reference
from tests.fuzz import operators
from tests.fuzz.draw import LENGTHS, SIZES, Draw


class Call(NamedTuple):
    """``expected`` computes the results in float64; None: only their shapes are checked."""

    arguments: list[Any]
    options: dict[str, Any]
    shapes: operators.Shapes
    expected: Callable[[], list[Tensor]] | None = None


def _leaf(draw: Draw, tensor: Tensor) -> Tensor:
    return tensor.requires_grad_(tensor.is_floating_point() and draw.chance(0.4))


def _four(tensor: Tensor, dims: int) -> Tensor:
    """(..., H, N, D) of ``dims`` dims to (B, H, N, D) in float64."""
    tensor = tensor.detach().double()
    if dims == 2:
        return tensor[None, None]
    return tensor.unsqueeze(1) if dims == 3 else tensor.flatten(0, -4)


def scaled_dot_product_attention(draw: Draw) -> Call:
    dtype, dims = draw.dtype(), draw.one((2, 3, 4, 4, 4, 4, 5))
    grouped = dims >= 4 and draw.chance(0.3)
    key_heads = draw.one((1, 2)) if dims >= 4 else 0
    batch = tuple(draw.one((0, 1, 2, 3)) for _ in range({2: 0, 3: 1}.get(dims, dims - 3)))
    lead = (*batch, key_heads * (draw.one((1, 2)) if grouped else 1)) if dims >= 4 else batch
    of_keys = (*batch, key_heads) if dims >= 4 else batch
    length, keys = draw.one(LENGTHS), draw.one(LENGTHS)
    dim, value_dim = draw.one((1, 3, 8, 16, 24)), draw.one((0, 1, 5, 16, 32, 80))
    query = _leaf(draw, draw.tensor(*lead, length, dim, dtype=dtype))
    key = _leaf(draw, draw.tensor(*of_keys, keys, dim, dtype=dtype))
    value = _leaf(draw, draw.tensor(*of_keys, keys, value_dim, dtype=dtype))
    full = (*lead, length, keys)
    of_mask = full[draw.random.randint(0, len(full) - 2) :]
    mask = (
        _leaf(draw, operators.mask(draw, *of_mask, dtype=draw.one((torch.bool, dtype, draw.dtype()))))
        if draw.chance(0.4)
        else None
    )
    dropout = 0.3 if draw.chance(0.2) else 0.0
    left, right = (draw.one((None, 0, 1, 3, 2**40)) for _ in range(2))
    window = draw.one((None, None, (left, right)))
    causal = draw.chance(0.3)
    options: dict[str, Any] = {
        "window": window,
        "return_lse": True,
        "enable_gqa": grouped or (dims >= 4 and draw.chance(0.1)),
    }
    scale, softcap = draw.one((None, None, 0.5, 1)), draw.one((None, None, 0.5, 20))
    options["softcap"] = softcap

    def expected() -> list[Tensor]:
        whole = None if mask is None else mask.detach().expand(full)
        if whole is not None:
            whole = whole[None, None] if dims == 2 else whole.unsqueeze(1) if dims == 3 else whole.flatten(0, -4)
            whole = whole if whole.dtype == torch.bool else whole.double()
        bounds = [-1 if bound is None else bound for bound in window or (-1, -1)]
        tensors = [_four(t, dims) for t in (query, key, value)]
        sides = bounds[0], 0 if causal else bounds[1]
        results = reference.attention(*tensors, whole, None, *sides, scale, softcap or 0.0)
        return [r.reshape(*lead, *r.shape[2:]) for r in results]

    shapes: operators.Shapes = [(*lead, length, value_dim), (*lead, length)]
    return Call([query, key, value, mask, dropout, causal, scale], options, shapes, None if dropout else expected)


def scaled_dot_product_attention_jvp(draw: Draw) -> Call:
    """Without gradients: those of the tangent have none of their own."""
    arguments, options, shapes, _ = scaled_dot_product_attention(draw)
    arguments = [t.detach() if isinstance(t, Tensor) else t for t in arguments]
    primals = tuple(arguments[:3])
    tangents = tuple(draw.maybe(draw.tensor(*t.shape, dtype=t.dtype)) for t in primals)
    return Call([primals, tangents, *arguments[3:]], options, [*shapes, *shapes])


def varlen_attention(draw: Draw) -> Call:
    dtype, sequences, key_heads = draw.dtype(), draw.one((1, 1, 2, 5)), draw.one((1, 2))
    heads = key_heads * draw.one((1, 2))
    lengths = [[draw.one((0, 1, 1, *LENGTHS)) for _ in range(sequences)] for _ in range(2)]
    dim, value_dim = draw.one((1, 3, 8, 16, 24)), draw.one((0, 1, 5, 16, 32, 80))
    query = _leaf(draw, draw.tensor(sum(lengths[0]), heads, dim, dtype=dtype))
    key = _leaf(draw, draw.tensor(sum(lengths[1]), key_heads, dim, dtype=dtype))
    value = _leaf(draw, draw.tensor(sum(lengths[1]), key_heads, value_dim, dtype=dtype))
    ends = [torch.tensor([0, *own]).cumsum(0).to(draw.one((torch.int32, torch.int64))) for own in lengths]
    dropout, causal = 0.3 if draw.chance(0.2) else 0.0, draw.chance(0.3)
    left, right = (draw.one((None, 0, 1, 3, 2**40, -2)) for _ in range(2))
    window = draw.one((None, None, (left, right)))
    options = {"dropout_p": dropout, "is_causal": causal, "window": window, "enable_gqa": True, "return_lse": True}

    def expected() -> list[Tensor]:
        left, right = window or (None, None)
        right = 0 if causal and (right is None or right > 0) else right
        tensors = [t.detach().double() for t in (query, key, value)]
        return [*reference.packed_attention(*tensors, *(e.tolist() for e in ends), None, left, right)]

    shapes: operators.Shapes = [(sum(lengths[0]), heads, value_dim), (heads, sum(lengths[0]))]
    return Call([query, key, value, *ends], options, shapes, None if dropout else expected)


class _Tokens:
    def __init__(self, draw: Draw) -> None:
        self.dtype, self.first = draw.dtype(), draw.chance(0.4)
        self.batch, self.channels = draw.one((0, 1, 2)), draw.one(SIZES)
        spatial = tuple(draw.one((1, 2, 3)) for _ in range(draw.one((1, 2, 3)))) if self.first else (draw.one(LENGTHS),)
        self.length = math.prod(spatial)
        shape = (self.batch, self.channels, *spatial) if self.first else (self.batch, *spatial, self.channels)
        self.x = _leaf(draw, draw.tensor(*shape, dtype=self.dtype))

    def wide(self) -> Tensor:
        x = self.x.detach().double()
        return x.flatten(2).mT if self.first else x


def _rotary(draw: Draw, batch: int, length: int, dim: int) -> tuple[Tensor, Tensor] | None:
    if dim < 2 or draw.chance(0.5):
        return None
    shape = (*draw.one(((), (batch,))), length, draw.random.randint(1, dim // 2))
    return draw.tensor(*shape, dtype=torch.float32), draw.tensor(*shape, dtype=torch.float32)


def multi_head_projection(draw: Draw) -> Call:
    t, heads, dim = _Tokens(draw), draw.one((1, 2, 3)), draw.one((1, 2, 4, 8))
    weight = _leaf(draw, draw.tensor(heads * dim, t.channels, dtype=t.dtype))
    bias = draw.maybe(_leaf(draw, draw.tensor(heads * dim, dtype=t.dtype)))
    norm = draw.maybe(draw.tensor(dim, dtype=t.dtype), 0.2)
    rotary = _rotary(draw, t.batch, t.length, dim)
    options = {"num_heads": heads, "channels_first": t.first, "norm": norm, "rotary": rotary}

    def expected() -> list[Tensor]:
        flat = t.wide() @ weight.detach().double().t() + (0 if bias is None else bias.detach().double())
        return [flat.unflatten(-1, (heads, dim)).transpose(1, 2)]

    plain = norm is None and rotary is None
    return Call([t.x, weight, bias], options, [(t.batch, heads, t.length, dim)], expected if plain else None)


def qkv_projection(draw: Draw) -> Call:
    t, count = _Tokens(draw), draw.one((1, 2, 3, 5))
    heads, dims = [draw.one((1, 2, 3)) for _ in range(count)], [draw.one((1, 2, 4, 8)) for _ in range(count)]
    rows = sum(h * d for h, d in zip(heads, dims, strict=True))
    weight = _leaf(draw, draw.tensor(rows, t.channels, dtype=t.dtype))
    bias = draw.maybe(_leaf(draw, draw.tensor(rows, dtype=t.dtype)))
    norms = [_leaf(draw, draw.tensor(d, dtype=t.dtype)) for d in dims[: draw.one((0, 0, 1, 2))]]
    rotated = draw.random.randint(1, count)
    rotary = _rotary(draw, t.batch, t.length, min(dims[:rotated]))
    options = {"heads": heads, "head_dims": dims, "channels_first": t.first, "norms": norms, "rotated": rotated}
    options |= {"rotary": rotary, "interleaved": draw.chance(0.5)}
    shapes = [(t.batch, h, t.length, d) for h, d in zip(heads, dims, strict=True)]
    return Call([t.x, weight, bias], options, shapes)


def merge_heads_projection(draw: Draw) -> Call:
    dtype, first = draw.dtype(), draw.chance(0.4)
    batch, heads, length, dim = draw.one((0, 1, 2)), draw.one((0, 1, 2)), draw.one(LENGTHS[:-2]), draw.one(SIZES)
    channels = draw.one(SIZES)
    x = _leaf(draw, draw.tensor(batch, heads, length, dim, dtype=dtype))
    weight = _leaf(draw, draw.tensor(channels, heads * dim, dtype=dtype))
    bias = draw.maybe(_leaf(draw, draw.tensor(channels, dtype=dtype)))
    shape = (batch, channels, length) if first else (batch, length, channels)
    residual = draw.maybe(_leaf(draw, draw.tensor(*shape, dtype=dtype)))
    gate = draw.maybe(_leaf(draw, draw.tensor(*draw.one(((), (1,), (channels,), (batch, channels))), dtype=dtype)))
    return Call([x, weight, bias], {"residual": residual, "gate": gate, "channels_first": first}, [shape])


def rotary_embedding(draw: Draw) -> Call:
    batch, heads, length, dim = draw.one((0, 1, 2)), draw.one((0, 1, 2)), draw.one(LENGTHS), draw.one((2, 4, 7))
    x = _leaf(draw, draw.tensor(batch, heads, length, dim))
    shape = (*draw.one(((), (batch,))), length, draw.random.randint(1, dim // 2))
    tables = [_leaf(draw, draw.tensor(*shape)) for _ in range(2)]
    return Call([x, *tables], {"interleaved": draw.chance(0.5)}, [tuple(x.shape)])


def _latent(draw: Draw) -> tuple[tuple[int, ...], list[Tensor], dict[str, Any]]:
    dtype, shape = draw.dtype(), tuple(draw.one(SIZES) for _ in range(draw.one((1, 2, 2, 3))))
    pair = [_leaf(draw, draw.tensor(*shape, dtype=dtype)) for _ in range(2)]
    priors = {}
    for name in ("prior_mu", "prior_logvar"):
        of_prior = [n if draw.chance(0.7) else 1 for n in shape][draw.random.randint(0, len(shape)) :]
        priors[name] = draw.maybe(_leaf(draw, draw.tensor(*of_prior, dtype=dtype)))
    return shape, pair, priors


def reparameterize(draw: Draw) -> Call:
    shape, pair, _ = _latent(draw)
    return Call([*pair], {}, [shape])


def reparameterize_kl(draw: Draw) -> Call:
    shape, pair, priors = _latent(draw)
    return Call([*pair], priors, [shape, shape[:1]])


VALID: dict[str, Callable[[Draw], Call]] = {name: globals()[name] for name in functional.__all__}
