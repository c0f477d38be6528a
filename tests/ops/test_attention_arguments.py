"""Arguments of attention: leading dims, masks of any dtype, scales, NaN, subclasses; checkpoints and export."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.utils.checkpoint import checkpoint

import fastgen
from fastgen import reference
from fastgen.functional import reparameterize, reparameterize_kl
from fastgen.functional import scaled_dot_product_attention as attention
from tests.emulator import build

LEADING = [
    ((1, 2), (3, 2)),
    ((3, 1), (3, 2)),
    ((3, 2), (1, 1)),
    ((3, 1), (1, 2)),
    ((), (3, 2)),
    ((2,), (3, 2)),
    ((3, 2), ()),
    ((2, 1, 2), (3, 1)),
    ((4,), (1,)),
]


@pytest.mark.parametrize(("of_query", "of_keys"), LEADING, ids=str)
def test_leading_dims_broadcast_as_torchs_do(of_query, of_keys):
    query = torch.randn(*of_query, 4, 8, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(*of_keys, 5, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for mask in (None, torch.randn(4, 5, dtype=torch.float64), torch.rand(*(of_query or (1,)), 4, 1) > 0.3):
        ours, wanted = attention(query, key, value, mask), formula(query, key, value, mask)
        torch.testing.assert_close(ours, wanted)
        for a, b in zip(
            *(torch.autograd.grad(o.sin().sum(), (query, key, value)) for o in (ours, wanted)), strict=True
        ):
            torch.testing.assert_close(a, b)


def formula(query, key, value, mask=None, scale=None):
    """torch's broadcasting; a fully masked row is 0."""
    scores = query @ key.transpose(-2, -1) * (query.size(-1) ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return reference.softmax_lse(scores)[0] @ value


@pytest.mark.parametrize("of_mask", [(3, 1, 4, 5), (3, 2, 1, 5), (1, 2, 4, 1), (2, 1, 1, 4, 5)], ids=str)
def test_a_mask_may_have_batches_and_heads_that_nothing_else_has(of_mask):
    query, key, value = torch.randn(1, 1, 4, 8), torch.randn(1, 1, 5, 8), torch.randn(1, 1, 5, 8)
    mask = torch.randn(of_mask, requires_grad=True)
    ours, wanted = attention(query, key, value, mask), formula(query, key, value, mask)
    torch.testing.assert_close(ours, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(o.sin().sum(), mask)[0] for o in (ours, wanted)))


@pytest.mark.parametrize("leading", [(), (3,), (2, 3)], ids=str)
def test_grouped_heads_are_the_third_dim_from_the_end_whatever_stands_before(leading):
    query = torch.randn(*leading, 8, 5, 16)
    key, value = torch.randn(*leading, 2, 7, 16), torch.randn(*leading, 2, 7, 12)
    wanted = formula(query, key.repeat_interleave(4, -3), value.repeat_interleave(4, -3))
    torch.testing.assert_close(attention(query, key, value, enable_gqa=True), wanted)
    one = torch.randn(*leading, 1, 7, 12)  # of the values, shared by all
    wanted = formula(query, key.repeat_interleave(4, -3), one)
    torch.testing.assert_close(attention(query, key, one, enable_gqa=True), wanted)


