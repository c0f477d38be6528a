"""What ``accelerate`` and ``restore`` promise for a model of another library. Not a test module itself.

A test module of a library derives a class from ``Contract`` and has a fixture ``case``.
"""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastgen
from fastgen import functional


@dataclass
class Case:
    """A tiny random model with inputs.

    Attributes:
        build: the model.
        inputs: keyword arguments of a call; the first is differentiated.
        replaced: number of redirected modules.
        kept: number of modules that are named in the report with a reason.
        r1_before, jvp_before: whether the original has these derivatives.
        note: what is particular about it, for the table.
        float32_factor: largest error in float32, as a multiple of the original's.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    replaced: int
    kept: int = 0
    r1_before: bool = False
    jvp_before: bool = False
    note: str = ""
    float32_factor: float = 2.0


def rows_of(library: str, cases: list[Case]) -> list[str]:
    """Rows of the table of docs/integrations.md: library, model, outputs, gradients, R1, JVP, generate, compile."""
    derivatives = {False: "raises / works", True: "works / works"}
    return [
        f"| {library} | {case.name}{f' ({case.note})' if case.note else ''} | equal | equal"
        f" | {derivatives[case.r1_before]} | {derivatives[case.jvp_before]} | - | one graph |"
        for case in cases
    ]


class Model:
    """A case's model, in eval mode, with random parameters (libraries initialize some to 0), and its inputs."""

    def __init__(self, case: Case, dtype: torch.dtype = torch.float64):
        torch.manual_seed(0)
        self.module = case.build().eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        self.module.to(dtype)
        inputs = case.inputs()
        cast = {
            name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in inputs.items()
        }
        self.name = next(iter(cast))
        self.x = cast.pop(self.name).requires_grad_()
        self.others = cast
        self.parameters = list(self.module.parameters())

    def __call__(self, x: Tensor | None = None, module: nn.Module | None = None) -> Tensor:
        out = (self.module if module is None else module)(**{self.name: self.x if x is None else x}, **self.others)
        out = out[0] if isinstance(out, tuple) else out
        return out if isinstance(out, Tensor) else out.sample

    def gradients(self, module: nn.Module | None = None) -> list[Tensor]:
        loss = self(module=module).square().sum()
        return list(torch.autograd.grad(loss, [self.x, *self.parameters], materialize_grads=True))

    def backward(self) -> list[Tensor]:
        """As ``gradients``, by the only way that reentrant checkpointing supports."""
        for leaf in (self.x, *self.parameters):
            leaf.grad = None
        self().square().sum().backward()
        return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in (self.x, *self.parameters)]

    def r1(self) -> list[Tensor]:
        """Gradients of the gradient penalty."""
        (gradient,) = torch.autograd.grad(self().sum(), self.x, create_graph=True)
        return list(torch.autograd.grad(gradient.square().sum(), self.parameters, materialize_grads=True))

    def jvp(self) -> Tensor:
        direction = torch.linspace(-1, 1, self.x.numel(), dtype=self.x.dtype).view(self.x.shape)
        return torch.func.jvp(self, (self.x.detach(),), (direction,))[1]

    def double_backward_jvp(self) -> Tensor:
        direction = torch.linspace(-1, 1, self.x.numel(), dtype=self.x.dtype).view(self.x.shape)
        return torch.autograd.functional.jvp(self, self.x.detach(), direction, create_graph=True)[1]


def snapshot(module: nn.Module) -> dict[str, Any]:
    """What must be the same objects after ``restore``."""
    return {
        name: (type(part), {key: id(value) for key, value in vars(part).items()})
        for name, part in module.named_modules(remove_duplicate=False)
    }


def assert_equal(actual: list[Tensor], expected: list[Tensor], tolerance: float = 1e-12) -> None:
    """Equal up to the rounding of float64, relative to the largest element of each tensor."""
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * max(1.0, float(b.detach().abs().max())))


def math_backend() -> Any:
    return nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH)


