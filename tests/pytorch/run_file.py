"""Runs tests of one of PyTorch's test files, and writes the outcome of each, a JSON object per line.

    python -m tests.pytorch.run_file CHECKOUT/test/test_transformers.py --select 'TestTransformers' --out own.jsonl
    python -m tests.pytorch.run_file CHECKOUT/test/test_transformers.py --out fastgen.jsonl --fastgen

With ``--fastgen``, torch's function and layers are replaced before the file is imported. A test that expects an error
then also accepts one that fastgen raised (``is_own_error``): its class and its text differ by design.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import re
import sys
import traceback
import unittest
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

LAYERS = (
    "GRU",
    "LSTM",
    "MultiheadAttention",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
)
"""The layers of ``fastgen.nn`` that replace layers of ``torch.nn``."""


def install_fastgen() -> None:
    """Puts fastgen's function and layers in the place of torch's, wherever torch has a name for them.

    In tests that compare a kernel with the formula ("vs_math"), the function remains torch's where
    ``sdpa_kernel(SDPBackend.MATH)`` chooses the formula.
    """
    import torch
    from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

    import fastgen.nn

    own = {getattr(torch.nn, name): getattr(fastgen.nn, name) for name in LAYERS}
    modules = torch.nn.modules
    for module in (torch.nn, modules, modules.activation, modules.rnn, modules.transformer):
        for name in LAYERS:
            if getattr(module, name, None) in own:
                setattr(module, name, own[getattr(module, name)])

    torchs = torch.nn.functional.scaled_dot_product_attention

    @functools.wraps(fastgen.functional.scaled_dot_product_attention)
    def attention(*args: Any, **options: Any) -> Any:
        math = "vs_math" in Outcomes.running and _cur_sdpa_kernel_backends() == [SDPBackend.MATH]
        return (torchs if math else fastgen.functional.scaled_dot_product_attention)(*args, **options)

    torch.nn.functional.scaled_dot_product_attention = attention


_OWN_TEXT = re.compile(r"[\w.\[\], ]+: expected .+, got ", re.DOTALL)


def is_own_error(error: BaseException | None) -> bool:
    """Whether the error has fastgen's form, "name: expected ..., got ...", and was raised in fastgen.

    An argument that torch refuses with a ``RuntimeError`` or a failed ``assert`` is a ``TypeError`` or ``ValueError``.
    """
    import fastgen

    if not isinstance(error, (TypeError, ValueError)) or not _OWN_TEXT.match(str(error)):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(Path(fastgen.__file__).parent)


def accept_own_errors(seen: list[str]) -> None:
    """Lets ``assertRaises`` accept fastgen's errors; ``seen`` collects those of another class or text."""
    context: Any = unittest.case._AssertRaisesContext  # type: ignore[attr-defined]
    enter, leave = context.__enter__, context.__exit__

    def enter_counting(self: Any) -> Any:
        self.seen_before = len(seen)
        return enter(self)

    def exit_accepting(self: Any, kind: Any, error: Any, trace: Any) -> Any:
        if error is None and len(seen) > self.seen_before:  # a nested assertRaises accepted it
            return True
        if not is_own_error(error):
            return leave(self, kind, error, trace)
        self.exception = error.with_traceback(None)
        pattern = self.expected_regex
        if not issubclass(kind, self.expected) or (pattern is not None and not pattern.search(str(error))):
            seen.append(f"{kind.__name__}: {error}")
        return True

    context.__enter__, context.__exit__ = enter_counting, exit_accepting


class Outcomes(unittest.TestResult):
    """Writes a line when a test starts, so that a crash has a name, and one with its outcome."""

    running = ""

    def __init__(self, file: TextIO, own_errors: list[str]) -> None:
        super().__init__()
        self.file = file
        self.own_errors = own_errors
        self.outcome: tuple[str, str] = ("passed", "")

    def startTest(self, test: unittest.TestCase) -> None:
        super().startTest(test)
        self.outcome = ("passed", "")
        self.own_errors.clear()
        Outcomes.running = name_of(test)
        self._write(test, "started", "")

    def stopTest(self, test: unittest.TestCase) -> None:
        super().stopTest(test)
        self._write(test, *self.outcome)

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:
        self.outcome = ("skipped", reason)

    def addExpectedFailure(self, test: unittest.TestCase, err: Any) -> None:
        self.outcome = ("expected failure", "")

    def addUnexpectedSuccess(self, test: unittest.TestCase) -> None:
        self.outcome = ("failed", "expected to fail, and passed")

    def addError(self, test: unittest.TestCase, err: Any) -> None:
        self.outcome = ("failed", "".join(traceback.format_exception(*err)))

    addFailure = addError

    def addSubTest(self, test: unittest.TestCase, subtest: unittest.TestCase, err: Any) -> None:
        if err is not None:
            self.addError(test, err)

    def _write(self, test: unittest.TestCase, outcome: str, message: str) -> None:
        line = {"test": name_of(test), "outcome": outcome, "message": message, "own_errors": self.own_errors}
        print(json.dumps(line), file=self.file, flush=True)


def name_of(test: unittest.TestCase) -> str:
    return f"{type(test).__name__}.{test._testMethodName}"


def tests_of(suite: unittest.TestSuite) -> Iterator[unittest.TestCase]:
    for test in suite:
        if isinstance(test, unittest.TestSuite):
            yield from tests_of(test)
        else:
            yield test


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--select", default="", help="regular expression searched for in Class.test")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--fastgen", action="store_true")
    args = parser.parse_args()

    # PyTorch's helpers parse the command line when they are imported, and run their tests on each device they find.
    sys.argv = [str(args.path)]
    os.environ.setdefault("PYTORCH_TESTING_DEVICE_ONLY_FOR", "cpu")
    path = args.path.resolve()
    sys.path[:0] = [str(path.parent), str(path.parent.parent)]
    own_errors: list[str] = []
    if args.fastgen:
        install_fastgen()
        accept_own_errors(own_errors)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    loaded = unittest.TestLoader().loadTestsFromModule(module)
    chosen = [test for test in tests_of(loaded) if re.search(args.select, name_of(test))]
    with args.out.open("w") as file:
        unittest.TestSuite(chosen).run(Outcomes(file, own_errors))


if __name__ == "__main__":
    main()
