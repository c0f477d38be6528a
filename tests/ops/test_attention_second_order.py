"""Penalties and tangents through attention as they are used: memory, autocast, checkpoints, processes, training."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from fastgen import random, reference
from fastgen.data import DataConfig, load_data
from fastgen.functional import scaled_dot_product_attention as attention
from fastgen.losses import gradient_penalty, r1_penalty
from fastgen.ops.attention import blocked as _attention_blocked
from fastgen.ops.attention import tangent as _attention_tangent
from fastgen.ops.attention.problem import Options
from tests.covering import covering


def with_math(query, key, value, **kwargs):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(query, key, value, **kwargs)


# --------------------------------------------------------------------------------------------------
# Both implementations of the blocked passes, with tiles so small that every loop runs


TILED = {
    "namespace": ["fastgen", "fastgen_torch"],
    "absent": [(), (2, 3), (0, 1), (0, 1, 2)],
    "window": [(-1, -1), (2, 0)],
    "dropout": [0.0, 0.3],
    "mask": ["none", "bool", "float"],
    "softcap": [0.0, 0.7],
    "dtype": [torch.float64, torch.float32],
}


@pytest.mark.parametrize(tuple(TILED), covering([*TILED.values()], lambda point: True), ids=str)
def test_tiles_give_the_formulas(monkeypatch, namespace, absent, window, dropout, mask, softcap, dtype):
    check_tiles(monkeypatch, namespace, absent, window, dropout, mask, softcap, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("namespace", TILED["namespace"])
def test_tiles_give_the_formulas_in_every_combination(monkeypatch, namespace):
    for point in itertools.product(*[*TILED.values()][1:]):
        torch.manual_seed(0)
        check_tiles(monkeypatch, namespace, *point)


def check_tiles(monkeypatch, namespace, absent, window, dropout, mask, softcap, dtype):
    for module in (_attention_blocked, _attention_tangent):
        monkeypatch.setattr(module, "TILE_BYTES", 2048)
    shapes = ((2, 4, 21, 3), (2, 2, 33, 3), (2, 2, 33, 5))
    tensors = [torch.randn(s, dtype=dtype) for s in shapes]
    given = {"none": None, "bool": torch.rand(2, 1, 21, 33) > 0.5, "float": torch.randn(1, 4, 1, 33, dtype=dtype)}[mask]
    learned = mask == "float"
    directions = [torch.randn(s, dtype=dtype) for s in shapes] + [torch.randn_like(given) if learned else None]
    directions = [None if i in absent else d for i, d in enumerate(directions)]
    seed, keep = None, None
    if dropout:
        seed, groups = torch.tensor([3]), random.groups_per_row(33)
        uniform = random.uniform_rows(seed, torch.arange(2 * 4 * 21), 2 * 4 * 21, groups, 0, groups)[:, :33]
        keep = ((uniform >= dropout).double() / (1 - dropout)).reshape(2, 4, 21, 33)
    upstream = torch.randn(2, 4, 21, 5, dtype=dtype), torch.randn(2, 4, 21, dtype=dtype)
    options = Options(dropout, *window, 0.6, softcap)
    operators = getattr(torch.ops, namespace)
    out, lse = operators.attention_forward(*tensors, given, seed, None, *options)
    rest = (out, lse, given, seed, None, *directions, *options)
    ours = operators.attention_second_order(*upstream, *tensors, *rest, learned)
    tangents = operators.attention_tangent(*tensors, *rest)

    def wide(t):
        return t.double() if t is not None and t.is_floating_point() else t

    arguments = [wide(t) for t in (*tensors, given, *directions, keep)]
    exact = reference.attention_second_order(*map(wide, upstream), *arguments, *window, 0.6, softcap)
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5}[dtype]
    for a, b in zip((*ours, *tangents), (*exact, *exact[:2]), strict=True):
        if b is not None:
            torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("softcap", [0.0, 0.7])
def test_the_second_order_formulas_are_the_derivative_of_the_first(softcap):
    """The oracle's formulas against autograd of the oracle; every other test compares with one of the two."""
    tensors = [
        torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 4, 5, 3), (2, 2, 7, 3), (2, 2, 7, 2))
    ]
    mask = torch.randn(4, 1, 7, dtype=torch.float64, requires_grad=True)
    directions = [torch.randn_like(t) for t in (*tensors, mask)]
    upstream = [torch.randn(2, 4, 5, *end, dtype=torch.float64, requires_grad=True) for end in ((2,), ())]
    keep = (torch.rand(2, 4, 5, 7) > 0.3).double() / 0.7
    grads = reference.attention_backward(*upstream, *tensors, mask, keep, 4, 1, 0.5, softcap)
    total = sum((g * d).sum() for g, d in zip(grads, directions, strict=True))
    wanted = torch.autograd.grad(total, [*upstream, *tensors, mask])
    ours = reference.attention_second_order(*upstream, *tensors, mask, *directions, keep, 4, 1, 0.5, softcap)
    tangents = reference.attention_tangent(*tensors, mask, *directions, keep, 4, 1, 0.5, softcap)
    for a, b in zip((*ours, *tangents), (*wanted, *wanted[:2]), strict=True):
        torch.testing.assert_close(a, b)


# --------------------------------------------------------------------------------------------------
# As they are used


