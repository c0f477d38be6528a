"""Multi-head projections: arguments at the edge of what is allowed, and what is refused by name."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import fastgen
from fastgen import functional, reference
from fastgen.functional import merge_heads_projection, multi_head_projection, qkv_projection, rotary_embedding
from fastgen.testing import assert_accurate

B, N, C = 2, 3, 4


def project(**changes):
    tables = torch.ones(N, 1), torch.zeros(N, 1)
    arguments = {"x": torch.randn(B, N, C), "weight": torch.randn(8, C), "num_heads": 2, "norm": torch.ones(4)}
    return multi_head_projection(**{**arguments, "rotary": tables, **changes})


def project_qkv(**changes):
    arguments = {"x": torch.randn(B, N, C), "weight": torch.randn(8, C), "heads": (2,), "head_dims": (4,)}
    return qkv_projection(**{**arguments, **changes})


def merge(**changes):
    return merge_heads_projection(**{"x": torch.randn(B, 2, N, 4), "weight": torch.randn(5, 8), **changes})


def rotate(**changes):
    tables = {"cos": torch.ones(N, 1), "sin": torch.zeros(N, 1)}
    return rotary_embedding(**{"x": torch.randn(B, 2, N, 4), **tables, **changes})


LONG = torch.ones(N, 1, dtype=torch.int64)
REFUSED = [
    (project, {"num_heads": True}, ValueError, "num_heads: expected a positive integer, got True"),
    (project, {"num_heads": 2.0}, ValueError, "num_heads: expected a positive integer, got 2.0"),
    (project, {"num_heads": torch.tensor(2)}, ValueError, "num_heads: expected a positive integer, got tensor"),
    (project, {"weight": torch.randn(0, C)}, ValueError, r"weight: expected .* got \(0, 4\)"),
    (project, {"weight": torch.randn(())}, ValueError, r"weight: expected .* got \(\)"),
    (project, {"norm_eps": -1e-6}, ValueError, "norm_eps: expected a finite number >= 0, got -1e-06"),
    (project, {"norm_eps": math.nan}, ValueError, "norm_eps: expected a finite number >= 0, got nan"),
    (project, {"norm_eps": math.inf}, ValueError, "norm_eps: expected a finite number >= 0, got inf"),
    (project, {"norm_eps": torch.tensor(1e-6)}, TypeError, "norm_eps: expected a number, got Tensor"),
    (project, {"norm_eps": None}, TypeError, "norm_eps: expected a number, got NoneType"),
    (project, {"interleaved": "no"}, TypeError, "interleaved: expected True or False, got 'no'"),
    (project, {"channels_first": "no"}, TypeError, "channels_first: expected True or False, got 'no'"),
    (project, {"rotary": (LONG, LONG)}, TypeError, "cos: expected a floating-point tensor, got torch.int64"),
    (project, {"rotary": (torch.ones(2, 1),) * 2}, ValueError, r"cos: expected \(N, R / 2\) .* N = 3"),
    (project, {"bias": torch.zeros(8).double()}, TypeError, "bias: expected the dtype of x, torch.float32"),
    (project, {"norm": torch.ones(4).half()}, TypeError, "norms: expected the dtype of x, torch.float32"),
    (project_qkv, {"heads": 2}, ValueError, "heads: expected a sequence of positive integers, got 2"),
    (project_qkv, {"heads": (2, 0), "head_dims": (4, 4)}, ValueError, "heads: expected a positive integer, got 0"),
    (project_qkv, {"head_dims": ()}, ValueError, r"head_dims: expected a sequence of positive integers, got \(\)"),
    (project_qkv, {"norms": torch.ones(4)}, TypeError, "norms: expected a tuple or list of weights"),
    (project_qkv, {"norms": (torch.ones(4),) * 2}, ValueError, "norms: expected at most 1 weights"),
    (merge, {"channels_first": "no"}, TypeError, "channels_first: expected True or False, got 'no'"),
    (merge, {"gate": torch.ones(5, dtype=torch.int64)}, TypeError, "gate: expected .*, got torch.int64"),
    (rotate, {"interleaved": "no"}, TypeError, "interleaved: expected True or False, got 'no'"),
    (rotate, {"cos": LONG}, TypeError, "cos: expected a floating-point tensor, got torch.int64"),
]


@pytest.mark.parametrize(("function", "changes", "error", "text"), REFUSED)
def test_bad_arguments_are_named(function, changes, error, text):
    with pytest.raises(error, match=text):
        function(**changes)


@pytest.mark.parametrize(
    ("function", "changes", "error", "text"),
    [
        (project, {"weight": 1.0}, TypeError, "weight: expected a tensor, got float"),
        (project, {"bias": 1.0}, TypeError, "bias: expected a tensor or None, got float"),
        (merge, {"weight": 1.0}, TypeError, "weight: expected a tensor, got float"),
        (merge, {"residual": torch.ones(B, N, 5).long()}, TypeError, "residual: expected a floating-point tensor"),
        (
            merge,
            {"residual": torch.ones(B, N, 5, device="meta")},
            ValueError,
            "residual: expected the device of x, cpu",
        ),
        (merge, {"gate": torch.ones(5, dtype=torch.int64)}, TypeError, "gate: expected a floating-point tensor"),
    ],
)
def test_bad_arguments_are_named_under_autocast(function, changes, error, text):
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(error, match=text):
        function(**changes)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "call",
    [
        lambda x, weight, out: multi_head_projection(x, weight, num_heads=2),
        lambda x, weight, out: qkv_projection(x, weight, heads=(1, 1), head_dims=(4, 4)),
        lambda x, weight, out: qkv_projection(x, weight, heads=(1, 2), head_dims=(4, 2)),
        lambda x, weight, out: merge_heads_projection(multi_head_projection(x, x[0].new_ones(8, C), num_heads=2), out),
    ],
)
def test_weights_without_memory_are_refused(call, grad):
    # PyTorch's linear map takes them, and returns memory that was never written.
    x = torch.randn(B, N, C, requires_grad=grad)
    weight, out = torch.empty(8, C, device="meta"), torch.empty(5, 8, device="meta")
    with pytest.raises(ValueError, match=r"^weight: expected the device of x, cpu, got meta"):
        call(x, weight, out)


@pytest.mark.parametrize("name", ["heads", "head_dims"])
@pytest.mark.parametrize("other", [True, 1.0])
def test_every_count_is_an_integer(name, other):
    counts = {"heads": (1, 1), "head_dims": (1, 1), name: (1, other)}
    with pytest.raises(ValueError, match=f"^{name}: expected a positive integer, got {other!r}$"):
        qkv_projection(torch.randn(B, N, C), torch.randn(2, C), **counts)


# --------------------------------------------------------------------------------------------------
# Sizes, devices, precision


def arguments(shape, channels_first, device="cpu"):
    batch, length, channels = shape
    x = torch.randn(*((batch, channels, length) if channels_first else shape), device=device)
    leaves = [x, *(torch.randn(s, device=device) for s in ((8, channels), (8,), (4,), (5, 8), (batch, 5)))]
    tables = tuple(torch.randn(length, 1, device=device) for _ in range(2))
    return [leaf.requires_grad_() for leaf in leaves], tables


def through(leaves, tables, channels_first):
    x, weight, bias, norm, out, gate = leaves
    options = {"channels_first": channels_first}
    heads = multi_head_projection(x, weight, bias, num_heads=2, norm=norm, rotary=tables, **options)
    return merge_heads_projection(heads, out, gate=gate, **options)


def double_backward(y, leaves):
    first = torch.autograd.grad(y.sin().sum(), leaves, create_graph=True)
    squares = sum(t.square().sum() for t in first)
    return [*first, *torch.autograd.grad(squares, leaves, allow_unused=True, materialize_grads=True)]


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("channels_first", [False, True], ids=["tokens", "feature map"])
@pytest.mark.parametrize("shape", [(0, N, C), (B, 0, C), (B, N, 0)], ids=["no batch", "no tokens", "no channels"])
def test_empty_inputs_give_what_linear_gives(shape, channels_first, backend):
    leaves, tables = arguments(shape, channels_first)
    with fastgen.use_backend(backend):
        y = through(leaves, tables, channels_first)
        gradients = double_backward(y, leaves)
    x, weight, bias, norm, out, gate = leaves
    epilogue = ((norm,), 1e-6, tables[0][None], tables[1][None], 1)
    (heads,) = reference.projection(x, weight, bias, [2], [4], channels_first, *epilogue)
    plain = reference.merge_heads(heads, out, None, None, gate[:, None], channels_first)
    for a, b in zip([y, *gradients], [plain, *double_backward(plain, leaves)], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels_first", [False, True], ids=["tokens", "feature map"])
def test_meta_tensors_give_the_shapes_strides_and_dtypes(channels_first):
    for first, second in zip(*(results(channels_first, device) for device in ("cpu", "meta")), strict=True):
        assert second.device.type == "meta"
        assert (first.shape, first.stride(), first.dtype) == (second.shape, second.stride(), second.dtype)


def results(channels_first, device):
    leaves, tables = arguments((B, N, C), channels_first, device)
    y = through(leaves, tables, channels_first)
    return [y, rotary_embedding(torch.randn(B, 2, N, 4, device=device), *tables), *double_backward(y, leaves)]


@pytest.mark.parametrize("channels_first", [False, True], ids=["tokens", "feature map"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tables_in_float64_keep_their_precision(dtype, channels_first):
    """4 cos - 4 sin, where float32 would round cos to sin."""
    cos, sin = torch.full((N, 2), 1 + 1e-9, dtype=torch.float64), torch.ones(N, 2).double()
    x = torch.ones(*((B, C, N) if channels_first else (B, N, C)), dtype=dtype)
    heads = multi_head_projection(
        x, torch.ones(4, C, dtype=dtype), num_heads=1, rotary=(cos, sin), channels_first=channels_first
    )
    alone = rotary_embedding(torch.full((B, 1, N, 4), 4, dtype=dtype), cos, sin)
    for result in (heads, alone):
        assert result.dtype == dtype
        torch.testing.assert_close(result[..., :2].double(), 4 * (cos - sin).expand(B, 1, N, 2), rtol=0.01, atol=0)


@pytest.mark.parametrize("channels_first", [False, True], ids=["tokens", "feature map"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_second_derivatives_in_half_precision(dtype, channels_first):
    batch, length = 16, 6
    leaves, tables = arguments((batch, length, 16), channels_first)
    leaves = [(t.detach() / (3 if t.dim() > 1 else 1)).to(dtype) for t in leaves]

    def plain(leaves):
        x, weight, bias, norm, out, gate = leaves
        heads = F.linear(x.transpose(1, 2) if channels_first else x, weight, bias).unflatten(-1, (2, 4)).transpose(1, 2)
        heads = F.rms_norm(heads, (4,), norm, 1e-6)
        wide = heads.float() if dtype == heads.dtype else heads
        heads = reference.rotary(wide, *(t[None].to(wide) for t in tables), False).to(x.dtype)
        y = F.linear(reference.join_heads(heads), out) * gate[:, None]
        return y.transpose(1, 2) if channels_first else y

    def differentiated(function, leaves):
        leaves = [t.detach().clone().requires_grad_() for t in leaves]
        return double_backward(function(leaves), leaves)

    ours = differentiated(lambda leaves: through(leaves, tables, channels_first), leaves)
    exact = differentiated(plain, [t.double() for t in leaves])
    for index, results in enumerate(zip(ours, differentiated(plain, leaves), exact, strict=True)):
        assert_accurate(*results, f"gradient {index}")


# --------------------------------------------------------------------------------------------------
# Exported programs, which call operators by name


class Layer(torch.nn.Module):
    def __init__(self, channels_first):
        super().__init__()
        leaves, self.tables = arguments((B, N, C), channels_first)
        self.leaves = torch.nn.ParameterList(leaves[1:])
        self.channels_first = channels_first

    def forward(self, x):
        return through([x, *self.leaves], self.tables, self.channels_first)


@pytest.mark.parametrize("channels_first", [False, True], ids=["tokens", "feature map"])
def test_an_exported_projection_trains_like_the_layer(channels_first):
    layer = Layer(channels_first)
    (x, *_), _ = arguments((B, N, C), channels_first)
    program = torch.export.export(layer, (x.detach(),)).module()
    wanted = double_backward(layer(x), [x, *layer.parameters()])
    for a, b in zip(double_backward(program(x), [x, *program.parameters()]), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_flags_may_be_numbers():
    x = torch.randn(B, C, N)
    expected = functional.multi_head_projection(x, torch.eye(4), num_heads=2, channels_first=True)
    torch.testing.assert_close(multi_head_projection(x, torch.eye(4), num_heads=2, channels_first=1), expected)
