"""The Gaussian latent where the plain formula cancels or overflows, and where it is given one tensor twice."""

from __future__ import annotations

import math

import pytest
import torch

from fastgen import random
from fastgen.functional import reparameterize, reparameterize_kl
from fastgen.nn import GaussianLatent

SIZES = [1e-8, 1e-6, 1e-4, 1e-2, 0.34, 0.4, 0.7, 3.0, 30.0, 80.0, 200.0, 1000.0]
SIGNED = torch.tensor([*(-size for size in SIZES), 0.0, *SIZES], dtype=torch.float64)
NAMES = ("mu", "logvar", "prior_mu", "prior_logvar")
HALF = [torch.float16, torch.bfloat16]


def excess(r):
    """e^r - 1 - r in float64, by a series of its own where that cancels."""
    return torch.where(r.abs() < 1e-3, 0.5 * r * r * (1 + r / 3 + r * r / 12 + r**3 / 60), r.expm1() - r)


def assert_close_to_its_size(actual, exact, dtype, size=None, what=""):
    """Within some ulp of the exact value's own size (or that of its terms), infinities where it overflows the dtype."""
    limits = torch.finfo(dtype)
    ulps = {torch.float32: 24, torch.float64: 1e6}.get(dtype, 2)
    allowed = ulps * limits.eps * (exact if size is None else size).abs() + 2 * limits.tiny
    near_overflow = (exact.abs() > 0.99 * limits.max) & (exact.abs() < 1.01 * limits.max)
    actual = actual.detach().double().cpu()
    fits = ((actual - exact).abs() <= allowed) | (actual == exact.to(dtype).double()) | near_overflow
    assert bool(fits.all()), (what, actual[~fits][:3], exact[~fits][:3])


def grid(dtype, prior_logvar, device):
    """Leaves (N, 1) and d = mu - prior_mu, r = logvar - prior_logvar in float64, over all pairs of SIGNED."""
    d, r = (t.reshape(-1, 1) for t in torch.meshgrid(SIGNED, SIGNED, indexing="ij"))
    tensors = [d, r] if prior_logvar is None else [d, r + prior_logvar, torch.zeros_like(d), torch.zeros_like(d)]
    if prior_logvar is not None:
        tensors[3] += prior_logvar
    leaves = [t.to(dtype) for t in tensors]
    d, r = leaves[0].double(), leaves[1].double() - (prior_logvar or 0)
    return [leaf.to(device).requires_grad_() for leaf in leaves], d, r


def kl_of(leaves):
    return reparameterize_kl(*leaves[:2], **dict(zip(NAMES[2:], leaves[2:], strict=False)))[1]


def exact_derivatives(d, r, prior_logvar):
    """First derivatives of an element's KL with the sizes of their terms, and the second ones, in float64."""
    w = math.exp(-(prior_logvar or 0))
    first = {
        "mu": (d * w, None),
        "logvar": (0.5 * r.expm1(), None),
        "prior_mu": (-d * w, None),
        "prior_logvar": (-0.5 * (r.expm1() + d * d * w), 0.5 * (r.expm1().abs() + d * d * w)),
    }
    second = {
        ("mu", "mu"): w + 0 * d,
        ("logvar", "logvar"): 0.5 * r.exp(),
        ("mu", "prior_logvar"): -d * w,
        ("prior_logvar", "mu"): -d * w,
        ("logvar", "prior_logvar"): -0.5 * r.exp(),
        ("prior_logvar", "prior_logvar"): 0.5 * (r.exp() + d * d * w),
    }
    return first, second