@pytest.mark.parametrize(
    "kwargs", [{}, {"dropout_p": 0.1}, {"window": (64, 64)}, {"attn_mask": "bias"}, {"softcap": 2.0}], ids=str
)
def test_no_buffer_of_the_size_of_the_scores(kwargs, monkeypatch):
    """Largest single allocation of a penalty's step and of a tangent, with small tiles, against N x M floats."""
    for module in (_attention_blocked, _attention_tangent):
        monkeypatch.setattr(module, "TILE_BYTES", 2**20)
    length = 2048
    if kwargs.get("attn_mask") == "bias":
        kwargs = {"attn_mask": torch.randn(1, length, requires_grad=True)}
    x = torch.randn(1, 1, length, 16, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        r1_penalty(attention(x, x, x, **kwargs).square().sum((1, 2, 3)), x).backward()
        torch.func.jvp(lambda x: attention(x, x, x, **kwargs), (x.detach(),), (x.detach(),))
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest < length * length * 4 / 4


def test_a_penalty_under_autocast():
    x = torch.randn(4, 2, 16, 8)
    weight = torch.randn(8, 8, requires_grad=True)

    def gradient(attend, enabled):
        inputs = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            scores = attend(inputs @ weight, inputs @ weight.t(), inputs).float().square().sum((1, 2, 3))
            penalty = r1_penalty(scores, inputs)
        return torch.autograd.grad(penalty, weight)[0]

    low, exact, peer = gradient(attention, True), gradient(attention, False), gradient(with_math, True)
    assert low.dtype == torch.float32
    error = float((low - exact).norm() / exact.norm())
    assert 0 < error <= 2 * float((peer - exact).norm() / exact.norm())


def test_a_penalty_through_a_checkpoint():
    x = torch.randn(3, 2, 9, 4, dtype=torch.float64)

    def gradient(wrap):
        inputs = x.clone().requires_grad_()

        def scores(x):
            torch.manual_seed(0)
            return attention(x, x, x, dropout_p=0.2, is_causal=True).square().sum((1, 2, 3))

        r1_penalty(wrap(scores, inputs), inputs).backward()
        return inputs.grad

    plain = gradient(lambda f, x: f(x))
    torch.testing.assert_close(gradient(lambda f, x: checkpoint(f, x, use_reentrant=False)), plain)


class Discriminator(nn.Module):
    """Two convolutions with self-attention between them (Zhang et al., "Self-attention GAN", 2018)."""

    def __init__(self, attend, width=16):
        super().__init__()
        self.attend = attend
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.query, self.key = nn.Conv2d(width, width // 4, 1), nn.Conv2d(width, width // 4, 1)
        self.value = nn.Conv2d(width, width, 1)
        self.gamma = nn.Parameter(torch.full((), 0.5))
        self.last = nn.Conv2d(width, width, 4, stride=4)
        self.score = nn.Linear(4 * width, 1)

    def forward(self, images):
        h = F.leaky_relu(self.first(images), 0.2)
        q, k, v = (layer(h).flatten(2).mT.unsqueeze(1) for layer in (self.query, self.key, self.value))
        attended = self.attend(6 * q, 6 * k, v)  # so that weights differ from the start
        h = h + self.gamma * attended.squeeze(1).mT.unflatten(2, h.shape[2:])
        return self.score(F.leaky_relu(self.last(h), 0.2).flatten(1)).squeeze(1)


def losses_of(attend, kind, dtype, steps):
    torch.manual_seed(0)
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    items, _ = load_data(DataConfig("digits"), "images").splits()
    digits = items.batch(torch.arange(len(items)))["images"].to(dtype) * 2 - 1
    network = Discriminator(attend).to(dtype)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, betas=(0.0, 0.9))
    generator = torch.Generator().manual_seed(1)
    curve = []
    for _ in range(steps):
        real = digits[torch.randint(len(digits), (16,), generator=generator)]
        fake = torch.randn(real.shape, generator=generator).to(dtype).clamp(-1, 1)
        if kind == "r1":
            real = real.clone().requires_grad_()
            scores = network(real)
            loss = F.softplus(network(fake)).mean() + F.softplus(-scores).mean() + 0.5 * r1_penalty(scores, real)
        else:
            penalty = gradient_penalty(network, real, fake, generator=generator)
            loss = network(fake).mean() - network(real).mean() + 10 * penalty
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return torch.tensor(curve, dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "dtype", "tolerance"), [("r1", torch.float64, 1e-10), ("wgan-gp", torch.float32, 1e-3)], ids=str
)
def test_training_under_a_penalty_takes_the_path_of_plain_attention(kind, dtype, tolerance):
    """Rounding grows along the path, by less than five digits. With a second derivative that is missing the losses of
    60 steps are more than 10 % apart."""
    ours, plain = (losses_of(attend, kind, dtype, 60) for attend in (attention, with_math))
    assert bool(ours.isfinite().all())
    assert float(ours[-20:].mean()) < float(ours[:20].mean()), "it learns"
    scale = float(plain.abs().mean())
    assert float((ours - plain).abs().max()) < tolerance * scale
    assert not math.isclose(ours[0], ours[-1])


def test_a_penalty_through_distributed_data_parallel(tmp_path):
    """In one process: its hooks and buckets see the backward pass of a graph that contains a gradient."""
    if not torch.distributed.is_gloo_available():
        pytest.skip("no gloo")
    torch.manual_seed(0)
    images = torch.randn(8, 1, 8, 8, dtype=torch.float64)

    def gradients(wrap):
        torch.manual_seed(0)
        network, real = Discriminator(attention).double(), images.clone().requires_grad_()
        scores = wrap(network)(real)
        (F.softplus(-scores).mean() + r1_penalty(scores, real)).backward()
        return [p.grad for p in network.parameters()]

    plain = gradients(lambda network: network)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = gradients(nn.parallel.DistributedDataParallel)
    finally:
        torch.distributed.destroy_process_group()
    for a, b in zip(parallel, plain, strict=True):
        torch.testing.assert_close(a, b)
