"""The second call of a session: attention against PyTorch's backends, in device time.

usage: python -m benchmarks.gpu.attention FOLDER [--limit 180]
Rows are written as they are measured, the most telling ones first; what the limit leaves out is named.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import roofline
from benchmarks.gpu import smoke
from benchmarks.gpu.session import REHEARSAL, ROOT, Session, machine
from benchmarks.gpu.timing import Call, measure
from benchmarks.shapes import ATTENTION_SHAPES, AttentionShape
from fastgen.functional import scaled_dot_product_attention as attention

ORDER = (
    "image-lm", "sagan-64", "long-causal", "dit-xl", "transgan-window", "char-lm", "swin-window", "long", "sagan-256",
    "vae-mid", "seq2seq", "decode",
)  # fmt: skip
COMPILED = ("image-lm", "dit-xl", "sagan-64")  # shapes with torch.compile as a peer
PASSES = {
    "forward": (roofline.FORWARD,),
    "backward": (roofline.BACKWARD,),
    "tangent": (roofline.FORWARD, roofline.TANGENT),
    "second order": (roofline.FORWARD, roofline.BACKWARD, roofline.TANGENT, roofline.SECOND_ORDER),
    "forward, compiled": (roofline.FORWARD,),
}
"""What is timed. Backward: the gradients alone. Tangent: jvp with the output. Second order: a step of an R1 penalty.
"forward, compiled" is forward against torch.compile, whose compilation takes long.
"""
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
MOST_SCORES = 2**31  # that are stored, by implementations that store them

Function = Callable[..., Tensor]


def tensors(shape: AttentionShape) -> tuple[list[Tensor], dict[str, Any]]:
    """Operands on the device, and the arguments of the mask."""
    device, dtype = smoke.device(), torch.bfloat16
    sizes = ((shape.queries, shape.key_dim), (shape.keys, shape.key_dim), (shape.keys, shape.value_dim))
    found = [torch.randn(shape.batch, shape.heads, *size, device=device).to(dtype) for size in sizes]
    if shape.mask == "causal":
        return found, {"is_causal": True}
    if shape.mask == "bias":
        bias = torch.randn(1, shape.heads, shape.queries, shape.keys, device=device).to(dtype)
        return found, {"attn_mask": bias}
    if shape.mask == "padding":
        lengths = torch.randint(shape.keys // 2, shape.keys + 1, (shape.batch, 1, 1, 1), device=device)
        return found, {"attn_mask": torch.arange(shape.keys, device=device) < lengths}
    return found, {}


def formula(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """Eager PyTorch, which stores the scores."""
    scores = query @ key.mT * query.size(-1) ** -0.5
    if is_causal:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~visible, float("-inf"))
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf")) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores.softmax(-1) @ value


def call_of(function: Function, what: str, shape: AttentionShape) -> Callable[[], Call]:
    """Makes a call of one pass on operands of its own."""

    def make() -> Call:
        operands, kwargs = tensors(shape)
        if what.startswith("forward"):

            def forward() -> Tensor:
                with torch.no_grad():
                    return function(*operands, **kwargs)

            return forward
        if what == "tangent":
            directions = tuple(one.flip(2) for one in operands)
            return lambda: torch.func.jvp(lambda *args: function(*args, **kwargs), tuple(operands), directions)
        for one in operands:
            one.requires_grad_()
        if what == "backward":
            out = function(*operands, **kwargs)
            upstream = torch.randn_like(out)
            return lambda: torch.autograd.grad(out, operands, upstream, retain_graph=True)

        def penalty() -> tuple[Tensor, ...]:
            out = function(*operands, **kwargs)
            grads = torch.autograd.grad(out.square().sum(), operands, create_graph=True)
            return torch.autograd.grad(torch.stack([grad.square().sum() for grad in grads]).sum(), operands)

        return penalty

    return make


def ours(*args: Tensor, **kwargs: Any) -> Tensor:
    with smoke.kernels():
        return attention(*args, **kwargs)


def forced(backend: SDPBackend) -> Function:
    def call(*args: Tensor, **kwargs: Any) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*args, **kwargs)

    return call


def peers(shape: AttentionShape, what: str) -> dict[str, Function]:
    """The implementations to compare with."""
    stored = shape.batch * shape.heads * shape.queries * shape.keys
    if what == "forward, compiled":
        return {"torch.compile": torch.compile(formula)}
    found: dict[str, Function] = {}
    if what in ("forward", "backward"):
        found = {name: forced(backend) for name, backend in BACKENDS.items() if name != "math"}
    if stored <= MOST_SCORES:
        found["math" if what != "tangent" else "eager"] = forced(SDPBackend.MATH) if what != "tangent" else formula
        if what == "forward":
            found["eager"] = formula
    return found


def agreement(shape: AttentionShape) -> float:
    """Largest difference of the forward result from PyTorch's, relative to the largest value."""
    operands, kwargs = tensors(shape)
    first, mask = [one[:1] for one in operands], kwargs.get("attn_mask")
    if mask is not None:
        kwargs = {"attn_mask": mask[:1]}
    exact_kwargs = {"attn_mask": mask[:1].float()} if mask is not None and mask.dtype != torch.bool else kwargs
    with torch.no_grad():
        exact = F.scaled_dot_product_attention(*(one.float() for one in first), **exact_kwargs)
        found = ours(*first, **kwargs)
    return float((found.float() - exact).abs().max() / exact.abs().max())