@pytest.mark.parametrize("prior_logvar", [None, 0.0, -100.0, 200.0])
def test_kl_and_gradients_are_right_from_1e_minus_8_to_1e3(latent_place, prior_logvar):
    leaves, d, r = grid(torch.float32, prior_logvar, latent_place)
    kl = kl_of(leaves)
    assert bool((kl >= 0).all())
    w = math.exp(-0.5 * (prior_logvar or 0))
    assert_close_to_its_size(kl[:, None], 0.5 * ((d * w).square() + excess(r)), torch.float32, what="kl")
    first, _ = exact_derivatives(d, r, prior_logvar)
    for name, grad in zip(NAMES, torch.autograd.grad(kl.sum(), leaves), strict=False):
        assert_close_to_its_size(grad, first[name][0], torch.float32, first[name][1], name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF], ids=str)
@pytest.mark.parametrize("prior_logvar", [None, -1.0, -200.0])
def test_derivatives_of_derivatives_and_tangents_are_right_from_1e_minus_8_to_1e3(dtype, prior_logvar):
    leaves, d, r = grid(dtype, prior_logvar, "cpu")
    wide = torch.promote_types(dtype, torch.float32)
    first, second = exact_derivatives(d, r, prior_logvar)
    kl = kl_of(leaves)
    w = math.exp(-0.5 * (prior_logvar or 0))
    assert kl.dtype == wide
    assert_close_to_its_size(kl[:, None], 0.5 * ((d * w).square() + excess(r)), wide, what="kl")
    once = dict(zip(NAMES, torch.autograd.grad(kl.sum(), leaves, retain_graph=True), strict=False))
    again = dict(zip(NAMES, torch.autograd.grad(kl.sum(), leaves, create_graph=True), strict=False))
    for at, name in enumerate(once):
        primals = tuple(leaf.detach() for leaf in leaves)
        direction = tuple(torch.full_like(leaf, float(i == at)) for i, leaf in enumerate(primals))
        _, tangent = torch.func.jvp(lambda *t: kl_of(t), primals, direction)
        assert tangent.dtype == wide
        assert_close_to_its_size(tangent[:, None], *_sized(first[name], wide), f"tangent in {name}")
        for grad in (once[name], again[name]):
            assert_close_to_its_size(grad, *_sized(first[name], dtype), name)
    for (of, by), exact in second.items():
        if of in again and by in again and again[of].requires_grad:
            (grad,) = torch.autograd.grad(again[of].sum(), leaves[NAMES.index(by)], retain_graph=True)
            assert_close_to_its_size(grad, exact, dtype, what=(of, by))


def _sized(exact_and_size, dtype):
    exact, size = exact_and_size
    return exact, dtype, size


@pytest.mark.parametrize("priors", [{}, {"prior_mu": 0.0, "prior_logvar": 0.0}, {"prior_logvar": -50.0}], ids=str)
def test_gradients_that_overflow_have_the_sign_of_the_formula(latent_place, priors):
    """e^logvar outgrows noise * e^(logvar / 2), whose sign may be the other one; without a KL, noise decides."""
    mu = torch.zeros(2, 8, device=latent_place, requires_grad=True)
    logvar = torch.full_like(mu, 200.0).requires_grad_()
    priors = {name: torch.full_like(mu, value) for name, value in priors.items()}
    torch.manual_seed(5)
    z, kl = reparameterize_kl(mu, logvar, **priors)
    assert bool((kl == math.inf).all())
    for create_graph in (False, True):
        for weight in (1.0, -1.0, 0.0):
            loss = z.sum() + weight * kl.sum()
            grads = torch.autograd.grad(loss, (mu, logvar), retain_graph=True, create_graph=create_graph)
            assert torch.equal(grads[0], torch.ones_like(mu))
            sign = torch.full_like(mu, weight) if weight else z.detach().sign()
            assert torch.equal(grads[1], math.inf * sign)


