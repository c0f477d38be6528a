"""Every public function and module, in every way of taking second derivatives: correct, or an error, never wrong.

The oracle is the same thing written in plain PyTorch and differentiated by autograd, in float64.
"""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgen import functional, losses, models, nn
from tests.ops.derivative_cases import CASES, PENALTIES, B, D, H, N, attention_case, normal, plain_attention, scalar
from tests.ops.derivative_ways import (
    WAYS,
    double_backward,
    dual_numbers,
    forward_over_forward,
    grad_of_grad,
    third,
    weighted,
)

pytestmark = pytest.mark.usefixtures("second_order_operators")

RANDOM = ("scaled_dot_product_attention, dropout", "reparameterize", "reparameterize_kl", "GaussianLatent")
ATTENTION = (
    "varlen_attention",
    "scaled_dot_product_attention",
    "AttentionBlock2d",
    "MultiheadAttention",
    "SelfAttention2d",
    "Transformer",
    "WindowAttention2d",
)
"""Layers that call attention, which refuse the same derivatives."""
ANYTHING = ""
"""A model may contain operations that PyTorch refuses to differentiate, and a penalty is itself a gradient."""


def refusal(name, way):
    """The error of an unsupported derivative; None for a supported one."""
    if name in PENALTIES or name == "DCGAN":
        return None if way == "double backward" else ANYTHING
    if name in ("ConvVAE", "TransformerLM"):
        return None if way in ("forward", "double backward", "torch.func.grad of grad") else ANYTHING
    if name == "KVCache":  # written in place, for inference
        return ANYTHING
    if name == "AttentionBlock2d" and way == "dual numbers over reverse":
        return "forward AD with aten::native_group_norm_backward"
    if way == "compiled with AOTAutograd":
        return "does not currently support double backward|appears to not have been used in the graph"
    if name.startswith(("LSTM", "GRU")) and way == "compiled grad of grad":
        # torch.compile leaves recurrent layers out of its graphs, torch's too, and fails at a gap inside a transform.
        return "torch_dynamo_resume_in"
    if way == "hessian" and name in RANDOM:
        return "vmap: called random operation while in randomness error mode"
    if name == "varlen_attention" and way == "forward of compiled":  # reads where sequences begin
        return "when making fake tensor call"
    if name == "scaled_dot_product_attention_jvp":  # itself a derivative
        return "attention: (expected first or second derivatives, got a third one|forward mode over forward mode)"
    if name.startswith(ATTENTION):
        if way == "forward over forward":
            return "attention: forward mode over forward mode is not supported"
        if way in ("third", "reverse within dual numbers"):
            return "attention: expected first or second derivatives, got a third one"
    return None


COMPILED = [way for way in WAYS if "compiled" in way]
"""They take a second each, the others a fiftieth."""
STACKS = ("TransformerEncoder", "TransformerDecoder", "Transformer", "TransformerLM")
EVERY_COMPILED_WAY = (
    "scaled_dot_product_attention",
    "varlen_attention",
    "qkv_projection",
    "qkv_projection, norms and rotary",
    "rotary_embedding",
    "merge_heads_projection",
    "reparameterize_kl",
    "discriminator_loss",
    "gradient_penalty",
)
"""What is compiled elsewhere in the table consists of these functions, with other options."""


def quick_ways(name):
    """The compiled ways in the quick run: of layers and models one, without AOTAutograd, which has no double backward;
    of functions that resemble another one two in turn.

    Of stacks, none: compiled one by one they cost minutes, and they are made of layers that stand in the table.
    """
    if name in EVERY_COMPILED_WAY:
        return COMPILED
    if name in STACKS:
        return []
    if name.split(",")[0] in (*nn.__all__, "ConvVAE", "DCGAN"):
        return ["compiled without AOTAutograd"]
    # Forward mode of compiled code compiles the functions below one by one: up to ten seconds.
    others = [way for way in COMPILED if way != "forward of compiled"]
    first = 2 * list(CASES).index(name)
    return [others[(first + i) % len(others)] for i in range(2)]


def cell(name, way):
    slow = way in COMPILED and way not in quick_ways(name)
    return pytest.param(name, way, id=f"{name}-{way}", marks=[pytest.mark.slow] if slow else [])


REFUSALS = []
"""Kept, since guards of dispatch modes that hang on them would set back old modes when they go, in some later test."""


@pytest.mark.parametrize(("name", "way"), [cell(name, way) for name in CASES for way in WAYS])
def test_a_derivative_is_right_or_raises(name, way):
    torch.manual_seed(2)
    ours, plain, x = CASES[name]()
    d = [torch.randn_like(t) for t in x]
    take, oracle = WAYS[way]
    f, g = scalar(ours), scalar(plain)
    torch.testing.assert_close(f(*x), g(*x))
    wanted = oracle(g, x, d)
    assert any(bool((t != 0).any()) for t in wanted), "an oracle of zeros shows nothing"
    text = refusal(name, way)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Dynamo's, about caches and graph breaks
            got = take(f, x, d)
    except Exception as error:
        if text is None or re.search(text, str(error)) is None:
            raise
        REFUSALS.append(error)
        return
    assert text is None or text == ANYTHING, "it is there after all"
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_the_table_has_every_public_function_and_module():
    public = {
        *functional.__all__,
        *nn.__all__,
        *losses.__all__,
        *(model.__name__ for model in (models.ConvVAE, models.DCGAN, models.TransformerLM)),
    }
    assert public == {name.split(",")[0] for name in CASES}


# --------------------------------------------------------------------------------------------------
# What raises, and what it says


