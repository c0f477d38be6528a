"""The short way to the operators, on a GPU or of a forced backend: it serves what it should, and gives what the general
path gives."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

import fastgen
from fastgen import backend, functional
from fastgen.functional import attention as attention_module
from fastgen.functional import latent as latent_module
from fastgen.functional import projection as projection_module
from fastgen.ops.projection import operator_path, plan
from tests.conftest import DEVICES, place_or_skip

CALLS = {
    "plain": {},
    "causal": {"is_causal": True},
    "scaled": {"scale": 0.3},
    "boolean": {"attn_mask": (2, 1, 5, 7)},
    "float": {"attn_mask": (1, 3, 5, 7)},
    "padding": {"attn_mask": (2, 1, 1, 7)},
    "grouped": {"enable_gqa": True},
    "dropout": {"dropout_p": 0.5},
    "logsumexp": {"return_lse": True},
}

PLACES = [place for place in (("torch", "cpu"), ("emulated", "cpu"), ("auto", "cuda")) if place[1] in DEVICES]


@pytest.fixture(params=PLACES, ids=lambda place: "-".join(place))
def place(request):
    name, device = request.param
    where = place_or_skip(name, device, "attention_forward")
    if name == "emulated":
        request.getfixturevalue("emulator")
    with fastgen.use_backend(name):
        yield where


@pytest.fixture
def only_operators(monkeypatch):
    """The general path raises."""

    def refuse(*arguments, **options):
        raise AssertionError("the general path was taken")

    monkeypatch.setattr(attention_module, "attention", refuse)
    monkeypatch.setattr(projection_module, "projection", refuse)
    monkeypatch.setattr(projection_module, "merge_heads", refuse)
    monkeypatch.setattr(latent_module, "gaussian_latent", refuse)


@pytest.fixture
def general(monkeypatch):
    """Runs a call without the short way."""

    def run(call):
        with monkeypatch.context() as patch:
            patch.setattr(attention_module.operator_path, "namespace_for", lambda *arguments: None)
            patch.setattr(projection_module.operator_path, "to_heads", lambda *arguments: None)
            patch.setattr(projection_module.operator_path, "from_heads", lambda *arguments: None)
            patch.setattr(latent_module.operator_path, "takes", lambda *arguments: False)
            return call()

    return run


def inputs(name, device):
    generator = torch.Generator().manual_seed(0)
    heads = 1 if name == "grouped" else 3
    sizes = ((3, 5), (heads, 7), (heads, 7))
    leaves = [torch.randn(2, h, n, 8, generator=generator).to(device).requires_grad_() for h, n in sizes]
    options = dict(CALLS[name])
    if "attn_mask" in options:
        mask = torch.randn(options["attn_mask"], generator=generator).to(device)
        options["attn_mask"] = mask if name == "float" else mask > -0.4
        if name == "float":
            leaves.append(mask.requires_grad_())
    return leaves, options


def attend(leaves, options):
    torch.manual_seed(3)
    results = functional.scaled_dot_product_attention(*leaves[:3], **options)
    return results if isinstance(results, tuple) else (results,)


@pytest.mark.parametrize("name", CALLS)
def test_common_calls_of_attention_take_the_operators(place, only_operators, name):
    leaves, options = inputs(name, place)
    with torch.no_grad():
        attend(leaves, options)
    sum(result.sum() for result in attend(leaves, options)).backward()
    assert all(leaf.grad is not None for leaf in leaves)


@pytest.mark.parametrize("name", CALLS)
def test_results_and_derivatives_of_attention_are_the_general_ones(place, general, name):
    leaves, options = inputs(name, place)

    def call():
        with torch.no_grad():
            plain = attend(leaves, options)
        results = attend(leaves, options)
        total = sum(result.sin().sum() for result in results)
        first = torch.autograd.grad(total, leaves, retain_graph=True)
        again = torch.autograd.grad(total, leaves, create_graph=True)
        second = torch.autograd.grad(sum(grad.square().sum() for grad in again), leaves)
        return [*plain, *results, *first, *again, *second]

    for a, b in zip(call(), general(call), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("wanted", range(4))
def test_one_argument_may_need_the_gradient(place, wanted):
    leaves, options = inputs("float", place)
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i == wanted)
    attend(leaves, options)[0].sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == [i == wanted for i in range(4)]


def test_a_gradient_of_the_logsumexp_alone(place, general):
    leaves, options = inputs("logsumexp", place)
    results = [run(lambda: torch.autograd.grad(attend(leaves, options)[1].sin().sum(), leaves[:2])) for run in (
        lambda call: call(), general
    )]  # fmt: skip
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_what_is_not_common_takes_the_general_path(only_operators):
    leaves, _ = inputs("plain", "cpu")
    query, key, value = (leaf.detach() for leaf in leaves)
    call = functional.scaled_dot_product_attention

    def autocast():
        with torch.autocast("cpu"):
            call(query, key, value)

    def dual():
        with forward_ad.dual_level():
            call(forward_ad.make_dual(query, query), key, value)

    runs = [
        autocast,
        dual,
        lambda: torch.vmap(call)(query, key, value),
        lambda: torch.func.grad(lambda q: call(q, key, value).sum())(query),
        lambda: call(query, key, value, window=(1, 1)),
        lambda: call(query, key, value, softcap=2.0),
        lambda: call(query, key[:, :1], value),
        lambda: call(query[0], key[0], value[0]),
        lambda: call(query, key, value, torch.zeros(5, 7)),
        lambda: call(query, key, value, dropout_p=1.0),
        lambda: call(query.transpose(2, 3), key.transpose(2, 3)[..., :5], value[:, :, :8].transpose(2, 3)[..., :7]),
        lambda: call(query[:, :, :0], key, value),
        lambda: call(*(t.repeat(1, 1, 1, 65) for t in (query, key, value))),
    ]
    with fastgen.use_backend("torch"):
        for i, run in enumerate(runs):
            with pytest.raises((AssertionError, ValueError)) as error:
                run()
            assert "general path" in str(error.value) or i == 10, i


def test_errors_are_the_general_ones():
    leaves, _ = inputs("plain", "cpu")
    query, key, value = (leaf.detach() for leaf in leaves)
    with fastgen.use_backend("torch"):
        with pytest.raises(TypeError, match=r"key: .*float32.*float64"):
            functional.scaled_dot_product_attention(query, key.double(), value)
        with pytest.raises(ValueError, match="enable_gqa"):
            functional.scaled_dot_product_attention(query, key[:, :2], value[:, :2])
        with pytest.raises(ValueError, match="dropout_p"):
            functional.scaled_dot_product_attention(query, key, value, dropout_p=1.5)
    with fastgen.use_backend("compiled"), pytest.raises(RuntimeError, match="'compiled' was requested"):
        functional.scaled_dot_product_attention(query, key, value)


ESCAPED = {
    "attention": ((2, 3, 5, 8), lambda kept, leaf: functional.scaled_dot_product_attention(leaf, kept, leaf)),
    "qkv_projection": (
        (2, 24, 8),
        lambda kept, leaf: functional.qkv_projection(kept, leaf[0], heads=(1, 1, 1), head_dims=(8, 8, 8))[0],
    ),
    "reparameterize_kl": ((4, 8), lambda kept, leaf: functional.reparameterize_kl(kept, leaf)[1]),
}


@pytest.mark.parametrize("name", ESCAPED)
def test_a_tensor_of_an_ended_transform_is_a_plain_one(place, name):
    """Its gradient is that of the tensor inside."""
    shape, call = ESCAPED[name]
    kept = []
    value, leaf = (torch.randn(shape, device=place, requires_grad=True) for _ in range(2))
    torch.func.grad(lambda x: (kept.append(x), x.sum())[1])(value)
    results = []
    for given in (kept[0], value):
        torch.manual_seed(2)
        results += [torch.autograd.grad(call(given, leaf).sin().sum(), [leaf, value])]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


PROJECTIONS = {
    "qkv": (lambda x, w, b: functional.qkv_projection(x, w, b, heads=[2, 1, 1], head_dims=[8, 8, 16]), (3, 5, 8), 40),
    "heads": (lambda x, w, b: functional.multi_head_projection(x, w, b, num_heads=5), (3, 5, 8), 40),
    "merge": (lambda x, w, b: functional.merge_heads_projection(x, w, b), (3, 2, 5, 8), 24),
    "merge, residual": (
        lambda x, w, b: functional.merge_heads_projection(x, w, b, residual=b.detach().expand(3, 5, 24)),
        (3, 2, 5, 8),
        24,
    ),
}


@pytest.fixture
def emulated(request):
    place_or_skip("emulated", "cpu", "")
    request.getfixturevalue("emulator")
    with fastgen.use_backend("emulated"):
        yield


@pytest.mark.parametrize("name", PROJECTIONS)
def test_projections_take_the_operators_and_give_the_general_results(emulated, general, monkeypatch, name):
    call, shape, rows = PROJECTIONS[name]
    inputs_of = shape[-1] * (shape[1] if len(shape) == 4 else 1)
    leaves = [torch.randn(s).requires_grad_() for s in (shape, (rows, inputs_of), (rows,))]

    def run():
        with torch.no_grad():
            plain = call(*leaves)
        parts = call(*leaves)
        plain, parts = (p if isinstance(p, tuple) else (p,) for p in (plain, parts))
        total = sum(part.sin().sum() for part in parts)
        first = torch.autograd.grad(total, leaves, retain_graph=True)
        again = torch.autograd.grad(total, leaves, create_graph=True)
        return [*plain, *parts, *first, *again, *torch.autograd.grad(sum(g.square().sum() for g in again), leaves)]

    wanted = general(run)
    monkeypatch.setattr(projection_module, "projection", None)
    monkeypatch.setattr(projection_module, "merge_heads", None)
    for a, b in zip(run(), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_heads_that_a_kernel_reads_are_not_copied_first(emulated):
    x, weight = torch.randn(2, 3, 5, 8), torch.randn(8, 24)
    for gate in (None, torch.ones(8)):
        with torch.profiler.profile() as profile:
            functional.merge_heads_projection(x, weight, gate=gate)
        assert not {"aten::clone", "aten::copy_"} & {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("major", [8, 9, 12, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_choice_beside_cublas_is_that_of_the_plan(dtype, major, tf32):
    for tokens, channels in ((64, 64), (65536, 32), (8192, 1152), (4096, 4096)):
        problem = plan.heads_problem(tokens, channels, [(8, 64)] * 3, 0, 0, dtype.itemsize, tf32)
        wanted = major is not None and plan.estimate(problem, major).takes_library
        found = operator_path._choice_for_heads(tokens, channels, (8, 8, 8), (64, 64, 64), dtype, tf32, major)
        assert found == (None, wanted)
        problem = plan.merge_problem(tokens, channels, 64, dtype.itemsize, tf32, bias=True)
        wanted = major is not None and plan.estimate(problem, major).takes_library
        found = operator_path._choice_for_merge(tokens, 8, channels, 64, dtype, tf32, major, True, False)
        assert found == (None, wanted)
    refused, _ = operator_path._choice_for_heads(64, 63, (8,), (64,), dtype, tf32, major)
    assert "multiples" in refused


@pytest.mark.parametrize("with_kl", [False, True])
def test_latents_take_the_operators_and_give_the_general_results(place, general, only_operators, monkeypatch, with_kl):
    leaves = [torch.randn(4, 6, device=place).requires_grad_() for _ in range(2)]
    call = functional.reparameterize_kl if with_kl else functional.reparameterize

    def run():
        torch.manual_seed(1)
        with torch.no_grad():
            plain = call(*leaves)
        results = call(*leaves)
        plain, results = (r if isinstance(r, tuple) else (r,) for r in (plain, results))
        total = sum(part.sin().sum() for part in results)
        first = torch.autograd.grad(total, leaves, retain_graph=True)
        again = torch.autograd.grad(total, leaves, create_graph=True)
        return [*plain, *results, *first, *again, *torch.autograd.grad(sum(g.square().sum() for g in again), leaves)]

    found = run()
    monkeypatch.undo()
    with fastgen.use_backend(backend.current_backend()):
        for a, b in zip(found, general(run), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("backend_name", ["auto", "torch"])
@pytest.mark.parametrize("position", [1, 2])
def test_nested_tensors_of_the_old_layout_are_named(position, backend_name):
    tensors = [torch.randn(2, 3, 5, 8) for _ in range(3)]
    name = ("query", "key", "value")[position]
    tensors[position] = torch.nested.nested_tensor([torch.randn(3, n, 8) for n in (5, 4)])
    with fastgen.use_backend(backend_name):
        with pytest.raises(TypeError, match=f"{name}: expected a dense"):
            functional.scaled_dot_product_attention(*tensors)
        nested = torch.nested.nested_tensor([torch.randn(n, 8) for n in (5, 4)])
        with pytest.raises(TypeError, match="x: expected a dense"):
            functional.qkv_projection(nested, torch.randn(24, 8), heads=(1, 1, 1), head_dims=(8, 8, 8))
        with pytest.raises(TypeError, match="mu: expected a dense"):
            functional.reparameterize_kl(nested, nested)