@pytest.mark.parametrize("prior", [False, True])
def test_a_row_that_the_loss_leaves_out_gets_no_gradient_where_its_gradient_overflows(latent_place, prior):
    values = [torch.randn(2, 6), torch.tensor([[200.0], [1.0]]).expand(2, 6), torch.randn(2, 6)]
    values = [*values, torch.full((2, 6), -190.0)] if prior else values[:2]
    leaves = [value.to(latent_place).clone().requires_grad_() for value in values]
    z, kl = reparameterize_kl(*leaves[:2], **dict(zip(NAMES[2:], leaves[2:], strict=False)))
    for create_graph in (False, True):
        grads = torch.autograd.grad(
            z[1].sum() + kl[1], leaves, retain_graph=True, create_graph=create_graph, materialize_grads=True
        )
        assert all(bool((grad[0] == 0).all()) for grad in grads)


def test_a_hessian_has_no_nan_beside_an_overflowed_element():
    values = torch.tensor([[200.0, 1.0], [0.5, -0.5], [-190.0, 0.0]])

    def kl(logvar, mu, prior_logvar):
        # One element's distance from the prior is 0, where e^-prior_logvar is infinite.
        return reparameterize_kl(mu[None], logvar[None], prior_mu=values[None, 1], prior_logvar=prior_logvar[None])[1]

    blocks = torch.autograd.functional.hessian(kl, (values[0], values[1], values[2]))
    for row, of in enumerate(blocks):
        for column, block in enumerate(of):
            assert bool((block[~torch.eye(2, dtype=torch.bool)] == 0).all()), (row, column)
            assert not bool(block.isnan().any()), (row, column)


def test_a_standard_deviation_about_the_largest_and_smallest_number_is_not_nan(latent_place):
    """ln of the largest float32 is 88.7228391, that of the smallest normal one -87.3365448."""
    bounds = torch.tensor([88.7228394, -87.3365479])
    near = torch.stack([torch.nextafter(bounds, -bounds), bounds, torch.nextafter(bounds, 2 * bounds)]).flatten()
    logvar = (2 * near).repeat(2, 8).to(latent_place)
    z, kl = reparameterize_kl(torch.zeros_like(logvar), logvar)
    large = logvar > 0
    assert not bool(z.isnan().any())
    assert bool((z[large].abs() > 1e34).all())
    assert bool((z[~large].abs() < 1e-36).all())
    assert bool((kl == math.inf).all())


def test_a_variance_of_zero_gives_the_mean_and_an_infinite_kl(latent_place):
    mu = torch.randn(3, 5, device=latent_place, requires_grad=True)
    logvar = torch.full_like(mu, -math.inf).requires_grad_()
    z, kl = reparameterize_kl(mu, logvar)
    assert torch.equal(z, mu)
    assert bool((kl == math.inf).all())
    grads = torch.autograd.grad(z.sum(), (mu, logvar), retain_graph=True)
    assert torch.equal(grads[0], torch.ones_like(mu))
    assert torch.equal(grads[1], torch.zeros_like(mu))
    assert torch.equal(torch.autograd.grad(kl.sum(), logvar)[0], torch.full_like(mu, -0.5))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_tangents_and_second_derivatives_in_half_precision_are_rounded_only_once(dtype):
    mu, logvar = (torch.tensor([[v] * 4], dtype=dtype) for v in (300.0, 11.0))
    directions = (torch.full_like(mu, 341.25), torch.full_like(mu, 0.5))
    torch.manual_seed(3)
    z_tangent, kl_tangent = torch.func.jvp(reparameterize_kl, (mu, logvar), directions)[1]
    noise = random.standard_normal(seed_after(3), 1, 4).double()
    d, t = [x.double() for x in (mu, logvar)], [x.double() for x in directions]
    want = (d[0] * t[0] + 0.5 * d[1].expm1() * t[1]).sum(1)
    torch.testing.assert_close(kl_tangent, want.float(), rtol=1e-5, atol=0)  # beyond float16
    torch.testing.assert_close(z_tangent, (t[0] + 0.5 * noise * (0.5 * d[1]).exp() * t[1]).to(dtype), rtol=0.01, atol=0)
    leaves = [x.clone().requires_grad_() for x in (mu, logvar)]
    weight = torch.full((1,), 2e-4, requires_grad=True)  # its product with a gradient fits float16; e^11 does not
    derivative = torch.autograd.grad(reparameterize_kl(*leaves)[1], leaves, weight, create_graph=True)[1]
    of_weight, of_logvar = torch.autograd.grad(derivative.sum(), (weight, leaves[1]))
    torch.testing.assert_close(of_weight, 2 * d[1][0, :1].expm1().float(), rtol=0.01, atol=0)
    torch.testing.assert_close(of_logvar, (1e-4 * d[1].exp()).to(dtype), rtol=0.01, atol=0)


