"""``torch.library.opcheck`` of every operator: schema, fake, autograd registration, compiled execution."""

from __future__ import annotations

import pytest
import torch

from fastgen import backend
from fastgen.ops.attention.problem import Options

SEED = torch.tensor([5])


def attention_arguments(masked=False, dropout=False, packed=False, softcap=0.0):
    batch = 1 if packed else 2
    query, key, value = torch.randn(batch, 4, 5, 8), torch.randn(batch, 2, 6, 8), torch.randn(batch, 2, 6, 3)
    mask = torch.randn(4, 1, 6).unsqueeze(0) if masked else None
    sequences = torch.tensor([[0, 2, 5], [0, 4, 6]], dtype=torch.int32) if packed else None
    options = Options(0.5 if dropout else 0.0, -1, -1, 0.4, softcap)
    return query, key, value, mask, SEED if dropout else None, sequences, *options


def backward_arguments(**kwargs):
    arguments = attention_arguments(**kwargs)
    out, lse = torch.ops.fastgen_torch.attention_forward(*arguments)
    return torch.randn_like(out), torch.randn_like(lse), *arguments[:3], out, lse, *arguments[3:]


def second_order_arguments(**kwargs):
    """Arguments of attention_second_order, which include those of attention_tangent."""
    grad_out, grad_lse, query, key, value, out, lse, mask, seed, sequences, *options = backward_arguments(**kwargs)
    tangents = [None if t is None else torch.randn_like(t) for t in (query, key, value, mask)]
    return grad_out, grad_lse, query, key, value, out, lse, mask, seed, sequences, *tangents, *options


def cases():
    matrix = lambda: torch.randn(3, 7)  # noqa: E731
    row = torch.randn(7).expand(3, 7)
    yield "latent_forward", (matrix(), matrix(), None, None, SEED, True)
    yield "latent_forward", (matrix(), matrix(), row, row, SEED, False)
    yield "latent_forward", (*torch.randn(3, 8).chunk(2, 1), None, None, torch.tensor([1, 2, 3]), True)
    yield "latent_backward", (matrix(), torch.randn(3), matrix(), matrix(), row, row, SEED)
    yield "latent_backward", (None, torch.randn(3), matrix(), matrix(), None, None, SEED)
    yield "latent_backward", (matrix(), None, matrix(), matrix(), None, None, SEED)
    for options in ({}, {"masked": True}, {"dropout": True}, {"masked": True, "softcap": 0.6}, {"packed": True}):
        yield "attention_forward", attention_arguments(**options)
        yield "attention_backward", (*backward_arguments(**options), bool(options.get("masked")))
        yield "attention_tangent", second_order_arguments(**options)[2:]
        _, _, query, key, value, _, _, *rest = second_order_arguments(**options)
        yield "attention_forward_tangent", (query, key, value, *rest)
        yield "attention_second_order", (*second_order_arguments(**options), bool(options.get("masked")))
    narrow = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 16)
    causal, bias = (0.0, -1, 0, 0.4), torch.randn(1, 4, 5, 6)
    yield "cpu_attention_forward", (*narrow, None, None, *causal)
    yield "cpu_attention_forward", (*narrow, bias > 0, SEED, 0.3, 2, 1, 0.4)
    rows = torch.ops.fastgen_torch.cpu_attention_forward(*narrow, None, None, *causal)
    upstream = torch.randn_like(rows[0]), torch.randn(2, 4, 5)
    yield "cpu_attention_backward", (*upstream, *narrow, *rows, None, None, *causal, False)
    yield "cpu_attention_backward", (upstream[0], None, *narrow, *rows, bias, SEED, 0.3, -1, -1, 0.4, True)
    directions = [torch.randn_like(t) for t in narrow]
    yield "cpu_attention_tangent", (*narrow, *rows, None, None, *directions, None, *causal)
    yield "cpu_attention_tangent", (*narrow, *rows, bias, SEED, None, *directions[1:], bias, 0.3, -1, -1, 0.4)
    yield "cpu_attention_second_order", (*upstream, *narrow, *rows, None, None, *directions, None, *causal)
    yield (
        "cpu_attention_second_order",
        (upstream[0], None, *narrow, *rows, bias, SEED, directions[0], None, None, bias, 0.3, 2, 1, 0.4),
    )
    tile, row = lambda: torch.randn(2, 5, 7), torch.randn(2, 5, 1)
    yield "cpu_attention_weights", (tile(), tile(), row, None, None, None, None)
    yield "cpu_attention_weights", (tile(), tile(), row, tile(), tile(), row, tile())
    scores, factors = lambda: torch.randn(2, 5, 7), torch.rand(2, 5, 7)
    yield "cpu_attention_softmax", (scores(), None, torch.randn(2, 5))
    yield "cpu_attention_softmax", (scores(), factors, torch.randn(2, 5))
    yield "cpu_attention_softmax_backward", (scores(), scores(), factors, torch.randn(2, 5, 1), torch.randn(2, 5, 1))
    yield "cpu_dropout_keep", (torch.tensor([5, 6]), 12, 1, 1, 3, 4, 1, 2, 9, 3, 8, 0.3)
    x, weight, bias = torch.randn(2, 5, 6), torch.randn(10, 6), torch.randn(10)
    plain, rotated = ([], None, None), ([torch.randn(2)], torch.randn(1, 5, 1), torch.randn(1, 5, 1))
    parts = [3, 1], [2, 4]
    feature_map, length_first = x.mT.contiguous(), torch.randn(5, 2, 6).transpose(0, 1)
    yield "projection_forward", (x, weight, bias, *plain, *parts, False, 0.0, 0, False, False, False)
    yield "projection_forward", (length_first, weight, bias, *plain, *parts, False, 0.0, 0, False, False, False)
    yield "projection_forward", (feature_map, weight, None, *rotated, *parts, True, 1e-6, 1, True, True, True)
    head, table = lambda: torch.randn(2, 5, 3, 8).transpose(1, 2), torch.randn(2, 5, 3)
    yield "cpu_finish_heads", (head(), torch.randn(8), table, table, 1e-6, True)
    yield "cpu_finish_heads", (head().bfloat16(), None, table[:1], table[:1], 1e-6, False)
    yield "cpu_finish_heads_backward", (head(), head(), torch.randn(8), None, None, 1e-6, True)
    yield "cpu_finish_heads_backward", (head(), head(), None, table, table, 1e-6, True)
    grads = [torch.randn(2, 3, 5, 2), torch.randn(2, 1, 5, 4)]
    yield "projection_backward", (grads, [], x, weight, *plain, True, False, 0.0, 0, False, False)
    yield "projection_backward", (grads, [], length_first, weight, *plain, True, False, 0.0, 0, False, False)
    yield "projection_backward", (grads, grads[:1], feature_map, weight, *rotated, False, True, 1e-6, 1, True, True)
    heads, weight, gate = torch.randn(2, 3, 5, 2), torch.randn(7, 6), torch.randn(1, 1, 7)
    yield "merge_heads_forward", (heads, weight, torch.randn(7), torch.randn(2, 5, 7), gate, False, False)
    yield "merge_heads_forward", (heads, weight, None, None, None, True, True)
    yield "merge_heads_backward", (torch.randn(2, 5, 7), heads, weight, torch.randn(7), gate, False, False)
    yield "merge_heads_backward", (torch.randn(2, 7, 5), heads, weight, None, torch.randn(1, 1, 1), True, True)


