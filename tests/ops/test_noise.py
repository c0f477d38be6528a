"""The random numbers: published vectors, exact uniforms, and the statistics of the normals."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from fastgen import backend, random
from fastgen.functional import reparameterize

# Known answers of Philox4x32-10 from Random123 (kat_vectors): counter, key, output.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def as_int64(low, high):
    value = low | high << 32
    return torch.tensor([value - (1 << 64) if value >> 63 else value])


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN)
def test_philox_gives_the_published_answers(counter, key, output):
    words = random.philox(as_int64(*key), as_int64(*counter[:2]), as_int64(*counter[2:]))
    assert tuple(int(word) for word in words) == output


def test_uniforms_are_in_the_half_open_interval_and_never_zero():
    bits = torch.tensor([0, 1, 2**31, 2**32 - 1])
    uniform = random.to_uniform(bits)
    assert float(uniform[0]) == 2.0**-33
    assert bool(((uniform > 0) & (uniform <= 1)).all())


def test_box_muller_reduces_the_angle_exactly():
    u1 = torch.rand(100_000)
    u0 = torch.rand(100_000).clamp(min=2.0**-33)
    n0, n1 = random.box_muller(u0, u1)
    radius = (-2 * u0.double().log()).sqrt()
    angle = 2 * torch.pi * u1.double()
    for low, high in ((n0, radius * angle.cos()), (n1, radius * angle.sin())):
        assert float(((low - high).abs() / high.abs().clamp(min=1e-6)).max()) < 2e-6


@pytest.fixture
def noise(latent_place):
    """A million normals of the backend under test."""
    zeros = torch.zeros(1000, 1001, device=latent_place)
    generator = torch.Generator(latent_place).manual_seed(20)
    return reparameterize(zeros, zeros, generator=generator).cpu().double()


def test_noise_agrees_with_the_reference_to_a_few_ulp(latent_place):
    zeros = torch.zeros(257, 1003, device=latent_place)
    torch.manual_seed(4)
    sample = reparameterize(zeros, zeros)
    torch.manual_seed(4)
    seed = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=latent_place)
    wanted = random.standard_normal(seed, 257, 1003)
    ulps = (sample - wanted).abs() / (wanted.abs() * torch.finfo(torch.float32).eps)
    assert float(ulps.max()) <= 8


def test_moments_are_those_of_the_standard_normal(noise):
    n = noise.numel()
    assert abs(float(noise.mean())) < 4 / n**0.5
    assert abs(float(noise.var()) - 1) < 4 * (2 / n) ** 0.5
    assert abs(float((noise**3).mean())) < 4 * (15 / n) ** 0.5
    assert abs(float((noise**4).mean()) - 3) < 4 * (96 / n) ** 0.5


def test_kolmogorov_smirnov_accepts_the_normal_distribution(noise):
    assert stats.kstest(noise.flatten()[::7].numpy(), "norm").pvalue > 1e-3


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 1001])
def test_neighbors_are_not_correlated(noise, lag):
    flat = noise.flatten()
    assert abs(float((flat[lag:] * flat[:-lag]).mean())) < 4 / flat.numel() ** 0.5
    squares = flat.square() - 1
    assert abs(float((squares[lag:] * squares[:-lag]).mean())) < 4 * 2 / flat.numel() ** 0.5


def test_seeds_streams_and_rows_are_independent():
    draws = [random.standard_normal(torch.tensor([seed]), 200, 500).double() for seed in (0, 1, 2**32, 2**62)]
    for i, a in enumerate(draws):
        for b in draws[:i]:
            assert abs(float((a * b).mean())) < 4 / a.numel() ** 0.5
    rows = draws[0] @ draws[0].T / 500
    assert float((rows - torch.eye(200)).abs().max()) < 6 * (2 / 500) ** 0.5


def test_rows_begin_on_group_boundaries_so_that_a_longer_row_begins_alike():
    seed = torch.tensor([9])
    first = random.standard_normal(seed, 1, 5)
    assert torch.equal(first, random.standard_normal(seed, 1, 1000)[:, :5])


def test_a_number_has_the_same_bits_wherever_it_is_in_a_call(latent_place):
    whole = torch.zeros(1, 1000, device=latent_place)
    for seed in range(20):
        samples = []
        for part in (whole, whole[:, :28]):  # in whole vectors, and in what is left
            torch.manual_seed(seed)
            samples.append(reparameterize(part, part))
        assert torch.equal(samples[0][:, :28], samples[1])


def test_dropout_keeps_the_wanted_share_and_uses_its_own_stream():
    seed = torch.tensor([3])
    uniform = random.uniform_rows(seed, torch.arange(1000), 1000, 250, 0, 250)
    for p in (0.1, 0.5, 0.9):
        share = float((uniform >= p).double().mean())
        assert abs(share - (1 - p)) < 4 * (p * (1 - p) / uniform.numel()) ** 0.5
    part = random.uniform_rows(seed, torch.tensor([7, 2]), 1000, 250, 11, 3)
    assert torch.equal(part, uniform[[7, 2], 44:56])


@pytest.mark.skipif(
    not backend.has_kernel("cpu_dropout_keep", torch.device("cpu")), reason="the CPU library was not built"
)
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("keys", [1, 4, 37, 5000])
def test_the_compiled_dropout_mask_has_the_same_bits(keys, p):
    first, last = keys // 3, keys - keys // 5
    sizes = (14, 1, 3, 2, 7, 2, 4, keys, first, last, p)
    seed = torch.randint(-(2**63), 2**63 - 1, (4,))
    ours = torch.ops.fastgen.cpu_dropout_keep(seed, *sizes)
    plain = torch.ops.fastgen_torch.cpu_dropout_keep(seed, *sizes)
    assert torch.equal(ours, plain)
    rows = torch.arange(4 * 14)
    groups = random.groups_per_row(keys)
    uniform = random.uniform_rows(seed, rows, 14, groups, 0, groups).reshape(4, 2, 7, -1)
    assert torch.equal(ours > 0, (uniform >= p)[1:, :, 2:6, first:last])


@pytest.mark.skipif(
    not backend.has_kernel("cpu_dropout_keep", torch.device("cpu")), reason="the CPU library was not built"
)
def test_the_compiled_dropout_mask_has_the_same_bits_where_the_counter_passes_32_bits():
    keys = 12000
    row = 2**32 // (keys // 4)  # some of its counters are below 2^32, and some not
    sizes = (row + 1, 0, 1, 1, row + 1, row, 1, keys, 0, keys, 0.5)
    seed = torch.randint(-(2**63), 2**63 - 1, (1,))
    assert torch.equal(
        torch.ops.fastgen.cpu_dropout_keep(seed, *sizes), torch.ops.fastgen_torch.cpu_dropout_keep(seed, *sizes)
    )


@pytest.mark.skipif(
    not backend.has_kernel("cpu_dropout_keep", torch.device("cpu")), reason="the CPU library was not built"
)
def test_the_compiled_dropout_mask_refuses_ranges_outside_the_problem():
    seed = torch.tensor([1])
    for sizes in [(6, 0, 2, 2, 3, 0, 3, 8, 0, 8), (12, 0, 2, 2, 3, 1, 3, 8, 0, 8), (12, 0, 2, 2, 3, 0, 3, 8, 0, 9)]:
        with pytest.raises(RuntimeError, match="expected ranges within the problem"):
            torch.ops.fastgen.cpu_dropout_keep(seed, *sizes, 0.1)