def seed_after(seed):
    torch.manual_seed(seed)
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64)


ALIASES = {
    "mu is logvar": lambda x, y: (x, x, y, y),
    "prior_mu is mu": lambda x, y: (x, y, x, None),
    "prior_logvar is logvar": lambda x, y: (x, y, None, y),
    "the prior is the posterior": lambda x, y: (x, y, x, y),
    "all are one": lambda x, y: (x, x, x, x),
    "logvar comes from mu": lambda x, y: (x, (x * y).sin(), y, x),
    "the prior comes from mu": lambda x, y: (x, y, x.tanh(), (x + y).sin()),
}


@pytest.mark.parametrize("alias", ALIASES)
def test_a_tensor_given_twice_gets_each_path_once(alias):
    def loss(of, x, y):
        torch.manual_seed(3)
        z, kl = of(*ALIASES[alias](x, y))
        return (z.square().sum(1) + kl).square().sum()

    def plain(mu, logvar, prior_mu, prior_logvar):
        noise = random.standard_normal(torch.randint(0, 2**63 - 1, (1,)), *mu.shape)
        zero = torch.zeros_like(mu)
        prior_mu, prior_logvar = (zero if prior is None else prior for prior in (prior_mu, prior_logvar))
        r = logvar - prior_logvar
        terms = r.exp() - 1 - r + (mu - prior_mu).square() * (-prior_logvar).exp()
        return mu + noise * (0.5 * logvar).exp(), 0.5 * terms.sum(1)

    def ours(mu, logvar, prior_mu, prior_logvar):
        return reparameterize_kl(mu, logvar, prior_mu=prior_mu, prior_logvar=prior_logvar)

    values = torch.randn(2, 2, 3, dtype=torch.float64)

    def derivatives(of):
        x, y = values.clone().requires_grad_().unbind()
        first = torch.autograd.grad(loss(of, x, y), (x, y), create_graph=True, allow_unused=True)
        size = sum(grad.square().sum() for grad in first if grad is not None)
        second = torch.autograd.grad(size, (x, y), allow_unused=True)
        tangent = torch.func.jvp(lambda x, y: loss(of, x, y), tuple(values), tuple(values.flip(0)))[1]
        without_graph = torch.autograd.grad(loss(of, x, y), (x, y), allow_unused=True)
        return [t for t in (*first, *second, tangent, *without_graph) if t is not None]

    for mine, wanted in zip(derivatives(ours), derivatives(plain), strict=True):
        torch.testing.assert_close(mine, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_meta_tensors_give_meta_results(dtype):
    h = torch.empty(2, 8, 3, 3, dtype=dtype, device="meta", requires_grad=True)
    mu, logvar = h.chunk(2, dim=1)
    z, kl = GaussianLatent()(h)
    for sample in (z, reparameterize(mu, logvar), reparameterize_kl(mu, logvar, prior_mu=mu[:1])[0]):
        assert (sample.device.type, sample.shape, sample.dtype) == ("meta", mu.shape, dtype)
    assert (kl.device.type, kl.shape, kl.dtype) == ("meta", (2,), torch.promote_types(dtype, torch.float32))
    (grad,) = torch.autograd.grad(z.sum() + kl.sum(), h)
    assert (grad.device.type, grad.shape, grad.dtype) == ("meta", h.shape, dtype)