@pytest.mark.parametrize("shape", [(0, 5, 4), (2, 0, 5, 4), (0, 2, 5, 4), (2, 2, 0, 4)], ids=str)
def test_grouped_heads_may_be_none_at_all(shape):
    x = torch.randn(shape, requires_grad=True)
    out = attention(x, x, x, enable_gqa=True)
    assert out.shape == shape
    assert torch.autograd.grad(out.sum(), x)[0].shape == shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_a_mask_keeps_its_precision_in_every_pass(attention_place, dtype, mask_dtype):
    query, key = torch.zeros(1, 1, 3, 16), torch.zeros(1, 1, 8, 16)
    value = torch.eye(8)[None, None]
    bias = (torch.linspace(-99.74, -100.26, 8) if mask_dtype.itemsize > 2 else torch.linspace(-1, 1, 8)).to(mask_dtype)
    bias = bias.expand(1, 1, 3, 8).clone().to(attention_place)
    tensors = [t.to(attention_place, dtype) for t in (query, key, value)]

    def passes(function, mask, tensors):
        leaf = mask.clone().requires_grad_()
        out, lse = function(*tensors, leaf)
        upstream = torch.arange(8.0, device=out.device).to(out.dtype).expand_as(out)
        (first,) = torch.autograd.grad(out, leaf, upstream, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), leaf)
        tangent = torch.func.jvp(lambda m: function(*tensors, m)[0], (mask,), (torch.ones_like(mask).cumsum(-1) / 8,))[
            1
        ]
        return {"out": out, "lse": lse, "gradient": first, "second": second, "tangent": tangent}

    ours = passes(lambda q, k, v, m: attention(q, k, v, m, return_lse=True), bias, tensors)
    exact = passes(lambda q, k, v, m: reference.attention(q, k, v, m), bias.double(), [t.double() for t in tensors])
    assert ours["gradient"].dtype == mask_dtype
    for name, wanted in exact.items():
        torch.testing.assert_close(ours[name].double(), wanted, rtol=0.02, atol=0.02, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("lowest", [torch.finfo(torch.float32).min, -1e9, -1e20], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_that_a_finite_mask_hides_have_the_formulas_weights_and_gradients(dtype, lowest):
    query, key, value = (torch.randn(1, 2, 4, 8).to(dtype) for _ in range(3))
    mask = torch.full((4, 4), lowest)
    mask[:2, :3] = 0

    def results(function, *tensors):
        leaves = [t.detach().clone().requires_grad_() for t in (*tensors, mask)]
        out = function(*leaves)
        upstream = torch.arange(4.0).reshape(4, 1).to(out.dtype).expand_as(out) + 1
        return [out, *torch.autograd.grad(out, leaves, upstream)]

    wanted = results(formula, *(t.float() for t in (query, key, value)))
    for a, b in zip(results(attention, query, key, value), wanted, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=0.02, atol=0.05 if dtype != torch.float32 else 1e-4)


@pytest.mark.parametrize("lowest", [torch.finfo(torch.float32).min, -1e9], ids=str)
def test_kernels_weigh_rows_that_a_finite_mask_hides_evenly_and_their_derivatives_are_finite(emulator, lowest):
    build.register()
    query, key, value = (torch.randn(1, 2, 4, 8) for _ in range(3))
    mask = torch.full((4, 4), lowest)
    mask[:2, :3] = 0
    with fastgen.use_backend("emulated"):
        leaves = [t.requires_grad_() for t in (query, key, value)]
        out = attention(*leaves, mask)
        grads = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)
    torch.testing.assert_close(out, formula(query, key, value, mask))
    assert all(t.isfinite().all() for t in (*grads, *second))


def test_a_mask_of_the_lowest_double_is_not_one_of_minus_infinity():
    query, key, value = (torch.randn(1, 1, 3, 8) for _ in range(3))
    mask = torch.full((3, 3), torch.finfo(torch.float64).min, dtype=torch.float64)
    torch.testing.assert_close(attention(query, key, value, mask), value.mean(-2, keepdim=True).expand_as(value))
    assert (attention(query, key, value, torch.full_like(mask, -math.inf)) == 0).all()


@pytest.mark.parametrize("scale", [-1.0, 0.0, -0.25])
@pytest.mark.parametrize(
    "options", [{"is_causal": True}, {"window": (2, 1)}, {"attn_mask": "bool"}, {"attn_mask": "float"}, {}], ids=str
)
def test_scales_of_zero_and_below_are_as_the_formula_has_them(attention_place, scale, options):
    query, key, value = (torch.randn(2, 2, 20, dim) for dim in (8, 8, 32))
    masks = {"bool": torch.rand(20, 20) > 0.5, "float": torch.randn(20, 20)}
    mask = masks.get(options.get("attn_mask"))
    left, right = options.get("window", (-1, 0 if "is_causal" in options else -1))

    def results(function, tensors):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = function(*leaves)
        grads = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True)
        return [out, *grads, *torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)]

    def ours(q, k, v):
        return attention(q, k, v, **{**options, "attn_mask": None if mask is None else mask.to(q.device)}, scale=scale)

    def exact(q, k, v):
        wide = mask if mask is None or mask.dtype == torch.bool else mask.double()
        return reference.attention(q, k, v, wide, None, left, right, scale)[0]

    got = results(ours, [t.to(attention_place) for t in (query, key, value)])
    for a, b in zip(got, results(exact, [t.double() for t in (query, key, value)]), strict=True):
        torch.testing.assert_close(a.double().cpu(), b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_row_of_nan_stays_nan_for_any_number_of_keys(attention_place, dtype):
    if dtype == torch.float64 and fastgen.current_backend() not in ("torch", "auto"):
        pytest.skip("no kernel")
    for keys in (1, 2, 7, 8, 12, 15, 16, 17):
        for causal in (False, True):
            query = torch.randn(1, 1, 4, 16, dtype=dtype)
            query[0, 0, 1] = math.nan
            key, value = torch.randn(1, 1, keys, 16, dtype=dtype), torch.randn(1, 1, keys, 8, dtype=dtype)
            out = attention(*(t.to(attention_place) for t in (query, key, value)), is_causal=causal)
            assert out[0, 0, 1].isnan().all(), (keys, causal)
            assert out[0, 0, 2:].isfinite().all(), (keys, causal)


@pytest.mark.parametrize("options", [{"window": (10, None)}, {"window": (10, 3)}, {"is_causal": True}, {}], ids=str)
def test_what_a_mask_hides_from_all_may_be_nan_whatever_else_bounds_the_rows(options):
    query, key, value = torch.randn(3, 1, 1, 300, 8).unbind(0)
    mask = torch.ones(1, 1, 1, 300, dtype=torch.bool)
    mask[..., 3] = False
    dirty = [t.clone() for t in (key, value)]
    for t in dirty:
        t[:, :, 3] = math.nan

    def results(key, value):
        leaves = [t.clone().requires_grad_() for t in (query, key, value)]
        out = attention(*leaves, mask, **options)
        grads = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.nan_to_num().square().sum() for g in grads), leaves)
        ones = tuple(torch.ones_like(t) for t in leaves)
        tangent = torch.func.jvp(lambda *t: attention(*t, mask, **options), tuple(t.detach() for t in leaves), ones)[1]
        return [out, tangent, *grads, *second]

    for got, wanted in zip(results(*dirty), results(key, value), strict=True):
        torch.testing.assert_close(got, wanted)


