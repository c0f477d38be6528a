"""Peak memory of attention on CPU, ours and PyTorch's: forward and backward, an R1 step, a tangent.

Each is measured in a process of its own.

usage: python -m benchmarks.attention_memory [LENGTH ...]
"""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable
from typing import Any

R1, TANGENT = "R1 step", "torch.func.jvp"
CASES: dict[str, dict[str, Any]] = {
    "dropout 0.1": {"dropout_p": 0.1},
    "learned bias for each key": {"attn_mask": "learned"},
    R1: {},
    TANGENT: {},
}
PEERS = ("ours", "PyTorch")


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


def measure(case: str, whose: str, length: int) -> float:
    """MiB beyond what the process held before."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from fastgen.functional import scaled_dot_product_attention

    def unfused(*tensors: Any) -> Any:  # the one that PyTorch can differentiate twice, or forwards
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(*tensors)

    theirs = unfused if case in (R1, TANGENT) else F.scaled_dot_product_attention
    attend = scaled_dot_product_attention if whose == "ours" else theirs
    kwargs = dict(CASES[case])
    tensors = [torch.randn(1, 4, length, 64, requires_grad=True) for _ in range(3)]
    if "attn_mask" in kwargs:
        kwargs["attn_mask"] = torch.randn(1, 1, 1, length, requires_grad=True)
    warm = [t[:, :, :64].detach().requires_grad_() for t in tensors]
    work(case, attend, warm, {"dropout_p": 0.1})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work(case, attend, tensors, kwargs)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> int:
    if sys.argv[1:2] == ["--one"]:
        print(measure(sys.argv[2], sys.argv[3], int(sys.argv[4])))
        return 0
    lengths = [int(word) for word in sys.argv[1:]] or [1024, 2048, 4096, 8192]
    print("| (1, 4, N, N, 64, 64) float32 | N | ours, MiB | PyTorch's, MiB |\n|---|---|---|---|")
    for case in CASES:
        for length in lengths:
            command = [sys.executable, "-m", "benchmarks.attention_memory", "--one", case]
            found = [
                float(subprocess.run([*command, whose, str(length)], check=True, capture_output=True, text=True).stdout)
                for whose in PEERS
            ]
            print(f"| {case} | {length} | " + " | ".join(f"{mib:.0f}" for mib in found) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