CASES = list(cases())


@pytest.mark.parametrize("namespace", ["fastgen", "fastgen_torch"])
@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"{name}-{i}" for i, (name, _) in enumerate(CASES)])
def test_opcheck(case, namespace):
    name, arguments = CASES[case]
    torch.library.opcheck(getattr(getattr(torch.ops, namespace), name).default, arguments)


def test_every_operator_has_an_opcheck_case():
    names = {name for family in backend.operators().values() for name in family}
    assert names == {name for name, _ in CASES}


def with_gradients(argument):
    if isinstance(argument, list):
        return [with_gradients(a) for a in argument]
    wants = isinstance(argument, torch.Tensor) and argument.is_floating_point()
    return argument.detach().clone().requires_grad_() if wants else argument


def differentiable_cases():
    """Each operator that a program may name. The second order and the helpers have no derivative."""
    quick = {"latent_forward", "attention_forward", "attention_backward", "projection_forward", "merge_heads_forward"}
    for i, (name, _) in enumerate(CASES):
        if name == "attention_second_order" or (name.startswith("cpu_") and "finish" not in name):
            continue
        marks = [] if name in quick else [pytest.mark.slow]
        quick.discard(name)
        yield pytest.param(i, marks=marks, id=f"{name}-{i}")


@pytest.mark.parametrize("case", list(differentiable_cases()))
def test_operators_called_by_name_are_differentiated_eagerly_and_compiled(case):
    name, arguments = CASES[case]
    arguments = tuple(with_gradients(a) for a in arguments)
    tests = ("test_autograd_registration", "test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(torch.ops.fastgen, name).default, arguments, test_utils=tests)


def test_helper_operators_refuse_to_be_differentiated():
    query, value = (torch.randn(1, 1, 4, dim, requires_grad=True) for dim in (8, 16))
    with pytest.raises(RuntimeError, match="cpu_attention_forward: expected tensors that need no gradient"):
        torch.ops.fastgen.cpu_attention_forward(query, query, value, None, None, 0.0, -1, -1, 0.3)
