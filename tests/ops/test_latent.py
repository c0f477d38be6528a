"""The Gaussian latent: values, derivatives, strides, dtypes, memory."""

from __future__ import annotations

import gc

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import fastgen
from benchmarks.shapes import LATENT_EDGES, LATENT_SHAPES
from fastgen import backend, random, reference
from fastgen.functional import reparameterize, reparameterize_kl
from fastgen.testing import assert_accurate, largest_error

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [*LATENT_EDGES, LATENT_SHAPES["dense-vae"], LATENT_SHAPES["odd"], (3, 2, 5, 5), (2, 2100)]


def latents(shape, dtype, device, prior=False):
    """mu and logvar as the two halves of one encoder output, and perhaps a prior shared by the batch."""
    shape = tuple(shape)
    if len(shape) == 1:
        mu, logvar = torch.randn(2, *shape, device=device).to(dtype)
    else:
        encoded = torch.randn(shape[0], 2 * shape[1], *shape[2:], device=device).to(dtype)
        mu, logvar = encoded.chunk(2, dim=1)
    priors = {}
    if prior:
        priors["prior_mu"] = torch.randn(shape[1:], device=device).to(dtype)
        priors["prior_logvar"] = torch.randn((1, *shape[1:]), device=device).to(dtype)
    return mu, logvar, priors


def run(mu, logvar, priors, seed=5):
    """Values and gradients of one call, with fixed upstream gradients."""
    leaves = [t.detach().clone().requires_grad_() for t in (mu, logvar, *priors.values())]
    torch.manual_seed(seed)
    z, kl = reparameterize_kl(*leaves[:2], **dict(zip(priors, leaves[2:], strict=True)))
    torch.manual_seed(seed + 1)
    grad_z, grad_kl = torch.randn(z.shape).to(z), torch.randn(kl.shape).to(kl)
    return [z, kl, *torch.autograd.grad((z, kl), leaves, (grad_z, grad_kl))]


def plain(mu, logvar, priors, noise):
    """The formula as every library writes it, in the dtype given."""
    leaves = [t.detach().clone().requires_grad_() for t in (mu, logvar, *priors.values())]
    mu, logvar = leaves[:2]
    kwargs = dict(zip(priors, leaves[2:], strict=True))
    z = mu + noise.to(mu.dtype).reshape(mu.shape) * torch.exp(0.5 * logvar)
    rows = mu.size(0), mu[0].numel() if mu.size(0) else 0
    flat = {k: v.expand(mu.shape).reshape(rows) for k, v in kwargs.items()}
    kl = reference.kl_divergence(mu.reshape(rows), logvar.reshape(rows), flat.get("prior_mu"), flat.get("prior_logvar"))
    torch.manual_seed(6)
    grad_z, grad_kl = torch.randn(z.shape).to(z), torch.randn(kl.shape).to(kl)
    return [z, kl, *torch.autograd.grad((z, kl), leaves, (grad_z, grad_kl))]


def noise_of(mu, seed=5):
    """The noise that a call after ``manual_seed(seed)`` uses, from the reference."""
    torch.manual_seed(seed)
    drawn = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=mu.device)
    return random.standard_normal(drawn, mu.size(0), mu[0].numel() if mu.size(0) else 0)


@pytest.mark.parametrize("prior", [False, True], ids=["unit", "prior"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_as_accurate_as_the_plain_formula(latent_place, shape, dtype, prior):
    if prior and (0 in shape or len(shape) == 1):
        pytest.skip("no prior for an empty shape")
    mu, logvar, priors = latents(shape, dtype, latent_place, prior)
    noise = noise_of(mu)
    torch.manual_seed(6)
    results = run(mu, logvar, priors)
    double = {k: v.double() for k, v in priors.items()}
    # The upstream gradients of plain() are cast to its dtype; give float64 the rounded ones.
    exact = exact_with_rounded_upstream(mu, logvar, double, noise, dtype)
    peers = plain(mu, logvar, priors, noise)
    names = ["z", "kl", "grad mu", "grad logvar", *priors]
    for name, result, peer, truth in zip(names, results, peers, exact, strict=True):
        assert_accurate(result, peer, truth, name)
    assert results[0].dtype == dtype
    assert results[1].dtype == torch.float32
    assert all(g.dtype == dtype for g in results[2:])


def exact_with_rounded_upstream(mu, logvar, priors, noise, dtype):
    leaves = [t.detach().double().requires_grad_() for t in (mu, logvar, *priors.values())]
    rows = mu.size(0), mu[0].numel() if mu.size(0) else 0
    wide = [leaf.expand(mu.shape).reshape(rows) for leaf in leaves]
    z, kl = reference.gaussian_latent(*wide[:2], noise.double(), *wide[2:])
    torch.manual_seed(6)
    grad_z = torch.randn(mu.shape).to(dtype).double().to(mu.device)
    grad_kl = torch.randn(kl.shape).double().to(mu.device)
    return [z.reshape(mu.shape), kl, *torch.autograd.grad((z, kl), leaves, (grad_z.reshape(rows), grad_kl))]


def test_one_seed_gives_the_same_sample_on_every_backend():
    mu, logvar, _ = latents((64, 33), torch.float32, "cpu")
    samples = []
    for chosen in ("torch", "auto"):
        with fastgen.use_backend(chosen):
            torch.manual_seed(11)
            samples.append(reparameterize(mu, logvar))
    ulps = (samples[0] - samples[1]).abs() / torch.finfo(torch.float32).eps / samples[0].abs().clamp(min=1)
    assert float(ulps.max()) <= 8


def test_the_sample_does_not_depend_on_threads():
    mu, logvar = torch.randn(2, 300, 1030)
    threads = torch.get_num_threads()
    samples = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            torch.manual_seed(1)
            samples.append(reparameterize_kl(mu, logvar))
    finally:
        torch.set_num_threads(threads)
    for z, kl in samples[1:]:
        assert torch.equal(z, samples[0][0])
        assert torch.equal(kl, samples[0][1])


def test_a_generator_decides_the_sample(latent_place):
    mu, logvar, _ = latents((8, 16), torch.float32, latent_place)
    draw = lambda seed: reparameterize(mu, logvar, generator=torch.Generator(latent_place).manual_seed(seed))  # noqa: E731
    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))


