"""The runner of PyTorch's tests, on a file that passes with torch and partly fails with fastgen."""

from __future__ import annotations

import pytest

from tests.pytorch import test_pytorch as runner
from tests.pytorch.test_pytorch import run

FILE = """
import unittest
from unittest import mock

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

q = torch.randn(2, 3, 4)


class Test(unittest.TestCase):
    def test_values(self):
        with sdpa_kernel(SDPBackend.MATH):
            expected = F.scaled_dot_product_attention(q, q, q)
        torch.testing.assert_close(F.scaled_dot_product_attention(q, q, q), expected)

    def test_kernel_vs_math(self):
        with sdpa_kernel(SDPBackend.MATH), self.assertRaisesRegex(RuntimeError, "is_causal"):
            F.scaled_dot_product_attention(q, q, q, torch.ones(3, 3).bool(), is_causal=True)

    def test_argument_of_torch_alone(self):
        with self.assertRaises(RuntimeError):
            F.scaled_dot_product_attention(q, q, q, torch.ones(3, 3).bool(), is_causal=True)

    def test_other_error(self):
        with self.assertRaisesRegex(RuntimeError, "same dtype"):
            F.scaled_dot_product_attention(q, q.double(), q)

    def test_nested_other_error(self):
        with self.assertRaises(AssertionError), self.assertRaises(RuntimeError):
            torch.nn.MultiheadAttention(4, 3)

    def test_error_that_is_not_an_argument_error(self):
        with self.assertRaises(RuntimeError):
            F.scaled_dot_product_attention(q, q, q)

    def test_internal_layers(self):
        with mock.patch("torch._native_multi_head_attention", return_value=(q, None)) as kernel, torch.no_grad():
            torch.nn.MultiheadAttention(4, 2, batch_first=True).eval()(q, q, q)
        self.assertTrue(kernel.called)

    @unittest.skip("as it says")
    def test_skipped(self):
        pass

    @unittest.expectedFailure
    def test_expected_failure(self):
        self.fail()

    def test_subtests(self):
        with self.subTest():
            self.fail()

    def other(self):
        pass
"""


@pytest.mark.slow
def test_outcomes(tmp_path):
    path = tmp_path / "test_some_things.py"
    path.write_text(FILE)
    torchs = run(path, "", tmp_path / "torch.jsonl")
    fastgens = run(path, "", tmp_path / "fastgen.jsonl", "--fastgen")
    same = {
        "values": "passed",
        "kernel_vs_math": "passed",
        "other_error": "passed",
        "nested_other_error": "passed",
        "error_that_is_not_an_argument_error": "failed",
        "skipped": "skipped",
        "expected_failure": "expected failure",
        "subtests": "failed",
    }
    differing = {"argument_of_torch_alone": ("passed", "failed"), "internal_layers": ("passed", "failed")}
    expected = {name: (outcome, outcome) for name, outcome in same.items()} | differing
    seen = {test.removeprefix("Test.test_"): (outcome, fastgens[test][0]) for test, (outcome, *_) in torchs.items()}
    assert seen == expected
    assert [test for test, (_, _, own) in fastgens.items() if own] == [
        "Test.test_nested_other_error",
        "Test.test_other_error",
    ]
    assert run(path, "values", tmp_path / "one.jsonl").keys() == {"Test.test_values"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "text"),
    [("import os; os._exit(3)", r"ended with 3 in Test\.test_last"), ("pass", "no test that matches 'other'")],
)
def test_crashes_and_empty_selections_are_failures(code, text, tmp_path):
    path = tmp_path / "test_some_things.py"
    path.write_text(f"import unittest\nclass Test(unittest.TestCase):\n    def test_last(self):\n        {code}\n")
    with pytest.raises(AssertionError, match=text):
        run(path, "" if "exit" in code else "other", tmp_path / "out.jsonl")


@pytest.mark.parametrize(
    ("outcomes", "entries", "text"),
    [
        ({"A.x": "passed"}, {}, None),
        ({"A.x": "failed"}, {}, "1 tests of test_nn.py fail with fastgen only"),
        ({"A.x": "skipped"}, {}, "fail with fastgen only"),
        ({"A.x": "failed"}, {"A.x$": ""}, None),
        ({"A.x": "passed"}, {"A.x$": ""}, "lists tests of test_nn.py that pass: A.x"),
        ({"A.x": "failed", "A.y": "passed"}, {"A[.]": ""}, None),
        ({"A.x": "passed"}, {"A.broken": "", "A.gone": ""}, None),
    ],
)
def test_new_failures_and_entries_that_pass_are_failures(outcomes, entries, text, tmp_path, monkeypatch):
    torchs = {"A.broken": ("failed", "", []), **{test: ("passed", "", []) for test in outcomes}}
    fastgens = {"A.broken": ("failed", "", []), **{test: (outcome, "", []) for test, outcome in outcomes.items()}}
    monkeypatch.setattr(runner, "run", lambda *arguments: fastgens if "--fastgen" in arguments else torchs)
    monkeypatch.setattr(runner, "DIFFERENCES", {"test_nn.py": entries})
    (tmp_path / "test_nn.py").touch()
    compare = runner.test_pytorchs_tests_pass_with_fastgen_in_its_place
    if text is None:
        compare("test_nn.py", tmp_path, tmp_path)
    else:
        with pytest.raises(AssertionError, match=text):
            compare("test_nn.py", tmp_path, tmp_path)
