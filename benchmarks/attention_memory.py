"""Peak memory of attention on CPU in fastgen and PyTorch: forward and backward, R1 step, forward-mode AD.

Each measurement runs in a separate process.

usage: python -m benchmarks.attention_memory [LENGTH ...]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from benchmarks.memory import measure_in_subprocess, peak_memory_mib

R1, TANGENT = "R1 step", "torch.func.jvp"
CASES: dict[str, dict[str, Any]] = {
    "dropout 0.1": {"dropout_p": 0.1},
    "learned bias for each key": {"attn_mask": "learned"},
    R1: {},
    TANGENT: {},
}
IMPLEMENTATIONS = ("ours", "PyTorch")


def work(case: str, attend: Callable[..., Any], tensors: list[Any], kwargs: dict[str, Any]) -> None:
    import torch

    if case == TANGENT:
        fixed = tuple(t.detach() for t in tensors)
        torch.func.jvp(attend, fixed, fixed)
    elif case == R1:
        grads = torch.autograd.grad(attend(*tensors).square().sum(), tensors, create_graph=True)
        torch.stack([grad.square().sum() for grad in grads]).sum().backward()
    else:
        attend(*tensors, **kwargs).sum().backward()


def measure(case: str, implementation: str, length: int) -> float:
    """Increase of the peak memory of the process, in MiB."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from fastgen.functional import scaled_dot_product_attention

    def unfused(*tensors: Any) -> Any:  # the only backend with second derivatives and forward mode
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(*tensors)

    baseline = unfused if case in (R1, TANGENT) else F.scaled_dot_product_attention
    attend = scaled_dot_product_attention if implementation == "ours" else baseline
    kwargs = dict(CASES[case])
    tensors = [torch.randn(1, 4, length, 64, requires_grad=True) for _ in range(3)]
    if "attn_mask" in kwargs:
        kwargs["attn_mask"] = torch.randn(1, 1, 1, length, requires_grad=True)
    warm = [t[:, :, :64].detach().requires_grad_() for t in tensors]
    work(case, attend, warm, {"dropout_p": 0.1})
    before = peak_memory_mib()
    work(case, attend, tensors, kwargs)
    return peak_memory_mib() - before


def main() -> int:
    if sys.argv[1:2] == ["--one"]:
        print(measure(sys.argv[2], sys.argv[3], int(sys.argv[4])))
        return 0
    lengths = [int(argument) for argument in sys.argv[1:]] or [1024, 2048, 4096, 8192]
    print("| (1, 4, N, N, 64, 64) float32 | N | ours, MiB | PyTorch's, MiB |\n|---|---|---|---|")
    for case in CASES:
        for length in lengths:
            found = [
                measure_in_subprocess("benchmarks.attention_memory", case, implementation, length)
                for implementation in IMPLEMENTATIONS
            ]
            print(f"| {case} | {length} | " + " | ".join(f"{mib:.0f}" for mib in found) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