@pytest.mark.parametrize("way", [third, lambda f, x, d: torch.func.grad(lambda *t: curvature_of(f, t, d))(*x)], ids=str)
def test_a_third_derivative_of_attention_says_what_to_do(way):
    ours, _, x = attention_case()
    with pytest.raises(
        RuntimeError,
        match=r"attention: expected first or second derivatives, got a third one;.*fastgen\.reference\.attention",
    ):
        way(scalar(ours), x, [torch.randn_like(t) for t in x])


def curvature_of(f, x, d):
    return weighted(grad_of_grad(f, x, d), d)


def test_forward_over_forward_says_what_to_do():
    ours, _, x = attention_case()
    with pytest.raises(RuntimeError, match=r"attention: forward mode over forward mode.*jvp of torch\.func\.grad"):
        forward_over_forward(scalar(ours), x, [torch.randn_like(t) for t in x])


def test_create_graph_of_a_second_derivative_is_no_third_one():
    ours, plain, x = attention_case()
    leaves = [t.clone().requires_grad_() for t in x]
    grads = torch.autograd.grad(scalar(ours)(*leaves), leaves, create_graph=True)
    again = torch.autograd.grad(weighted(grads, x), leaves, create_graph=True)
    for a, b in zip(again, double_backward(scalar(plain), x, x), strict=True):
        torch.testing.assert_close(a, b)


recurrent = nn.LSTM(D, 3, dtype=torch.float64)

VECTORIZED = {
    "attention": (lambda *x: functional.scaled_dot_product_attention(*x, is_causal=True), [(B, H, N, D)] * 3),
    "attention of (B, N, H, D) in memory": (
        lambda *x: functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in x)),
        [(B, N, H, D)] * 3,
    ),
    "attention with a mask": (functional.scaled_dot_product_attention, [(B, H, N, D)] * 3 + [(N, N)]),
    "logsumexp": (lambda *x: functional.scaled_dot_product_attention(*x, return_lse=True)[1], [(B, H, N, D)] * 3),
    "multi_head_projection": (
        lambda *x: functional.multi_head_projection(*x, num_heads=2),
        [(B, N, D), (D, D), (D,)],
    ),
    "merge_heads_projection": (functional.merge_heads_projection, [(B, H, N, D), (D, H * D), (D,)]),
    "LSTM": (lambda x: recurrent(x)[0], [(N, B, D)]),
}


@pytest.mark.parametrize("name", VECTORIZED)
def test_vectorized_forward_mode(name):
    """Dual numbers whose tangents are batched by vmap, in another layout than the primals."""
    function, shapes = VECTORIZED[name]
    x = tuple(normal(*shape) for shape in shapes)
    expected = torch.autograd.functional.jacobian(function, x)
    actual = torch.autograd.functional.jacobian(function, x, vectorize=True, strategy="forward-mode")
    torch.testing.assert_close(actual, expected)

    def energy(*x):
        return function(*x).square().sum()

    expected = torch.autograd.functional.hessian(energy, x)
    actual = torch.autograd.functional.hessian(energy, x, vectorize=True, outer_jacobian_strategy="forward-mode")
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("kind", "tangent", "error", "text"),
    [
        ("dual", normal(1, H, N, D), RuntimeError, "different size"),
        ("dual", normal(B, H, N, D).float(), TypeError, "tangent of query: expected the dtype of query, torch.float64"),
        ("func", normal(B, H, N, D).float(), TypeError, "tangent of query: expected the dtype of query, torch.float64"),
    ],
)
def test_a_tangent_that_does_not_fit_is_named(kind, tangent, error, text):
    _, _, (query, key, value) = attention_case()
    attend = lambda q: functional.scaled_dot_product_attention(q, key, value)  # noqa: E731
    with pytest.raises(error, match=text):
        if kind == "func":
            torch.func.jvp(attend, (query,), (tangent,))
        else:
            dual_numbers(attend, [query], [tangent])


def test_the_readme_s_penalty_fails_with_torch_s_attention_and_works_here():
    x = torch.randn(2, 4, 64, 32, requires_grad=True, dtype=torch.float64)

    def r1(attend):
        scores = attend(x, x, x).square().sum((1, 2, 3))
        losses.r1_penalty(scores, x).backward()

    with pytest.raises(RuntimeError, match="is not implemented"):
        r1(torch.nn.functional.scaled_dot_product_attention)
    x.grad = None
    r1(functional.scaled_dot_product_attention)
    ours, x.grad = x.grad, None
    with sdpa_kernel(SDPBackend.MATH):
        r1(torch.nn.functional.scaled_dot_product_attention)
    torch.testing.assert_close(ours, x.grad)


def test_penalties_inside_compiled_code(monkeypatch):
    """When torch.compile traces torch.autograd.grad, a step is compiled as one."""
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        pytest.skip("torch._dynamo.config.trace_autograd_ops requires torch 2.11 or newer")
    monkeypatch.setattr(torch._dynamo.config, "trace_autograd_ops", True)
    torch._dynamo.reset()
    x, weight = normal(B, H, N, D).requires_grad_(), normal(D, D).requires_grad_()

    def step(attend):
        def run(x, weight):
            scores = attend(x @ weight, x @ weight, x).sin().sum((1, 2, 3))
            return losses.r1_penalty(scores, x)

        return run

    ours = torch.compile(step(functional.scaled_dot_product_attention), backend="aot_eager", fullgraph=True)
    wanted = torch.autograd.grad(step(lambda *t: plain_attention(*t)[0])(x, weight), (x, weight))
    for a, b in zip(torch.autograd.grad(ours(x, weight), (x, weight)), wanted, strict=True):
        torch.testing.assert_close(a, b)
