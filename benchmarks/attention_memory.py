"""Peak memory of attention's forward and backward pass on CPU, ours and PyTorch's. Each in a process of its own.

usage: python -m benchmarks.attention_memory [LENGTH ...]
"""

from __future__ import annotations

import resource
import subprocess
import sys

CASES = {"dropout 0.1": {"dropout_p": 0.1}, "learned bias for each key": {"attn_mask": "learned"}}
PEERS = ("ours", "PyTorch")


def measure(case: str, whose: str, length: int) -> float:
    """MiB beyond what the process held before."""
    import torch
    import torch.nn.functional as F

    from fastgen.functional import scaled_dot_product_attention

    attend = scaled_dot_product_attention if whose == "ours" else F.scaled_dot_product_attention
    kwargs = dict(CASES[case])
    query, key, value = (torch.randn(1, 4, length, 64, requires_grad=True) for _ in range(3))
    if "attn_mask" in kwargs:
        kwargs["attn_mask"] = torch.randn(1, 1, 1, length, requires_grad=True)
    warm = [t[:, :, :64] for t in (query, key, value)]
    attend(*warm, dropout_p=0.1).sum().backward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    attend(query, key, value, **kwargs).sum().backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> int:
    if sys.argv[1:2] == ["--one"]:
        print(measure(sys.argv[2], sys.argv[3], int(sys.argv[4])))
        return 0
    lengths = [int(word) for word in sys.argv[1:]] or [1024, 2048, 4096]
    print("| (1, 4, N, N, 64, 64) float32, forward + backward | N | ours, MiB | PyTorch's, MiB |\n|---|---|---|---|")
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