def test_without_a_head_dim_every_key_weighs_the_same():
    query, key, value = torch.randn(1, 2, 3, 0), torch.randn(1, 2, 4, 0), torch.randn(1, 2, 4, 5)
    mask = torch.randn(3, 4)
    for options, weights in (({}, torch.full((3, 4), 0.25)), ({"attn_mask": mask}, mask.softmax(-1))):
        torch.testing.assert_close(attention(query, key, value, **options), (weights @ value).expand(1, 2, 3, 5))
    assert attention(torch.randn(1, 2, 3, 8), torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 0)).shape == (1, 2, 3, 0)


def test_dropout_of_one_drops_everything_and_keeps_the_logsumexp():
    leaves = [torch.randn(1, 2, 4, 8, requires_grad=True) for _ in range(3)]
    out, lse = attention(*leaves, dropout_p=1.0, return_lse=True)
    assert (out == 0).all()
    torch.testing.assert_close(lse, attention(*leaves, return_lse=True)[1])
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), leaves))


@pytest.mark.parametrize("lengths", [(6, 6), (4, 7), (7, 4)], ids=str)
@pytest.mark.filterwarnings("ignore:Lower right causal bias")
def test_a_causal_bias_of_torch_is_understood_and_its_memory_never_read(lengths):
    query, key, value = torch.randn(1, 2, lengths[0], 8), *torch.randn(2, 1, 2, lengths[1], 8).unbind(0)
    for make in (causal_upper_left, causal_lower_right):
        bias = make(*lengths)
        torch.testing.assert_close(attention(query, key, value, bias), formula(query, key, value, bias._materialize()))
        windowed = attention(query, key, value, bias, window=(2, 1))
        torch.testing.assert_close(windowed, attention(query, key, value, bias._materialize(), window=(2, 1)))
        with pytest.raises(ValueError, match="is_causal: expected False beside"):
            attention(query, key, value, bias, is_causal=True)
        with pytest.raises(ValueError, match="attn_mask: expected a CausalBias of the lengths"):
            attention(query, key[:, :, 1:], value[:, :, 1:], bias)


