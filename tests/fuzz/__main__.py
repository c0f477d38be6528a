"""Calls every raw operator and public function with random arguments, valid and not: python -m tests.fuzz --calls 1000

Every call has its own seed. A call must raise TypeError, ValueError or RuntimeError, or return results of the right
shape, and not change its arguments. Valid arguments must not raise; for finite ones the results are finite and close to
those of the plain formulas. Tensors end at a page boundary, so that an access beyond them kills the process; the log
then names the call. ``make fuzz`` runs this with a library instrumented by AddressSanitizer and UBSan.

A failure prints its seed: --seed S --calls 1 replays it.
"""

from __future__ import annotations

import argparse
import collections
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen import functional
from tests.fuzz import functions, operators
from tests.fuzz.draw import Draw, describe, spoilt

NAMESPACES = ("fastgen", "fastgen_torch")
ALLOWED = (TypeError, ValueError, RuntimeError)
WRITES = {
    "cpu_attention_weights": (0, 1, 4, 6),
    "cpu_attention_softmax": (0, 2),
    "cpu_attention_softmax_backward": (0, 1),
}
"""Operators that work in place, and the positions of the arguments that they write."""

ERRORS = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}
SECONDS = 120


class Failed(AssertionError):
    """A call violated the contract."""


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def _near(name: str, actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Relative to the largest value; non-finite values must be at the same positions."""
    allowed = max(ERRORS[dtype], ERRORS[actual.dtype])
    actual, expected = actual.detach().double(), expected.detach().double()
    if not torch.equal(actual.isfinite(), expected.isfinite()):
        raise Failed(f"{name}: finite at other places than expected")
    seen = expected.isfinite()
    error = float((actual - expected)[seen].abs().max()) if bool(seen.any()) else 0.0
    size = max(1.0, float(expected[seen].abs().max()) if bool(seen.any()) else 0.0)
    if error > allowed * size:
        raise Failed(f"{name}: expected an error below {allowed * size:.1e}, got {error:.1e}")


def _check_shapes(results: list[Tensor], shapes: operators.Shapes) -> None:
    found = [tuple(result.shape) for result in results]
    if found != [tuple(shape) for shape in shapes]:
        raise Failed(f"expected shapes {shapes}, got {found}")


class _Log:
    """Where the call is written before it is made."""

    def __init__(self, path: Path | None) -> None:
        self.file = None if path is None else path.open("w")

    def write(self, text: str) -> None:
        if self.file is not None:
            self.file.seek(0)
            self.file.write(text)
            self.file.truncate()
            self.file.flush()


class Fuzzer:
    def __init__(self, log: Path | None = None, only: str = "", emulated: bool = False) -> None:
        """``emulated``: the CUDA kernels, in the emulator, which has checks of its own and knows PyTorch's memory."""
        self.log, self.emulated = _Log(log), emulated
        public = [] if emulated else [(name, False) for name in functions.VALID if only in name]
        raw = [(n, True) for n in operators.VALID if only in n and not (emulated and n.startswith("cpu_"))]
        self.names = raw + public
        self.done: collections.Counter[str] = collections.Counter()

    def call(self, seed: int) -> None:
        """One call; raises ``Failed``."""
        draw = Draw(seed, guard=not self.emulated)
        name, raw = draw.one(self.names)
        try:
            self._operator(draw, seed, name) if raw else self._function(draw, seed, name)
        except Failed as error:
            raise Failed(f"seed {seed}: {self.text}: {error}") from None
        except Exception as error:  # of what a result is compared with, or of the fuzzer
            raise Failed(f"seed {seed}: {self.text}: {type(error).__name__} around the call: {error}") from error

    def _spoil(self, draw: Draw, arguments: list[Any], options: dict[str, Any]) -> bool:
        """Changes some of the arguments; whether it did."""
        if draw.chance(0.4):
            return False
        for _ in range(draw.one((1, 1, 2, 3))):
            others = list(tensors_in([arguments, options]))
            if options and draw.chance(0.4):
                name = draw.one(list(options))
                options[name] = spoilt(draw, options[name], others)
            else:
                at = draw.random.randrange(len(arguments))
                arguments[at] = spoilt(draw, arguments[at], others)
        return True

    def _run(self, name: str, run: Any, valid: bool) -> Any:
        """The result; None where it raised what it may."""
        try:
            result = run()
        except ALLOWED as error:
            self.done[f"{name} raised"] += 1
            if valid or "emulator: " in str(error):
                raise Failed(f"raised {type(error).__name__}: {error}") from None
            return None
        except Exception as error:
            raise Failed(f"raised {type(error).__name__}: {error}") from None
        self.done[f"{name} returned"] += 1
        return result

    def _operator(self, draw: Draw, seed: int, name: str) -> None:
        self.text = f"{name}: making valid arguments"
        arguments, shapes = operators.VALID[name](draw)
        draw.may_free = True
        valid = not self._spoil(draw, arguments, {})
        namespace = "fastgen_emulated" if self.emulated else draw.one(NAMESPACES)
        if name.startswith("latent") and any(t.dtype == torch.float64 for t in tensors_in(arguments)) and valid:
            namespace = "fastgen_torch"  # compiled kernels do not take it
        self.text = f"{namespace}.{name}{describe(arguments)}"
        self.log.write(f"seed {seed}: {self.text}\n")
        before = [t.clone() for t in tensors_in(arguments)] if valid else []
        # Kernels of GPUs do not take all that fits.
        result = self._run(
            name, lambda: getattr(getattr(torch.ops, namespace), name)(*arguments), valid and not self.emulated
        )
        if not valid or (result is None and shapes):
            return
        found = list(tensors_in(result))
        _check_shapes(found, shapes)
        written = [arguments[at] for at in WRITES.get(name, ())]
        for was, argument in zip(before, tensors_in(arguments), strict=True):
            if not any(argument is t for t in written) and not torch.equal(was.nan_to_num(), argument.nan_to_num()):
                raise Failed(f"an argument was written to, {describe(argument)}")
        if draw.plain:
            dtype = next((t.dtype for t in before if t.is_floating_point()), torch.float32)
            if self.emulated and dtype == torch.float32:
                dtype = torch.bfloat16  # tf32, and second derivatives cancel
            self._compare(name, arguments, before, [*found, *tensors_in(written)], dtype)

    def _compare(
        self, name: str, arguments: list[Any], before: list[Tensor], found: list[Tensor], dtype: torch.dtype
    ) -> None:
        """With the PyTorch implementation in float64."""
        copies = iter(before)

        def wide(value: Any) -> Any:
            if isinstance(value, Tensor):
                tensor = next(copies)
                wide_too = {"dtype": torch.float64, "memory_format": torch.contiguous_format}
                return tensor.to(**wide_too) if tensor.is_floating_point() else tensor
            return [wide(item) for item in value] if isinstance(value, list) else value

        again = [wide(value) for value in arguments]
        expected = list(tensors_in(getattr(torch.ops.fastgen_torch, name)(*again)))
        expected += list(tensors_in([again[at] for at in WRITES.get(name, ())]))
        for at, (a, b) in enumerate(zip(found, expected, strict=True)):
            _near(f"result {at}", a, b, dtype)

    def _function(self, draw: Draw, seed: int, name: str) -> None:
        call = functions.VALID[name](draw)
        arguments, options = call.arguments, dict(call.options)
        valid = not self._spoil(draw, arguments, options)
        self.text = f"functional.{name}{describe(arguments)}, {describe(options)}"
        self.log.write(f"seed {seed}: {self.text}\n")
        function = getattr(functional, name)
        result = self._run(name, lambda: function(*arguments, **options), valid)
        if result is None:
            return
        found = list(tensors_in(result))
        if valid:
            _check_shapes(found, call.shapes)
            dtype = next(tensors_in(arguments)).dtype
            if draw.plain and call.expected is not None:
                for at, (a, b) in enumerate(zip(found, call.expected(), strict=True)):
                    _near(f"result {at}", a, b, dtype)
        leaves = [t for t in tensors_in([arguments, options]) if t.requires_grad]
        outputs = [t for t in found if t.requires_grad]
        if not outputs or any(t.is_meta for t in outputs):
            return
        upstream = [draw.tensor(*t.shape, dtype=t.dtype) for t in outputs]
        double_backward = draw.chance(0.2)
        gradients = self._run(
            f"{name} backward",
            lambda: torch.autograd.grad(outputs, leaves, upstream, create_graph=double_backward, allow_unused=True),
            valid,
        )
        for leaf, gradient in zip(leaves, gradients or (), strict=gradients is not None):
            if gradient is not None and gradient.shape != leaf.shape:
                raise Failed(f"expected a gradient of shape {tuple(leaf.shape)}, got {tuple(gradient.shape)}")
            finite = valid and draw.plain and gradient is not None and leaf.dtype in (torch.float32, torch.float64)
            if finite and not bool(gradient.isfinite().all()):
                raise Failed(f"expected a finite gradient, of {describe(leaf)}")
        again = [g for g in gradients or () if g is not None and g.requires_grad]
        if again and double_backward:
            self._run(
                f"{name} double backward",
                lambda: torch.autograd.grad(sum(g.sum() for g in again), leaves, allow_unused=True),
                valid,
            )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first call; each further call adds 1")
    parser.add_argument("--only", default="", help="names that contain this")
    parser.add_argument(
        "--log", type=Path, default=None, help="the call being made, for the case that it ends the process"
    )
    parser.add_argument("--emulated", action="store_true", help="the CUDA kernels, in the emulator")
    parser.add_argument("--keep-going", action="store_true", help="print failures and go on")
    options = parser.parse_args()
    fuzzer, failures, started = Fuzzer(options.log, options.only, options.emulated), 0, time.monotonic()
    torch.set_num_threads(1)
    if options.emulated:
        from tests.emulator import build

        build.register()
        build.track_tensors(True)
    for seed in range(options.seed, options.seed + options.calls):
        signal.alarm(SECONDS)
        try:
            fuzzer.call(seed)
        except Failed as error:
            failures += 1
            print(error, flush=True)
            if not options.keep_going:
                break
    signal.alarm(0)
    for name, count in sorted(fuzzer.done.items()):
        print(f"{count:7d} {name}")
    print(
        f"{sum(fuzzer.done.values())} results of {options.calls} calls from seed {options.seed} on,"
        f" {failures} failures, {time.monotonic() - started:.0f} s, pid {os.getpid()}"
    )
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
