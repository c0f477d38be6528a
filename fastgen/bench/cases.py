"""Benchmark cases of ``fastgen bench``: fastgen and plain PyTorch on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgen.bench.shapes import ATTENTION_SHAPES, EQUAL_HEADS, LATENT_SHAPES, UNEQUAL_HEADS, AttentionShape
from fastgen.functional import reparameterize_kl, scaled_dot_product_attention
from fastgen.nn import SelfAttention2d

FEATURE_MAP = (16, 64, 32)
"""Batch size, channels, and height and width of the input of the self-attention layer."""

Call = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """A benchmark case.

    Attributes:
        what: what is computed.
        shape: shape of the inputs.
        peer: name of the PyTorch implementation.
        make: function that returns two equivalent calls, of fastgen and of the PyTorch implementation.
    """

    what: str
    shape: str
    peer: str
    make: Callable[[], tuple[Call, Call]]


def cases(device: torch.device, length: int | None = None) -> dict[str, Case]:
    """Maps names to benchmark cases. Sizes are limited to about ``length`` positions if given."""
    unequal, equal = UNEQUAL_HEADS, EQUAL_HEADS
    if device.type == "cuda":
        unequal, equal = ATTENTION_SHAPES["sagan-64"], ATTENTION_SHAPES["dit-xl"]
    batch, dim = LATENT_SHAPES["wide"]
    maps, channels, side = FEATURE_MAP
    if length is not None:
        unequal, equal = unequal.cut(length=length), equal.cut(length=length)
        batch, maps, side = min(batch, length), 1, max(2, min(side, int(length**0.5)))
    found = {}
    for name, shape in (("unequal", unequal), ("equal", equal)):
        for kind, case in _attention_cases(shape, device):
            found[f"attention-{name}-{kind}"] = case
    for kind in ("forward", "step"):
        what = "reparameterize_kl, " + ("forward" if kind == "forward" else "forward and backward")
        sizes = (batch, dim)
        found[f"latent-{kind}"] = Case(what, str(sizes), "the formula", _latent(sizes, kind == "step", device))
    found["self-attention-2d"] = Case(
        "SelfAttention2d, training step",
        str((maps, channels, side, side)),
        "1x1 convolutions, bmm, softmax, bmm",
        lambda: _layers(maps, channels, side, device),
    )
    return found


def _attention_cases(shape: AttentionShape, device: torch.device) -> Iterator[tuple[str, Case]]:
    dims = f"head dims {shape.key_dim} and {shape.value_dim}"
    sizes = str((shape.batch, shape.heads, shape.queries, shape.keys))
    comparisons: list[tuple[str, str, str, Callable[..., Any], Callable[..., Tensor]]] = [
        ("forward", "forward", "F.scaled_dot_product_attention", _forward, F.scaled_dot_product_attention),
        ("r1", "R1 step", "SDPBackend.MATH", _r1_step, _unfused),
        ("tangent", "output and tangent", "torch.func.jvp of the formula", _tangent, _formula),
    ]
    for kind, description, peer, work, baseline in comparisons:

        def make(work: Callable[..., Any] = work, baseline: Callable[..., Tensor] = baseline) -> tuple[Call, Call]:
            lengths = ((shape.queries, shape.key_dim), (shape.keys, shape.key_dim), (shape.keys, shape.value_dim))
            inputs = [_noise((shape.batch, shape.heads, *rest), device, seed) for seed, rest in enumerate(lengths)]
            return (lambda: work(_attend, inputs)), (lambda: work(baseline, inputs))

        yield kind, Case(f"attention, {dims}, {description}", sizes, peer, make)


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Any:
    return scaled_dot_product_attention(query, key, value)


def _unfused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """torch's attention with its only twice differentiable backend."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(query, key, value)


def _formula(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.softmax(query @ key.mT * query.size(-1) ** -0.5, dim=-1) @ value


def _forward(attend: Callable[..., Tensor], inputs: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return attend(*inputs)


def _r1_step(attend: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Forward, gradient of the inputs, and gradient of the squared gradient norm."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    grads = torch.autograd.grad(attend(*leaves).square().sum(), leaves, create_graph=True)
    return torch.autograd.grad(torch.stack([grad.square().sum() for grad in grads]).sum(), leaves)


def _tangent(attend: Callable[..., Tensor], inputs: list[Tensor]) -> Any:
    directions = tuple(tensor.flip(2) for tensor in inputs)
    return torch.func.jvp(attend, tuple(inputs), directions)


def eager_latent(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    """Reparameterized sample and KL divergence in plain PyTorch."""
    z = mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)
    return z, 0.5 * (mu.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1)


def _latent(sizes: tuple[int, int], step: bool, device: torch.device) -> Callable[[], tuple[Call, Call]]:
    def make() -> tuple[Call, Call]:
        encoded = _noise((sizes[0], 2 * sizes[1]), device, 0)
        upstream = _noise(sizes, device, 1), _noise(sizes[:1], device, 2)
        leaves = [half.detach().requires_grad_(step) for half in encoded.chunk(2, dim=1)]

        def work(function: Callable[..., Any]) -> Any:
            z, kl = function(*leaves)
            return torch.autograd.grad((z, kl), leaves, (upstream[0], upstream[1].to(kl.dtype))) if step else (z, kl)

        return (lambda: work(reparameterize_kl)), (lambda: work(eager_latent))

    return make


class Conv1x1SelfAttention(nn.Module):
    """SAGAN self-attention with 1x1 convolutions, bmm and softmax; same state dict as ``SelfAttention2d``."""

    def __init__(self, channels: int, pool: int = 1) -> None:
        super().__init__()
        self.pool = pool
        self.query = nn.Conv2d(channels, channels // 8, 1, bias=False)
        self.key = nn.Conv2d(channels, channels // 8, 1, bias=False)
        self.value = nn.Conv2d(channels, channels // 2, 1, bias=False)
        self.out = nn.Conv2d(channels // 2, channels, 1, bias=False)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.query(x).flatten(2), self.key(x), self.value(x)
        if self.pool > 1:
            key, value = F.max_pool2d(key, self.pool), F.max_pool2d(value, self.pool)
        weights = torch.bmm(query.transpose(1, 2), key.flatten(2)).softmax(-1)
        out = torch.bmm(value.flatten(2), weights.transpose(1, 2)).unflatten(2, x.shape[2:])
        y: Tensor = x + self.gamma * self.out(out)
        return y


def _layers(batch: int, channels: int, side: int, device: torch.device) -> tuple[Call, Call]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ours, baseline = SelfAttention2d(channels), Conv1x1SelfAttention(channels)
    nn.init.ones_(ours.gamma)  # initialized to 0, where the layer is the identity
    baseline.load_state_dict(ours.state_dict())
    x = _noise((batch, channels, side, side), device, 0).requires_grad_()
    upstream = _noise(x.shape, device, 1)

    def work(layer: nn.Module) -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer(x), [x, *layer.parameters()], upstream)

    ours, baseline = ours.to(device, x.dtype), baseline.to(device, x.dtype)
    return (lambda: work(ours)), (lambda: work(baseline))


def _noise(sizes: tuple[int, ...], device: torch.device, seed: int) -> Tensor:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
