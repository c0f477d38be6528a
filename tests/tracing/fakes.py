"""Runs each case of calls.py on fake tensors of a GPU that this machine lacks, forward and backward.

    python -m tests.tracing.fakes [GUARD]

GUARD: the library of device_guard.cpp. Prints JSON: by the state of the CUDA library ("absent", or "loaded" with a
kernel for every operator) and the backend, the outputs and gradients of each case, or the error. "cpu": the same on
real tensors.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastgen
from fastgen import backend
from fastgen.nn import SelfAttention2d
from tests.tracing.calls import CASES, tensors_of


def gradients(outputs: list[Tensor], leaves: list[Tensor]) -> list[Tensor | None]:
    """Gradients of the sum of the outputs, as ``torch.autograd.grad`` computes them. Its engine requires the device.

    Nodes are called in the order of the engine: after all that lead to them.
    """
    grads: dict[Any, dict[int, Tensor]] = defaultdict(dict)

    def add(node: Any, index: int, grad: Tensor) -> None:
        if hasattr(node, "_input_metadata"):  # the gradient of an operand that was broadcast
            grad = grad.sum_to_size(node._input_metadata[index].shape)
        grads[node][index] = grads[node][index] + grad if index in grads[node] else grad

    for output in outputs:
        if output.grad_fn is not None:
            add(output.grad_fn, output.output_nr, torch.ones_like(output))
    result: dict[int, Tensor] = {}
    while grads:
        node = max(grads, key=lambda node: -1 if hasattr(node, "variable") else node._sequence_nr())
        given = grads.pop(node)
        if hasattr(node, "variable"):
            result[id(node.variable)] = given[0]
            continue
        found = _call(node, [given.get(index) for index in range(len(node._input_metadata))])
        edges = node.next_functions
        if isinstance(node, torch.autograd.function.BackwardCFunction):  # has edges for tensors only
            edges = [edge for edge in edges if edge[0] is not None]
            found = tuple(grad for grad, wanted in zip(found, node.needs_input_grad, strict=False) if wanted)
        for (after, index), grad in zip(edges, found, strict=False):
            if after is not None and grad is not None:
                add(after, index, grad)
    return [result.get(id(leaf)) for leaf in leaves]


def by_autograd(outputs: list[Tensor], leaves: list[Tensor]) -> Sequence[Tensor | None]:
    recorded = [output for output in outputs if output.requires_grad]
    ones = [torch.ones_like(output) for output in recorded]
    return torch.autograd.grad(recorded, leaves, ones, allow_unused=True) if leaves else []


def _call(node: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    if not isinstance(node, torch.autograd.function.BackwardCFunction):
        found = node(*grads)
        return found if isinstance(found, tuple) else (found,)
    of_outputs = zip(grads, node._input_metadata, strict=True)
    found = node.apply(*(torch.zeros(m.shape, dtype=m.dtype) if grad is None else grad for grad, m in of_outputs))
    return found if isinstance(found, tuple) else (found,)


def described(tensor: Tensor | None) -> list[Any] | None:
    return None if tensor is None else [list(tensor.shape), str(tensor.dtype), tensor.device.type]


def run(name: str, device: str) -> dict[str, Any]:
    leaves: list[Tensor] = []

    def make(*sizes: int, dtype: torch.dtype | None = None, grad: bool = True) -> Tensor:
        if dtype is not None:
            return torch.zeros(sizes, dtype=dtype)
        leaf = torch.randn(sizes, requires_grad=grad)
        leaves.extend([leaf] if grad else [])
        return leaf

    with torch.device(device):
        outputs = tensors_of(CASES[name](make))
        found: Any
        try:
            found = [described(grad) for grad in (by_autograd if device == "cpu" else gradients)(outputs, leaves)]
        except RuntimeError as error:
            found = f"RuntimeError: {error}"
    return {"outputs": [described(output) for output in outputs], "gradients": found}


def pretend_library() -> torch.library.Library:
    """A loaded library with a CUDA kernel for every operator. Fake tensors never reach it."""
    library = torch.library.Library("fastgen", "IMPL")
    for names in backend.operators().values():
        for name in names:
            library.impl(name, lambda *arguments: sys.exit("a kernel was called"), "CUDA")
    backend.library_for("cuda").problem = None
    return library


def exported() -> list[str]:
    """Operators of fastgen in the exported graph of a layer on the GPU."""
    with torch.device("cuda"):
        layer = SelfAttention2d(32, pool=2)
        program = torch.export.export(layer, (torch.randn(2, 32, 4, 4),))
    devices = {node.meta["val"].device.type for node in program.graph.nodes if isinstance(node.meta.get("val"), Tensor)}
    assert devices == {"cuda"}, devices
    return sorted({str(node.target) for node in program.graph.nodes if "fastgen" in str(node.target)})


def refuse_initialization() -> None:
    raise RuntimeError("CUDA was initialized")


def run_all(device: str) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name in CASES:
        try:
            results[name] = run(name, device)
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"
    return results


def main(guard: str = "") -> None:
    kept: list[Any] = [ctypes.CDLL(guard)] if guard else []
    torch.cuda._lazy_init = refuse_initialization
    results = {"cpu": run_all("cpu")}
    for library in ("absent", "loaded"):
        if library == "loaded":
            kept.append(pretend_library())
        for name in ("auto", "compiled"):
            with fastgen.use_backend(name), FakeTensorMode(allow_non_fake_inputs=True):
                results[f"{library} {name}"] = run_all("cuda")
    with fastgen.use_backend("compiled"), FakeTensorMode(allow_non_fake_inputs=True):
        results["exported"] = {"operators": exported()}
    assert not torch.cuda.is_initialized()
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
