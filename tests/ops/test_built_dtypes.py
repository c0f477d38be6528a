"""Libraries that FASTGEN_DTYPES builds for some dtypes, in the emulator."""

from __future__ import annotations

import pytest
import torch

import fastgen
from fastgen.functional import multi_head_projection, reparameterize_kl, scaled_dot_product_attention
from tests.emulator import build


def attention(x):
    return scaled_dot_product_attention(x[None], x[None], x[None])


def projection(x):
    return multi_head_projection(x, x[0, :16, :], num_heads=2)


def latent(x):
    z, kl = reparameterize_kl(x, x, generator=torch.Generator().manual_seed(1))
    return z + kl.reshape(-1, 1, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("call", "argument"), [(attention, "query"), (projection, "x"), (latent, "mu")])
def test_a_library_of_one_dtype_gives_the_same_numbers_and_refuses_other_dtypes(call, argument, emulator):
    build.register()
    one = build.register_dtype("bfloat16")
    x = torch.randn(2, 24, 16)

    def run(backend, dtype):
        values = x.to(dtype, copy=True).requires_grad_()
        with fastgen.use_backend(backend):
            out = call(values)
            out.float().sum().backward()
        return out.detach(), values.grad

    for mine, wanted in zip(run(one, torch.bfloat16), run("emulated", torch.bfloat16), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=0)
    for dtype, name in ((torch.float32, "Float"), (torch.float16, "Half")):
        message = rf"{argument}: expected a dtype that this library was built for \(FASTGEN_DTYPES\), got {name}"
        with pytest.raises(RuntimeError, match=message):
            run(one, dtype)
