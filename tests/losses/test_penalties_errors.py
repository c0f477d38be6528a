"""Invalid arguments of gradient penalties, and compiled modules."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fastgen.losses import (
    _input_gradient,
    dragan_penalty,
    gradient_penalty,
    path_length_penalty,
    r1_penalty,
    r2_penalty,
)
from tests.losses.penalty_cases import PENALTIES, critic, decoder, penalty_of

# --------------------------------------------------------------------------------------------------
# Errors


X = torch.randn(8, 3)
Z = torch.randn(8, 4)


def leaf(*shape):
    return torch.randn(*(shape or (8, 3)), requires_grad=True)


def sums(x):
    return x.flatten(1).sum(1)


def r1_of(scores, real=None):
    """R1 where the scores are a function of the real samples."""
    real = leaf() if real is None else real
    return r1_penalty(scores(real), real)


def path_of(images=None, latents=None, mean=0.0, **kwargs):
    latents = leaf(8, 4) if latents is None else latents
    images = (lambda z: z[..., None]) if images is None else images
    return path_length_penalty(images(latents), latents, mean, **kwargs)


def without_grad(call, mode=torch.no_grad):
    with mode():
        return call()


ERRORS = {
    # not tensors, not floating
    "real is a list": (lambda: gradient_penalty(sums, [1.0], X), TypeError, "^real: expected a tensor, got list"),
    "fake is None": (lambda: gradient_penalty(sums, X, None), TypeError, "^fake: expected a tensor, got NoneType"),
    "real is bytes": (
        lambda: gradient_penalty(sums, X.byte(), X),
        TypeError,
        r"^real: expected a floating-point tensor, got torch.uint8",
    ),
    "fake is integer": (
        lambda: gradient_penalty(sums, X, X.long()),
        TypeError,
        r"^fake: expected a floating-point tensor, got torch.int64",
    ),
    "dragan of a list": (lambda: dragan_penalty(sums, [1.0]), TypeError, "^real: expected a tensor, got list"),
    "dragan of bytes": (lambda: dragan_penalty(sums, X.byte()), TypeError, "^real: expected a floating-point tensor"),
    "r1 of a list": (lambda: r1_penalty(X.sum(1), [1.0]), TypeError, "^real: expected a tensor, got list"),
    "r2 of a list": (lambda: r2_penalty(X.sum(1), [1.0]), TypeError, "^fake: expected a tensor, got list"),
    "r2 of integers": (lambda: r2_penalty(X.sum(1), X.long()), TypeError, "^fake: expected a floating-point tensor"),
    "scores are a tuple": (lambda: r1_penalty((X,), leaf()), TypeError, "^scores: expected a tensor, got tuple"),
    "scores are integers": (
        lambda: r1_penalty(torch.zeros(8, dtype=torch.int64), leaf()),
        TypeError,
        r"^scores: expected a floating-point tensor, got torch.int64",
    ),
    "images are None": (
        lambda: path_length_penalty(None, leaf(8, 4), 0.0),
        TypeError,
        "^images: expected a tensor, got NoneType",
    ),
    "images are bytes": (lambda: path_of(lambda z: X.byte()), TypeError, "^images: expected a floating-point tensor"),
    "latents are a list": (
        lambda: path_length_penalty(X, [1.0], 0.0),
        TypeError,
        "^latents: expected a tensor, got list",
    ),
    "latents are integers": (
        lambda: path_length_penalty(X, Z.long(), 0.0),
        TypeError,
        "^latents: expected a floating-point tensor, got torch.int64",
    ),
    "the discriminator returns a tuple": (
        lambda: gradient_penalty(lambda x: (x,), X, X),
        TypeError,
        "^discriminator: expected it to return a tensor, got tuple",
    ),
    "the discriminator returns integers": (
        lambda: dragan_penalty(lambda x: sums(x).long(), X),
        TypeError,
        "^discriminator: expected it to return a floating-point tensor, got torch.int64",
    ),
    # shapes, dtypes and devices that differ
    "fake of another shape": (
        lambda: gradient_penalty(sums, X, X[:4]),
        ValueError,
        r"^fake: expected shape of real = \(8, 3\), got \(4, 3\)",
    ),
    "fake of another dtype": (
        lambda: gradient_penalty(sums, X, X.double()),
        TypeError,
        r"^fake: expected the dtype of real, torch.float32, got torch.float64",
    ),
    "fake on another device": (
        lambda: gradient_penalty(sums, X, X.to("meta")),
        ValueError,
        "^fake: expected the device of real, cpu, got meta",
    ),
    "images of another batch": (
        lambda: path_of(lambda z: z[:4, :, None]),
        ValueError,
        r"^images: expected as many samples as latents, 8, got \(4, 4, 1\)",
    ),
    # no samples, too few dims
    "gradient penalty of nothing": (
        lambda: gradient_penalty(sums, X[:0], X[:0]),
        ValueError,
        r"^real: expected \(B, \*\) with no empty dim, got \(0, 3\)",
    ),
    "dragan of nothing": (lambda: dragan_penalty(sums, X[:0]), ValueError, r"^real: expected .*got \(0, 3\)"),
    "r1 of nothing": (lambda: r1_of(sums, leaf(0, 3)), ValueError, r"^real: expected .*got \(0, 3\)"),
    "r2 of nothing": (lambda: r2_penalty(X[:0, 0], leaf(0, 3)), ValueError, r"^fake: expected .*got \(0, 3\)"),
    "r1 of empty samples": (lambda: r1_penalty(X.sum(1), leaf(8, 0)), ValueError, r"^real: expected .*got \(8, 0\)"),
    "path length of nothing": (
        lambda: path_of(latents=leaf(0, 4)),
        ValueError,
        r"^images: expected \(B, C, \*\) with no empty dim, got \(0, 4, 1\)",
    ),
    "real is a scalar": (lambda: r1_penalty(X.sum(1), leaf(1)[0]), ValueError, r"^real: expected \(B, \*\).*got \(\)"),
    "latents without a dim": (
        lambda: path_length_penalty(X, leaf(8), 0.0),
        ValueError,
        r"^latents: expected \(B, w\) or \(B, L, w\) with no empty dim, got \(8,\)",
    ),
    # scores that are not one per sample
    "scores of patches": (
        lambda: r1_of(lambda x: sums(x).reshape(8, 1, 1, 1).expand(8, 1, 30, 30)),
        ValueError,
        r"^scores: expected one score per sample, \(B,\) or \(B, 1\) with B = 8, got \(8, 1, 30, 30\);"
        r" reduce scores of patches first$",
    ),
    "scores of patches from the discriminator": (
        lambda: gradient_penalty(lambda x: x, X, X),
        ValueError,
        r"^discriminator: expected it to return one score per sample, \(B,\) or \(B, 1\) with B = 8, got \(8, 3\);"
        r" reduce scores of patches first$",
    ),
    "a mean of scores": (lambda: r1_of(lambda x: x.mean()), ValueError, r"^scores: expected one .*B = 8, got \(\)$"),
    "scores of another batch": (lambda: r1_of(lambda x: x[:4, 0]), ValueError, r"^scores: .*B = 8, got \(4,\)$"),
    "scores in a row": (lambda: r1_of(lambda x: sums(x)[None]), ValueError, r"^scores: .*B = 8, got \(1, 8\)$"),
    # nothing to differentiate
    "real does not require grad": (
        lambda: r1_penalty(X.sum(1), X),
        ValueError,
        r"^real: expected a tensor that requires grad \(call real.requires_grad_\(\) before the discriminator\),"
        " got one that does not",
    ),
    "fake does not require grad": (
        lambda: r2_penalty(X.sum(1), X),
        ValueError,
        r"^fake: expected a tensor that requires grad \(call fake.requires_grad_\(\) before the discriminator\)",
    ),
    "latents do not require grad": (
        lambda: path_of(latents=Z),
        ValueError,
        r"^latents: expected a tensor that requires grad \(call latents.requires_grad_\(\) before the generator\)",
    ),
    "detached scores": (
        lambda: r1_of(lambda x: sums(x).detach()),
        ValueError,
        r"^scores: expected values computed from real, got values that do not require grad \(computed under",
    ),
    "scores computed under no_grad": (
        lambda: r1_of(lambda x: without_grad(lambda: sums(x))),
        ValueError,
        "^scores: expected values computed from real, got values that do not require grad",
    ),
    "scores of something else": (
        lambda: r2_penalty(leaf().sum(1), leaf()),
        ValueError,
        r"^scores: expected values computed from fake, got values that do not depend on it \(or fake did not require"
        r" grad when they were computed\)$",
    ),
    "a discriminator under no_grad": (
        lambda: gradient_penalty(torch.no_grad()(sums), X, X),
        ValueError,
        "^discriminator: expected it to return values computed from its input, got values that do not require grad",
    ),
    "a discriminator that ignores its input": (
        lambda: dragan_penalty(lambda x: leaf().sum(1), X),
        ValueError,
        "^discriminator: expected it to return values computed from its input, got values that do not depend on it$",
    ),
    "detached images": (
        lambda: path_of(lambda z: z.detach()),
        ValueError,
        "^images: expected values computed from latents, got values that do not require grad",
    ),
    "images of something else": (
        lambda: path_of(lambda z: leaf()),
        ValueError,
        r"^images: expected values computed from latents, got values that do not depend on it \(or latents did",
    ),
    # gradients disabled
    "gradient penalty under no_grad": (
        lambda: without_grad(lambda: gradient_penalty(sums, X, X)),
        RuntimeError,
        r"^gradient_penalty: expected a call with gradients enabled, got one under torch.no_grad\(\) or",
    ),
    "dragan in inference mode": (
        lambda: without_grad(lambda: dragan_penalty(sums, X), torch.inference_mode),
        RuntimeError,
        "^dragan_penalty: expected a call with gradients enabled",
    ),
    "r1 under no_grad": (
        lambda: without_grad(lambda: r1_of(sums)),
        RuntimeError,
        "^r1_penalty: expected a call with gradients enabled",
    ),
    "r2 under no_grad": (
        lambda: without_grad(lambda: r2_penalty(sums(X), X)),
        RuntimeError,
        "^r2_penalty: expected a call with gradients enabled",
    ),
    "path length in inference mode": (
        lambda: without_grad(path_of, torch.inference_mode),
        RuntimeError,
        "^path_length_penalty: expected a call with gradients enabled",
    ),
    # numbers
    "a negative center": (
        lambda: gradient_penalty(sums, X, X, center=-1.0),
        ValueError,
        "^center: expected a finite number >= 0, got -1.0",
    ),
    "a negative center of dragan": (lambda: dragan_penalty(sums, X, center=-0.1), ValueError, "^center: .*got -0.1"),
    "a center that is no number": (
        lambda: gradient_penalty(sums, X, X, center=torch.ones(())),
        TypeError,
        "^center: expected a number, got Tensor",
    ),
    "negative noise": (
        lambda: dragan_penalty(sums, X, noise=-0.5),
        ValueError,
        "^noise: expected a finite number >= 0, got -0.5",
    ),
    "noise that is NaN": (lambda: dragan_penalty(sums, X, noise=math.nan), ValueError, "^noise: .*got nan"),
    "a decay of 0": (lambda: path_of(decay=0.0), ValueError, r"^decay: expected a number in \(0, 1\], got 0.0"),
    "a decay above 1": (lambda: path_of(decay=1.5), ValueError, r"^decay: expected a number in \(0, 1\], got 1.5"),
    "a mean of one dim": (
        lambda: path_of(mean=torch.zeros(1)),
        ValueError,
        r"^mean: expected a scalar tensor, of shape \(\), or a number, got \(1,\)",
    ),
    "an integer mean": (
        lambda: path_of(mean=torch.tensor(0)),
        TypeError,
        "^mean: expected a floating-point tensor, got torch.int64",
    ),
    "no mean": (
        lambda: path_of(mean=None),
        TypeError,
        "^mean: expected a scalar tensor or a number, got NoneType",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_invalid_arguments_raise(case):
    call, error, message = ERRORS[case]
    with pytest.raises(error, match=message) as caught:
        call()
    assert type(caught.value) is error


# --------------------------------------------------------------------------------------------------
# Compiled modules


class Sum(nn.Module):
    """Sum of two modules applied to x, or to x and ``other``."""

    def __init__(self, first, second, other=None):
        super().__init__()
        self.first, self.second, self.other = first, second, other

    def forward(self, x):
        return self.first(x) + self.second(x if self.other is None else self.other)


@pytest.fixture(scope="module")
def compiled():
    """A compiled discriminator and a compiled generator."""
    networks = {"discriminator": critic((5, 7), torch.float32), "generator": decoder((5, 7), torch.float32)}
    yield {name: torch.compile(network, backend="aot_eager") for name, network in networks.items()}
    torch._dynamo.reset()


def compiled_of(kind, compiled):
    return compiled["generator" if kind == "path length" else "discriminator"]


NOT_TWICE = "values that are twice differentiable, got output of a module compiled with torch.compile; call the unc"


@pytest.mark.parametrize("kind", PENALTIES)
def test_compiled_modules_raise_and_their_original_module_works(compiled, kind):
    module, samples = compiled_of(kind, compiled), torch.randn(5, 7)
    begins = {"r1": "scores: expected", "r2": "scores: expected", "path length": "images: expected"}
    begin = begins.get(kind, "discriminator: expected it to return")
    with pytest.raises(RuntimeError, match=rf"^{begin} {NOT_TWICE}.*_orig_mod.*force_eager.*every 16th step"):
        penalty_of(kind, module, samples)
    plain = penalty_of(kind, module._orig_mod, samples)
    plain.backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in module.parameters())
    module.zero_grad()
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(penalty_of(kind, module, samples), plain)


def test_pytorch_does_not_support_double_backward_through_compiled_code(compiled):
    """If this fails, PyTorch supports double backward through compiled code, and the check can be removed."""
    x = torch.randn(5, 7, requires_grad=True)
    (gradient,) = torch.autograd.grad(compiled["discriminator"](x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        gradient.square().sum().backward()


def test_compiled_submodules_raise(compiled):
    plain, samples = critic((5, 7), torch.float32), torch.randn(5, 7)
    for network in (
        nn.Sequential(nn.Linear(7, 7), compiled["discriminator"], nn.Linear(1, 1)),
        Sum(plain, compiled["discriminator"]),
        Sum(compiled["discriminator"], plain),
    ):
        with pytest.raises(RuntimeError, match=NOT_TWICE):
            penalty_of("gradient", network, samples)


def test_compiled_code_outside_the_differentiated_path_is_allowed(compiled):
    plain, samples = critic((5, 7), torch.float32), torch.randn(5, 7)
    penalty = penalty_of("gradient", Sum(plain, compiled["discriminator"], other=leaf(5, 7)), samples)
    penalty.backward()
    torch.testing.assert_close(penalty, penalty_of("gradient", plain, samples))
    first, second = (leaf(10, 7) * 2).chunk(2)  # two outputs of one node
    penalty = r2_penalty(plain(first) + compiled["discriminator"](second), first)
    penalty.backward()
    torch.testing.assert_close(penalty, penalty_of("r1", plain, first))
    with pytest.raises(RuntimeError, match=NOT_TWICE):
        r2_penalty(plain(first) + compiled["discriminator"](second), second)
    fake = compiled["generator"](torch.randn(5, 7))
    network = critic((5, 2, 3, 3), torch.float32)
    penalty = r2_penalty(network(fake), fake)
    penalty.backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in compiled["generator"].parameters())
    compiled["generator"].zero_grad()
    torch.testing.assert_close(penalty, penalty_of("r1", network, fake))


def test_graph_search_visits_each_edge_once():
    before = x = leaf(5, 7)
    for _ in range(100):
        x = x + 0.0
    y = x
    for _ in range(20):  # 2^20 paths from y to x
        y = y * 0.5 + y * 0.5
    edges = list(_input_gradient._edges([y.grad_fn], torch.autograd.graph.get_gradient_edge(x).node))
    assert len(edges) == 20 * 4
    assert list(_input_gradient._edges([x.grad_fn], torch.autograd.graph.get_gradient_edge(x).node)) == []
    assert len(list(_input_gradient._edges([x.grad_fn], torch.autograd.graph.get_gradient_edge(before).node))) == 100
    torch.testing.assert_close(r1_penalty(y.sum(1), x).detach(), torch.tensor(7 / 2))