def predictions() -> dict[tuple[str, str, str], float]:
    """Predicted microseconds by chip, pass and shape: of the kernels alone."""
    file = ROOT / "benchmarks" / "model" / "predictions.json"
    rows = json.loads(file.read_text())["predictions"] if file.is_file() else []
    return {(row["chip"], row["pass"], row["shape"]): row["microseconds"] for row in rows}


def row(shape: AttentionShape, what: str) -> dict[str, Any]:
    """Times of a pass, throughput, and the ratio to each peer."""
    small = shape.cut(batch=1, length=32) if REHEARSAL else shape
    functions = {"ours": ours, **peers(small, what)}
    operands, _ = tensors(small)
    rows = measure(
        {name: call_of(function, what, small) for name, function in functions.items()},
        sum(one.numel() * one.element_size() for one in operands) * (3 if what != "forward" else 1),
    )
    found: dict[str, Any] = {"shape": shape.name, "pass": what, "rows": rows}
    if "median_us" not in rows["ours"]:
        return found
    mine = rows["ours"]["median_us"] * 1e-6
    found["ratios"] = {
        name: round(one["median_us"] * 1e-6 / mine, 3)
        for name, one in rows.items()
        if name != "ours" and "median_us" in one
    }
    minimum = roofline.cost(small, *PASSES[what])
    found["tflops"] = round(minimum.flops / mine / 1e12, 2)
    chip = None if REHEARSAL else roofline.chip_of(torch.cuda.get_device_name())
    if chip is not None:
        found["of_roofline"] = round(max(minimum.bounds(chip).values()) / mine, 4)
        predicted = predictions().get((chip.name, what, shape.name))
        if predicted is not None and what in ("forward", "backward"):
            found["predicted_us"] = predicted
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--limit", type=float, default=180, help="seconds for everything")
    arguments = parser.parse_args()
    session = Session(arguments.folder.resolve(), arguments.limit)
    session.write("machine", **machine())
    torch.manual_seed(0)
    smoke.prepare()
    work = [(name, what) for what in ("forward", "backward") for name in ORDER]
    work += [
        (name, what) for what in ("tangent", "second order") for name in ("sagan-64", "image-lm", "dit-xl", "char-lm")
    ]
    work += [(name, "forward, compiled") for name in COMPILED]
    for place, (name, what) in enumerate(work):
        if session.left < 8:
            session.write("left out", call="attention", what=[f"{what} {name}" for name, what in work[place:]])
            break
        shape = ATTENTION_SHAPES[name]
        try:
            if what == "forward":
                small = shape.cut(batch=1, length=32) if REHEARSAL else shape
                fits = small.batch * small.heads * small.queries * small.keys <= MOST_SCORES
                error = {"error": agreement(small)} if fits else {}
            else:
                error = {}
            line = session.write("attention", **row(shape, what), **error)
        except Exception as problem:
            text = f"{type(problem).__name__}: {problem}"[:500]
            line = session.write("attention", shape=name, **{"pass": what}, problem=text)
        shown = {key: line.get(key) for key in ("shape", "pass", "ratios", "of_roofline", "problem")}
        print(json.dumps(shown), flush=True)
        if "CUDA error" in json.dumps(line):  # the process is poisoned
            session.write("left out", call="attention", what=[f"{what} {name}" for name, what in work[place + 1 :]])
            return 1
        if not REHEARSAL:
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
