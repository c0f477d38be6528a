"""Arguments and attributes of the recurrent layers: those of torch, or an error."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from fastgen import nn
from tests.nn.recurrent_cases import BOTH, B, C, H, T, assert_all_close, derivatives, flat, normal, pair


@pytest.mark.parametrize("name", BOTH)
def test_attributes_match_torch_and_copies_work(name):
    theirs, ours = pair(name, num_layers=2, dropout=0.1)
    assert vars(theirs).keys() == vars(ours).keys()
    assert isinstance(ours, getattr(torch.nn, name))
    assert str(theirs) == str(ours)
    x, expected = normal(T, B, C), None
    for layer in (ours.eval(), copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(layer) is getattr(nn, name)
        results = flat(layer(x))
        expected = expected or results
        assert_all_close(results, expected)


@pytest.mark.parametrize(
    ("name", "input", "hx", "error", "text"),
    [
        ("LSTM", None, None, TypeError, "input: expected a tensor, got NoneType"),
        ("LSTM", torch.zeros(T, B, 4), None, ValueError, r"input: expected \(T, B, 3\) or \(T, 3\), got \(4, 3, 4\)"),
        ("GRU", torch.zeros(4), None, ValueError, r"input: expected \(T, B, 3\) or \(T, 3\), got \(4,\)"),
        ("GRU", torch.zeros(1, T, B, C), None, ValueError, r"input: expected .* got \(1, 4, 3, 3\)"),
        ("GRU", pack_sequence([torch.zeros(2, 4)]), None, ValueError, r"input: expected \(rows, 3\), got \(2, 4\)"),
        (
            "LSTM",
            torch.zeros(T, B, C).double(),
            None,
            TypeError,
            "input: expected the dtype of the weights, torch.float32",
        ),
        ("LSTM", torch.zeros(0, B, C), None, ValueError, r"input: expected at least one time step, got \(0, 3, 3\)"),
        ("GRU", torch.zeros(0, B, C), None, ValueError, r"input: expected at least one time step, got \(0, 3, 3\)"),
        (
            "GRU",
            torch.zeros(T, B, C),
            torch.zeros(1, H),
            ValueError,
            r"hx: expected shape .* = \(1, 3, 5\), got \(1, 5\)",
        ),
        (
            "GRU",
            torch.zeros(T, C),
            torch.zeros(1, 1, H),
            ValueError,
            r"hx: expected shape .* = \(1, 5\), got \(1, 1, 5\)",
        ),
        ("GRU", torch.zeros(T, B, C), torch.zeros(1, 4, H), ValueError, r"hx: expected shape .* = \(1, 3, 5\), got"),
        ("GRU", torch.zeros(T, B, C), (torch.zeros(1, B, H),) * 2, TypeError, "hx: expected a tensor, got tuple"),
        (
            "LSTM",
            torch.zeros(T, B, C),
            (torch.zeros(1, B, H), torch.zeros(1, B, 2)),
            ValueError,
            r"hx\[1\]: expected shape",
        ),
        ("LSTM", torch.zeros(T, B, C), torch.zeros(1, B, H), TypeError, r"hx: expected a pair \(h, c\), got Tensor"),
        ("GRU", pack_sequence([torch.zeros(2, C)]), torch.zeros(1, 2, H), ValueError, r"hx: .* = \(1, 1, 5\), got"),
        ("GRU", torch.zeros(T, B, C).long(), None, TypeError, "input: expected a floating-point tensor"),
        (
            "GRU",
            torch.zeros(T, B, C),
            torch.zeros(1, B, H).double(),
            TypeError,
            "hx: expected the dtype of the weights",
        ),
        (
            "LSTM",
            torch.zeros(T, B, C),
            (torch.zeros(1, B, H), torch.zeros(1, B, H).half()),
            TypeError,
            r"hx\[1\]: expected the dtype of the weights, torch.float32, got torch.float16",
        ),
        (
            "GRU",
            torch.zeros(T, B, C),
            torch.zeros(1, B, H, device="meta"),
            ValueError,
            "hx: expected the device of the weights, cpu, got meta",
        ),
        ("GRU", PackedSequence(torch.zeros(5, C), torch.tensor([3, 1])), None, ValueError, r"5 rows, got \[3, 1\]"),
        ("GRU", PackedSequence(torch.zeros(5, C), torch.tensor([2, 3])), None, ValueError, r"5 rows, got \[2, 3\]"),
        ("LSTM", PackedSequence(torch.zeros(3, C), torch.tensor([2, 1, 0])), None, ValueError, r"got \[2, 1, 0\]"),
        ("LSTM", PackedSequence(torch.zeros(0, C), torch.tensor([]).long()), None, ValueError, r"0 rows, got \[\]"),
    ],
)
def test_invalid_inputs_raise(name, input, hx, error, text):
    with pytest.raises(error, match=text):
        getattr(nn, name)(C, H)(input, hx)


@pytest.mark.parametrize("name", BOTH)
def test_autocast_rejects_float64_and_integer_inputs(name):
    layer = getattr(nn, name)(C, H)
    states = torch.zeros(1, B, H).double()
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(TypeError, match="input: expected the dtype of the weights"):
            layer(torch.zeros(T, B, C).double())
        with pytest.raises(TypeError, match="input: expected a floating-point tensor"):
            layer(torch.zeros(T, B, C).long())
        with pytest.raises(TypeError, match=r"hx(\[0\])?: expected the dtype of the weights"):
            layer(torch.zeros(T, B, C), (states, states) if name == "LSTM" else states)


@pytest.mark.parametrize("name", BOTH)
def test_meta_tensors_have_shapes_and_derivatives(name):
    theirs, ours = pair(name, num_layers=2)
    wanted = derivatives(theirs, normal(T, B, C))
    for a, b in zip(derivatives(ours.to("meta"), normal(T, B, C, device="meta")), wanted, strict=True):
        assert a.device.type == "meta"
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_invalid_constructor_arguments_raise_as_in_torch():
    with pytest.raises(ValueError, match="proj_size has to be smaller than hidden_size"):
        nn.LSTM(C, H, proj_size=H)
    with pytest.raises(ValueError, match="dropout should be a number in range"):
        nn.GRU(C, H, 2, dropout=1.5)
    with pytest.raises(ValueError, match="proj_size argument is only supported for LSTM"):
        nn.GRU(C, H, proj_size=2)