def test_reparameterize_is_the_z_of_reparameterize_kl(latent_place):
    mu, logvar, _ = latents((8, 16), torch.float32, latent_place)
    torch.manual_seed(2)
    z = reparameterize(mu, logvar)
    torch.manual_seed(2)
    assert torch.equal(z, reparameterize_kl(mu, logvar)[0])


@pytest.mark.parametrize("layout", ["halves", "channels_last", "transposed", "every other", "expanded"])
def test_any_stride_gives_the_contiguous_result(latent_place, layout):
    shape = (4, 6, 5, 3)
    base = torch.randn(2, *shape, device=latent_place)
    if layout == "halves":
        mu, logvar = torch.cat((base[0], base[1]), dim=1).chunk(2, dim=1)
    elif layout == "channels_last":
        mu, logvar = (t.to(memory_format=torch.channels_last) for t in base)
    elif layout == "transposed":
        mu, logvar = (t.transpose(1, 3).contiguous().transpose(1, 3) for t in base)
    elif layout == "every other":
        mu, logvar = torch.stack((base, base), dim=-1)[..., 0]
    else:
        base = base[:, :1].expand(2, 4, *shape[1:]).contiguous()
        mu, logvar = base[:, :1].expand(2, *shape)
    for strided, dense in zip(run(mu, logvar, {}), run(base[0], base[1], {}), strict=True):
        assert largest_error(strided, dense) <= 1e-6


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e4, -1e4, 200.0, -200.0])
def test_special_logvar_passes_through_as_in_pytorch(latent_place, value):
    mu, logvar = torch.randn(2, 3, 6, device=latent_place)
    logvar[1, 2] = value
    noise = noise_of(mu)
    torch.manual_seed(5)
    z, kl = reparameterize_kl(mu, logvar)
    wanted_z = mu + noise * torch.exp(0.5 * logvar)
    wanted_kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1)
    torch.testing.assert_close(z, wanted_z, equal_nan=True, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(kl, wanted_kl, equal_nan=True, rtol=2e-6, atol=2e-6)
    clean = torch.ones_like(z, dtype=torch.bool)
    clean[1, 2] = False
    assert bool(z[clean].isfinite().all())


def test_a_row_shared_by_the_batch_is_a_prior_of_every_row():
    mu, logvar, priors = latents((5, 9), torch.float64, "cpu", prior=True)
    kl = reparameterize_kl(mu, logvar, **priors)[1]
    own = torch.distributions.Normal(mu, (0.5 * logvar).exp())
    prior = torch.distributions.Normal(
        priors["prior_mu"].expand_as(mu), (0.5 * priors["prior_logvar"]).exp().expand_as(mu)
    )
    torch.testing.assert_close(kl, torch.distributions.kl_divergence(own, prior).sum(1))


@pytest.mark.parametrize("prior", ["neither", "prior_mu", "prior_logvar", "both"])
def test_derivatives_of_first_and_second_order_in_both_modes(prior):
    mu, logvar, priors = latents((3, 5), torch.float64, "cpu", prior=True)
    names = [name for name in priors if prior in (name, "both")]
    leaves = [t.clone().requires_grad_() for t in (mu, logvar, *(priors[name] for name in names))]

    def call(mu, logvar, *rest):
        torch.manual_seed(0)
        return reparameterize_kl(mu, logvar, **dict(zip(names, rest, strict=True)))

    assert gradcheck(call, leaves, check_forward_ad=True)
    assert gradgradcheck(call, leaves, check_fwd_over_rev=True, fast_mode=True)


def test_reparameterize_alone_has_derivatives_of_second_order():
    leaves = [torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def call(mu, logvar):
        torch.manual_seed(0)
        return reparameterize(mu, logvar)

    assert gradcheck(call, leaves, check_forward_ad=True)
    assert gradgradcheck(call, leaves, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("which", ["z", "kl"])
def test_one_output_alone_has_the_right_gradient(latent_place, which):
    mu, logvar, _ = latents((4, 7), torch.float32, latent_place)
    noise = noise_of(mu)
    leaves = [t.clone().requires_grad_() for t in (mu, logvar)]
    torch.manual_seed(5)
    z, kl = reparameterize_kl(*leaves)
    grads = torch.autograd.grad((z if which == "z" else kl).sum(), leaves)
    peers = [t.clone().requires_grad_() for t in (mu, logvar)]
    plain_z, plain_kl = reference.gaussian_latent(*peers, noise)
    wanted = torch.autograd.grad((plain_z if which == "z" else plain_kl).sum(), peers)
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (4, 6)], ids=str)
def test_a_sum_can_be_the_loss(latent_place, shape):
    """Its upstream gradients are expanded scalars, with no stride at all."""
    mu, logvar = (torch.randn(shape, device=latent_place, requires_grad=True) for _ in range(2))
    z, kl = reparameterize_kl(mu, logvar)
    (z.sum() + kl.sum()).backward()
    torch.testing.assert_close(mu.grad, 1 + mu.detach())


def test_second_derivatives_agree_between_backends(latent_place):
    mu, logvar, _ = latents((4, 7), torch.float32, latent_place)

    def penalty(mu, logvar):
        mu, logvar = mu.clone().requires_grad_(), logvar.clone().requires_grad_()
        torch.manual_seed(5)
        z, kl = reparameterize_kl(mu, logvar)
        first = torch.autograd.grad(z.square().sum() + kl.sum(), (mu, logvar), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), (mu, logvar))

    low = penalty(mu, logvar)
    high = penalty(mu.double(), logvar.double()) if fastgen.current_backend() == "torch" else None
    if high is None:
        with fastgen.use_backend("torch"):
            high = penalty(mu.double(), logvar.double())
    for a, b in zip(low, high, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_nothing_the_size_of_the_noise_is_kept_between_forward_and_backward():
    mu, logvar = torch.randn(2, 64, 512, requires_grad=True).unbind(0)
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        reparameterize_kl(mu, logvar)
    own = {mu.data_ptr(), logvar.data_ptr()}
    extra = [t for t in saved if t.data_ptr() not in own]
    assert sum(t.numel() for t in extra) == 1, "only the seed"


def test_forward_and_backward_allocate_only_their_results():
    if backend.why_not_compiled("latent_forward", torch.device("cpu")) is not None:
        pytest.skip("not compiled")
    mu, logvar = torch.randn(2, 256, 1024)
    mu.requires_grad_(), logvar.requires_grad_()
    size = mu.numel() * 4
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        z, kl = reparameterize_kl(mu, logvar)
        torch.autograd.grad((z, kl), (mu, logvar), (mu.detach(), kl.detach()))
    allocated = sum(e.self_cpu_memory_usage for e in profile.key_averages() if e.self_cpu_memory_usage > 0)
    assert allocated <= 3.1 * size, "z and two gradients"


def test_a_model_in_autocast_keeps_kl_in_float32():
    linear = torch.nn.Linear(8, 12)
    with torch.autocast("cpu", torch.bfloat16):
        z, kl = reparameterize_kl(*linear(torch.randn(3, 8)).chunk(2, dim=1))
        mixed, _ = reparameterize_kl(torch.randn(2, 4), torch.randn(2, 4).bfloat16())
    assert (z.dtype, kl.dtype, mixed.dtype) == (torch.bfloat16, torch.float32, torch.float32)


def test_vmap_folds_into_the_batch_with_its_own_noise_for_each_slice(latent_place):
    mu, logvar = torch.randn(2, 3, 4, 6, device=latent_place)
    noise = torch.func.vmap(lambda m: reparameterize(m, torch.zeros_like(m)), randomness="different")(mu) - mu
    assert float((noise[0] - noise[1]).abs().max()) > 0.1
    same = torch.func.vmap(lambda m: reparameterize(m, torch.zeros_like(m)), randomness="same")(mu) - mu
    torch.testing.assert_close(same[0], same[1])
    torch.manual_seed(9)
    alone = reparameterize_kl(mu[1], logvar[1])
    torch.manual_seed(9)
    mapped = torch.func.vmap(reparameterize_kl, randomness="same")(mu, logvar)
    for a, b in zip(alone, mapped, strict=True):
        torch.testing.assert_close(a, b[1])


def test_torch_func_transforms_agree_with_autograd():
    mu, logvar = torch.randn(2, 4, 6, dtype=torch.float64)

    def loss(mu, logvar):
        torch.manual_seed(1)
        z, kl = reparameterize_kl(mu, logvar)
        return z.square().sum() + kl.sum()

    leaves = [t.clone().requires_grad_() for t in (mu, logvar)]
    for a, b in zip(
        torch.func.grad(loss, argnums=(0, 1))(mu, logvar), torch.autograd.grad(loss(*leaves), leaves), strict=True
    ):
        torch.testing.assert_close(a, b)
