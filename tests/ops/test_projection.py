"""Multi-head projections: values, layouts, derivatives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from benchmarks.shapes import PROJECTION_SHAPES
from fastgen import reference
from fastgen.functional import merge_heads_projection, multi_head_projection, qkv_projection, rotary_embedding
from fastgen.testing import assert_accurate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def with_gradients(function, leaves):
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    torch.manual_seed(3)
    upstream = [torch.randn(o.shape, dtype=torch.float64).to(torch.bfloat16).to(o) for o in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]


def check(ours, plain, leaves):
    results, peers = with_gradients(ours, leaves), with_gradients(plain, leaves)
    exact = with_gradients(plain, [t.double() for t in leaves])
    for a, b, c in zip(results, peers, exact, strict=True):
        assert a.dtype == leaves[0].dtype
        # One number that sums every element of the result: their roundings add up, and cancel by chance in the peer's.
        allowance = 4 * torch.finfo(a.dtype).eps * results[0].numel() ** 0.5 if a.numel() == 1 else 0.0
        assert_accurate(a, b, c, allowance=allowance)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("channels_first", [False, True], ids=["tokens", "feature map"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROJECTION_SHAPES)
def test_qkv_projection_is_a_linear_map_split_into_heads(name, dtype, channels_first, bias, device):
    batch, length, channels, heads, dims = PROJECTION_SHAPES[name]
    length = 8 if channels > 1000 and dtype != torch.float32 else length  # half precision is slow on CPU
    rows = sum(h * d for h, d in zip(heads, dims, strict=True))
    x = torch.randn(batch, channels, length, 1) if channels_first else torch.randn(batch, length, channels)
    leaves = [x, torch.randn(rows, channels) / channels**0.5] + ([torch.randn(rows)] if bias else [])
    leaves = [t.to(device, dtype) for t in leaves]

    def ours(x, weight, bias=None):
        return qkv_projection(x, weight, bias, heads=heads, head_dims=dims, channels_first=channels_first)

    def plain(x, weight, bias=None):
        tokens = x.flatten(2).transpose(1, 2) if channels_first else x
        return reference.split_heads(F.linear(tokens, weight, bias), list(heads), list(dims))

    check(ours, plain, leaves)
    for part, h, d in zip(ours(*leaves), heads, dims, strict=True):
        assert part.shape == (batch, h, length, d)
        assert part.stride(-1) == 1


def test_multi_head_projection_is_one_part_of_it():
    x, weight, bias = torch.randn(2, 5, 6), torch.randn(8, 6), torch.randn(8)
    wanted = F.linear(x, weight, bias).unflatten(-1, (4, 2)).transpose(1, 2)
    torch.testing.assert_close(multi_head_projection(x, weight, bias, num_heads=4), wanted)


def tables(length, half, batch=None):
    angles = torch.rand(*([] if batch is None else [batch]), length, half) * 6
    return angles.cos(), angles.sin()


def rotate(x, cos, sin, interleaved):
    """Rotary embedding as a product of complex numbers."""
    half = cos.size(-1)
    pairs = x[..., : 2 * half].unflatten(-1, (half, 2) if interleaved else (2, half))
    pairs = pairs if interleaved else pairs.transpose(-1, -2)
    rotated = torch.view_as_complex(pairs.contiguous()) * torch.complex(cos.to(x), sin.to(x)).unsqueeze(-3)
    rotated = torch.view_as_real(rotated)
    rotated = (rotated if interleaved else rotated.transpose(-1, -2)).flatten(-2)
    return torch.cat((rotated, x[..., 2 * half :]), -1)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("batched", [False, True], ids=["shared", "batched"])
@pytest.mark.parametrize("width", [2, 6, 8])
def test_rotary_embedding_turns_pairs(width, batched, interleaved, device):
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64, device=device)
    cos, sin = (t.double().to(device) for t in tables(5, width // 2, 2 if batched else None))
    torch.testing.assert_close(
        rotary_embedding(x, cos, sin, interleaved=interleaved), rotate(x, cos, sin, interleaved), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("epilogue", ["norms", "rotary", "both", "batched", "query alone"])
@pytest.mark.parametrize("channels_first", [False, True], ids=["tokens", "feature map"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_and_rotary_of_heads(dtype, channels_first, epilogue, device):
    batch, length, channels, heads, dims = 2, 12, 16, (4, 2, 2), (8, 8, 16)
    x = torch.randn(batch, channels, 3, 4) if channels_first else torch.randn(batch, length, channels)
    count = {"rotary": 0, "query alone": 1}.get(epilogue, 2)
    leaves = [x, torch.randn(80, channels) / 4, torch.randn(80), *(1 + 0.3 * torch.randn(8) for _ in range(count))]
    leaves = [t.to(device, dtype) for t in leaves]
    rotated = 1 if epilogue == "query alone" else 2
    rotary = None
    if epilogue != "norms":
        rotary = tuple(t.to(device) for t in tables(length, 3, batch if epilogue == "batched" else None))

    def ours(x, weight, bias, *norms):
        options = {"norms": norms, "rotary": rotary, "rotated": rotated, "interleaved": True}
        return qkv_projection(x, weight, bias, heads=heads, head_dims=dims, channels_first=channels_first, **options)

    def plain(x, weight, bias, *norms):
        tokens = x.flatten(2).transpose(1, 2) if channels_first else x
        parts = list(reference.split_heads(F.linear(tokens, weight, bias), list(heads), list(dims)))
        for i, norm in enumerate(norms):
            parts[i] = F.rms_norm(parts[i], (8,), norm, 1e-6)
        for i in range(rotated if rotary is not None else 0):
            parts[i] = rotate(parts[i].float() if parts[i].dtype.itemsize < 4 else parts[i], *rotary, True).to(x.dtype)
        return parts

    check(ours, plain, leaves)


def test_tables_that_want_a_gradient_get_one():
    leaves = [t.double().requires_grad_() for t in (torch.randn(1, 3, 4), torch.randn(8, 4), *tables(3, 1))]

    def rotated(x, weight, cos, sin):
        return multi_head_projection(x, weight, num_heads=2, rotary=(cos, sin))

    assert gradcheck(rotated, leaves, check_forward_ad=True)
    assert gradgradcheck(rotated, leaves, fast_mode=True)


@pytest.mark.parametrize("channels_first", [False, True], ids=["tokens", "feature map"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tables_written_to_before_the_backward_pass_are_noticed(dtype, channels_first, device):
    x, weight = torch.randn(2, 4, 4, dtype=dtype, device=device), torch.randn(8, 4, dtype=dtype, device=device)
    cos, sin = (t.to(device, dtype) for t in tables(4, 1))
    options = {"num_heads": 2, "rotary": (cos, sin), "channels_first": channels_first}
    y = multi_head_projection(x.requires_grad_(), weight, **options)
    sin.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_tokens_that_lie_length_first_are_projected_in_place():
    x, weight = torch.randn(50, 4, 16).transpose(0, 1), torch.randn(24, 16)
    plain = F.linear(x, weight).unflatten(-1, (3, 8)).transpose(1, 2)
    heads = multi_head_projection(x, weight, num_heads=3)
    torch.testing.assert_close(heads, plain)
    assert heads.permute(2, 0, 1, 3).is_contiguous()


GATES = {"none": None, "one": (1,), "scalar": (), "channel": "E", "batch": "BE", "batch row": "B1E"}


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "plain"])
@pytest.mark.parametrize("channels_first", [False, True], ids=["tokens", "feature map"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merge_heads_joins_projects_gates_and_adds(dtype, channels_first, residual, gate, device):
    batch, heads, dim, channels, height, width = 2, 3, 8, 10, 4, 5
    x = torch.randn(batch, heads, height * width, dim)
    leaves = [x, torch.randn(channels, heads * dim) / 5, torch.randn(channels)]
    shape = (batch, channels, height, width) if channels_first else (batch, height * width, channels)
    sizes = {"E": (channels,), "BE": (batch, channels), "B1E": (batch, 1, channels)}
    gate_shape = sizes.get(GATES[gate], GATES[gate]) if gate != "none" else None
    if gate_shape is not None:
        leaves.append(torch.randn(gate_shape))
    if residual:
        leaves.append(torch.randn(shape))
    leaves = [t.to(device, dtype) for t in leaves]

    def split(rest):
        rest = list(rest)
        own_gate = rest.pop(0) if gate_shape is not None else None
        return own_gate, rest.pop(0) if rest else None

    def ours(x, weight, bias, *rest):
        own_gate, base = split(rest)
        y = merge_heads_projection(x, weight, bias, residual=base, gate=own_gate, channels_first=channels_first)
        return y.reshape(shape)

    def plain(x, weight, bias, *rest):
        own_gate, base = split(rest)
        y = F.linear(reference.join_heads(x), weight, bias)
        if own_gate is not None:
            y = y * (own_gate.unsqueeze(1) if own_gate.dim() == 2 else own_gate)
        y = y.transpose(1, 2).reshape(shape) if channels_first else y
        return y if base is None else base + y

    check(ours, plain, leaves)


@pytest.mark.parametrize("channels_first", [False, True], ids=["tokens", "feature map"])
def test_derivatives_of_first_and_second_order_in_both_modes(channels_first):
    x = torch.randn(2, 3, 2, 2) if channels_first else torch.randn(2, 4, 3)
    leaves = [t.double().requires_grad_() for t in (x, torch.randn(9, 3), torch.randn(9))]

    def project(*t):
        return qkv_projection(*t, heads=(2, 1, 1), head_dims=(2, 2, 3), channels_first=channels_first)

    assert gradcheck(project, leaves, check_forward_ad=True)
    assert gradgradcheck(project, leaves, check_fwd_over_rev=True, fast_mode=True)
    norms = [torch.randn(2).double().requires_grad_() for _ in range(2)]
    rotary = tuple(t.double() for t in tables(4, 1))

    def finished(x, weight, bias, *norms):
        options = {"channels_first": channels_first, "norms": norms, "rotary": rotary}
        return qkv_projection(x, weight, bias, heads=(2, 1, 1), head_dims=(2, 2, 3), **options)

    assert gradcheck(finished, [*leaves, *norms], check_forward_ad=True)
    assert gradgradcheck(finished, [*leaves, *norms], check_fwd_over_rev=True, fast_mode=True)
    shape = (2, 5, 2, 2) if channels_first else (2, 4, 5)
    for gate in ((1,), (5,), (2, 5)):
        parts = (torch.randn(2, 3, 4, 2), torch.randn(5, 6), torch.randn(5), torch.randn(shape), torch.randn(gate))
        leaves = [t.double().requires_grad_() for t in parts]

        def merge(x, weight, bias, residual, gate):
            return merge_heads_projection(x, weight, bias, residual=residual, gate=gate, channels_first=channels_first)

        assert gradcheck(merge, leaves, check_forward_ad=True)
        assert gradgradcheck(merge, leaves, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize(("batch", "length"), [(0, 3), (2, 0)])
def test_nothing_in_gives_nothing_out_and_zero_weight_gradients(batch, length):
    x, weight = torch.randn(batch, length, 6, requires_grad=True), torch.randn(8, 6, requires_grad=True)
    y = multi_head_projection(x, weight, num_heads=2)
    out, gate = torch.randn(5, 8, requires_grad=True), torch.randn(1, requires_grad=True)
    merged = merge_heads_projection(y, out, gate=gate)
    assert y.shape == (batch, 2, length, 4)
    assert merged.shape == (batch, length, 5)
    merged.sum().backward()
    assert all(bool((leaf.grad == 0).all()) for leaf in (weight, out, gate))


def test_autocast_keeps_a_float32_residual_stream():
    x, weight, base, gate = torch.randn(2, 4, 6, 8), torch.randn(5, 32), torch.randn(2, 6, 5), torch.randn(1)
    with torch.autocast("cpu", torch.bfloat16):
        assert multi_head_projection(base, torch.randn(8, 5), num_heads=2).dtype == torch.bfloat16
        assert merge_heads_projection(x, weight).dtype == torch.bfloat16
        out = merge_heads_projection(x, weight, residual=base, gate=gate)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, merge_heads_projection(x, weight, residual=base, gate=gate), rtol=0.05, atol=0.2)


def test_a_feature_map_is_read_without_a_permuted_copy():
    x, weight = torch.randn(2, 64, 32, 32), torch.randn(64, 64)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        multi_head_projection(x, weight, num_heads=4, channels_first=True)
    allocated = sum(e.self_cpu_memory_usage for e in profile.key_averages() if e.self_cpu_memory_usage > 0)
    assert allocated <= 1.1 * x.numel() * 4, "the output alone"


@pytest.mark.parametrize("mapped", [(0, None), (None, 0), (0, 0)], ids=str)
def test_vmap_over_inputs_and_over_weights(mapped):
    x, weight = torch.randn(3, 2, 5, 6), torch.randn(3, 8, 6)
    arguments = [t if dim == 0 else t[0] for t, dim in zip((x, weight), mapped, strict=True)]

    def loss(x, weight):
        return multi_head_projection(x, weight, num_heads=2).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=mapped)(*arguments)
    for i in range(3):
        own = [t[i] if dim == 0 else t for t, dim in zip(arguments, mapped, strict=True)]
        for a, b in zip(grads, torch.func.grad(loss, argnums=(0, 1))(*own), strict=True):
            torch.testing.assert_close(a[i], b)