def test_meta_tensors_have_the_shapes_of_results():
    x = torch.empty(2, 2, 4, 8, device="meta", requires_grad=True)
    for backend in ("auto", "torch", "compiled"):
        with fastgen.use_backend(backend):
            out, lse = attention(x, x, x[..., :4], dropout_p=0.1, is_causal=True, return_lse=True)
            assert (out.device.type, out.shape, lse.shape) == ("meta", (2, 2, 4, 4), (2, 2, 4))
            out.sum().backward()
            z, kl = reparameterize_kl(x.flatten(1), x.flatten(1))
            assert (z.shape, kl.shape) == ((2, 64), (2,))


# --------------------------------------------------------------------------------------------------
# Checkpoints and export


def noisy(name):
    query, key = torch.randn(2, 1, 2, 16, 8).unbind(0)
    mu = torch.randn(4, 6)
    return {
        "attention": (lambda x, g: attention(query, key, x, dropout_p=0.5, generator=g), torch.randn(1, 2, 16, 8)),
        "reparameterize": (lambda x, g: reparameterize(mu, x, generator=g), torch.randn(4, 6)),
        "two draws": (
            lambda x, g: reparameterize(reparameterize(mu, x, generator=g), x.sin(), generator=g),
            torch.randn(4, 6),
        ),
    }[name]


@pytest.mark.parametrize("name", ["attention", "reparameterize", "two draws"])
@pytest.mark.parametrize("own", [False, True], ids=["global", "own generator"])
def test_a_checkpoint_draws_the_noise_of_the_forward_pass_again(name, own):
    run, start = noisy(name)
    generator, results = torch.Generator() if own else None, []
    for through in (False, True):
        (generator.manual_seed if own else torch.manual_seed)(1)
        x = start.clone().requires_grad_()
        out = checkpoint(run, x, generator, use_reentrant=False) if through else run(x, generator)
        loss = out.square().sum()
        grads = [torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2)]
        results.append([out.detach(), *grads, torch.rand(1, generator=generator)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("nested", [False, True], ids=["reentrant", "nested"])
def test_a_checkpoint_that_cannot_draw_again_says_so(nested):
    run, start = noisy("reparameterize")
    generator, x = torch.Generator().manual_seed(1), start.clone().requires_grad_()
    if nested:
        inner = lambda x: checkpoint(run, x, generator, use_reentrant=False).sin()  # noqa: E731
        out = checkpoint(inner, x, use_reentrant=False)
    else:
        out = checkpoint(run, x, generator, use_reentrant=True)
    with pytest.raises(RuntimeError, match="generator: expected a call outside of backward passes"):
        out.sum().backward()


@pytest.mark.parametrize("mask", [None, "bool", "learned"])
@pytest.mark.parametrize("kind", ["plain", "windowed"])
def test_an_exported_module_with_attention_has_the_modules_gradients(mask, kind):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.line = torch.nn.Linear(8, 24)
            if mask is not None:
                bias = torch.randn(5, 5)
                self.bias = torch.nn.Parameter(bias) if mask == "learned" else torch.nn.Buffer(bias > 0)

        def forward(self, x):
            q, k, v = self.line(x).view(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
            window = (1, 2) if kind == "windowed" else None
            return attention(q, k, v, getattr(self, "bias", None), window=window).square().sum()

    net, x = Net(), torch.randn(2, 5, 8)
    exported = torch.export.export(net, (x,)).module()
    wanted = torch.autograd.grad(net(x), list(net.parameters()))
    got = torch.autograd.grad(exported(x), list(exported.parameters()))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_operators_called_by_name_under_torch_func_say_what_to_call():
    x = torch.randn(1, 1, 4, 8)
    options = (None, None, None, 0.0, -1, -1, 0.3, 0.0, False)
    with pytest.raises(RuntimeError, match=r"attention_forward: .*torch\.func.*fastgen\.functional"):
        torch.func.grad(lambda x: torch.ops.fastgen.attention_forward(x, x, x, *options)[0].sum())(x)


def test_torchs_function_agrees_where_it_is_right():
    """The arguments mean what they mean there."""
    query, key, value = (torch.randn(2, 4, 6, 8) for _ in range(3))
    for options in ({}, {"is_causal": True}, {"scale": 0.3}, {"attn_mask": torch.rand(6, 6) > 0.2}):
        torch.testing.assert_close(
            attention(query, key, value, **options), F.scaled_dot_product_attention(query, key, value, **options)
        )