class Contract:
    """Tests of a ``case``."""

    def test_outputs_gradients_and_state_are_preserved(self, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
        model = Model(case)
        module = model.module
        before, gradients, objects = model().detach(), model.gradients(), snapshot(module)
        state = {name: value.clone() for name, value in module.state_dict().items()}

        report = fastgen.accelerate(module)
        assert len(report.replaced) == case.replaced, report
        assert len(report.kept) == case.kept, report
        calls = []
        attention = functional.scaled_dot_product_attention
        monkeypatch.setattr(
            functional, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or attention(*a, **k)
        )
        assert_equal([model()], [before])
        assert len(calls) == case.replaced
        assert_equal(model.gradients(), gradients)
        assert list(module.state_dict()) == list(state)
        assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
        assert all(a is b for a, b in zip(module.parameters(), model.parameters, strict=True))

        calls.clear()
        back = fastgen.restore(module)
        assert back.replaced.keys() == report.replaced.keys()
        assert snapshot(module) == objects
        assert torch.equal(model(), before)
        assert not calls

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_low_precision_error_is_of_the_size_of_the_original(self, case: Case, dtype: torch.dtype) -> None:
        """Outputs and each gradient. Gradients of a few numbers (temperatures) are compared as one: the largest error
        of two or four numbers is a matter of luck."""

        def results(model: Model) -> list[Tensor]:
            tensors = [model().detach(), *model.gradients()]
            few = [tensor.flatten() for tensor in tensors if tensor.numel() < 16]
            return [tensor for tensor in tensors if tensor.numel() >= 16] + ([torch.cat(few)] if few else [])

        expected = results(Model(case))
        model = Model(case, dtype)
        original = results(model)
        fastgen.accelerate(model.module)
        actual = results(model)
        factor = case.float32_factor if dtype == torch.float32 else 2
        for a, b, c in zip(actual, original, expected, strict=True):
            allowance = torch.finfo(dtype).eps * c.abs().max()
            assert (a - c).abs().max() <= factor * (b - c).abs().max() + allowance

    def test_gradient_penalty(self, case: Case) -> None:
        model = Model(case)
        if case.r1_before:
            expected = model.r1()
        else:
            with pytest.raises(RuntimeError, match="is not implemented"):
                model.r1()
            with math_backend():
                expected = model.r1()
        fastgen.accelerate(model.module)
        assert_equal(model.r1(), expected, tolerance=1e-11)
        fastgen.restore(model.module)
        if not case.r1_before:
            with pytest.raises(RuntimeError, match="is not implemented"):
                model.r1()

    def test_forward_mode(self, case: Case) -> None:
        model = Model(case)
        with math_backend():
            expected = model.double_backward_jvp().detach()
        if not case.jvp_before:
            with pytest.raises(NotImplementedError, match="forward AD"):
                model.jvp()
        fastgen.accelerate(model.module)
        assert_equal([model.jvp(), model.double_backward_jvp().detach()], [expected, expected])

    def test_gradient_checkpointing(self, case: Case) -> None:
        model = Model(case)
        module = model.module
        switch = getattr(module, "enable_gradient_checkpointing", getattr(module, "set_grad_checkpointing", None))
        if switch is None:
            pytest.skip("the library has no gradient checkpointing")
        for part in model.module.modules():  # train() without what is random or depends on the batch then
            part.training = not re.search("drop|batchnorm|label", type(part).__name__, re.IGNORECASE)
        try:
            switch()
            expected = model.backward()
        except Exception as error:
            pytest.skip(f"the library's own checkpointing fails: {error}")
        fastgen.accelerate(model.module)
        assert_equal(model.backward(), expected)

    def test_one_graph_under_compile(self, case: Case) -> None:
        model = Model(case)
        expected = [model().detach(), *model.gradients()]
        fastgen.accelerate(model.module)
        torch._dynamo.reset()
        compiled = torch.compile(model.module, fullgraph=True, backend="aot_eager")
        assert_equal([model(module=compiled).detach(), *model.gradients(compiled)], expected)

    def test_copies_and_pickles(self, case: Case) -> None:
        model = Model(case)
        module = model.module
        before = model().detach()

        def copies() -> list[nn.Module]:
            file = io.BytesIO()
            torch.save(module, file)
            file.seek(0)
            return [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False)]

        originals = {name: type(part) for name, part in module.named_modules()}
        for accelerated in (False, True, False):
            if accelerated:
                fastgen.accelerate(module)
            else:
                fastgen.restore(module)
            classes = {name: type(part) for name, part in module.named_modules()}
            assert (classes == originals) == (not accelerated)
            for other in copies():
                assert {name: type(part) for name, part in other.named_modules()} == classes
                assert_equal([model(module=other).detach()], [before])
                fastgen.restore(other)
                assert {name: type(part) for name, part in other.named_modules()} == originals
                assert torch.equal(model(module=other), before)
