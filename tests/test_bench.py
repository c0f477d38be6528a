"""``fastgen bench``: equivalence of the compared calls, results and errors; ``fastgen.testing``."""

from __future__ import annotations

import doctest
import json

import pytest
import torch

import fastgen
from fastgen import backend, testing
from fastgen.bench import runner as _bench
from fastgen.bench.cases import cases
from fastgen.testing import largest_error

CPU = torch.device("cpu")
LENGTH = 16


def flat(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)


@pytest.mark.parametrize("name", [name for name in cases(CPU) if not name.startswith("latent")])
def test_compared_implementations_are_equivalent(name):
    ours, peer = cases(CPU, LENGTH)[name].make()
    for mine, theirs in zip(flat(ours()), flat(peer()), strict=True):
        assert largest_error(mine, theirs) <= 1e-4 * max(1.0, float(theirs.abs().max()))


def test_latent_kl_matches_the_formula():
    ours, peer = cases(CPU, LENGTH)["latent-forward"].make()
    torch.testing.assert_close(ours()[1], peer()[1])


def test_every_case_is_reported_and_json_serializable():
    reported = []
    rows = _bench.run(rounds=1, length=LENGTH, on_row=reported.append)
    assert reported == rows
    assert [row.name for row in rows] == list(cases(CPU))
    for row in rows:
        assert row.ratio == pytest.approx(row.peer_ms / row.ours_ms)
        assert f"{row.ratio:.2f} x" in _bench.line(row)
    report = json.loads(json.dumps(_bench.as_dict(rows)))
    assert report["rows"][0]["peer"] == "F.scaled_dot_product_attention"
    assert report["machine"]["versions"]["torch"] in _bench.describe_machine()


def test_reported_kernels_are_those_that_ran():
    with fastgen.use_backend("torch"):
        (row,) = _bench.run(["latent-forward"], rounds=2, length=LENGTH)
    assert row.kernels == []
    assert "no fused kernel" in _bench.line(row)
    (row,) = _bench.run(["latent-forward"], rounds=2, length=LENGTH)
    compiled = backend.why_not_compiled("latent_forward", CPU) is None
    assert row.kernels == (["fastgen::latent_forward"] if compiled else [])
    assert row.ours_quartiles_ms[0] <= row.ours_ms <= row.ours_quartiles_ms[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only": ["attention", "fastest"]}, "only: expected some of attention-unequal-forward, .* got 'fastest'"),
        ({"rounds": 0}, "rounds: expected a positive number, got 0"),
        ({"length": -1}, "length: expected a positive number, got -1"),
        ({"device": "meta"}, "device: expected cpu or cuda, got meta"),
    ],
)
def test_invalid_options_raise(options, message):
    with pytest.raises(ValueError, match=message):
        _bench.run(**options)


def test_docstring_examples_of_testing():
    results = doctest.testmod(testing)
    assert results.attempted > 0
    assert results.failed == 0
