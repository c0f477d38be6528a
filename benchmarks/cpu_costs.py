"""Where the time goes on CPU: what products, exponentials, random numbers and fresh memory cost, on one thread.

usage: python -m benchmarks.cpu_costs

Products are compared with a matrix product of PyTorch of 1024 x 1024, the rest is in nanoseconds per number, from
operands that stay in a cache. Then the same numbers, times how many of them a call needs, are compared with the call.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.overhead import machine
from fastgen import functional
from fastgen.backend import COMPILED, call, cpu_level

ROWS, KEYS = 64, 1024
SHAPES = ((8, 1, 1024, 1024, 8, 64), (2, 4, 2048, 2048, 64, 64))


def seconds(run: Callable[[], Any], total: float = 0.3) -> float:
    """The mean CPU time of a call of this thread, which other processes change least. Its clock is coarse."""
    run()
    calls, begin = 0, time.thread_time()
    while time.thread_time() - begin < total:
        run()
        calls += 1
    return (time.thread_time() - begin) / calls


def unit_costs() -> dict[str, float]:
    """Seconds for a multiply-add of PyTorch's product, and for a number of each other kind."""
    a, b, out = (torch.randn(1024, 1024) for _ in range(3))
    scores, lse, seed = torch.randn(ROWS, KEYS), torch.empty(ROWS), torch.ones(1, dtype=torch.int64)
    mu = torch.zeros(16, KEYS)  # z, and what the call reads, fit a cache
    whole = torch.empty(4096, 1024)
    count = ROWS * KEYS
    sizes = (ROWS, 0, 1, 1, ROWS, 0, ROWS, KEYS, 0, KEYS)
    return {
        "product": seconds(lambda: torch.mm(a, b, out=out)) / 1024**3,
        "softmax": seconds(lambda: call(COMPILED, "cpu_attention_softmax", scores, None, lse)) / count,
        "dropout": seconds(lambda: call(COMPILED, "cpu_dropout_keep", seed, *sizes, 0.1)) / count,
        "normal": seconds(lambda: call(COMPILED, "latent_forward", mu, mu, None, None, seed, False)) / mu.numel(),
        "fresh": seconds(lambda: torch.empty(4096, 1024).fill_(1.0)) / whole.numel(),
        "written": seconds(lambda: whole.fill_(1.0)) / whole.numel(),
    }


def attention_rows(unit: dict[str, float], shape: tuple[int, ...]) -> list[str]:
    """Forward, backward and second order of one shape: products (multiply-adds a score), softmax, the rest."""
    batch, heads, rows, keys, dim, value_dim = shape
    query, key, value = (
        torch.randn(batch, heads, n, d).requires_grad_() for n, d in ((rows, dim), (keys, dim), (keys, value_dim))
    )
    leaves = [query, key, value]
    scores = batch * heads * rows * keys

    def forward() -> Any:
        return functional.scaled_dot_product_attention(query, key, value)

    def step() -> Any:
        return torch.autograd.grad(forward().sum(), leaves)

    def penalty() -> Any:
        grads = torch.autograd.grad(forward().sum(), leaves, create_graph=True)
        total: Any = sum(grad.square().sum() for grad in grads)
        return torch.autograd.grad(total, leaves)

    d, v = dim, value_dim
    parts = {  # multiply-adds and exponentials a score
        "forward": (forward, d + v, 1),
        "forward + backward": (step, (d + v) + (3 * d + 2 * v), 2),
        "R1 step": (penalty, (d + v) + (3 * d + 2 * v) + (7 * d + 5 * v), 3),
    }
    lines = []
    for name, (run, products, exponentials) in parts.items():
        whole = seconds(run, 0.5)
        shares = [products * scores * unit["product"], exponentials * scores * unit["softmax"]]
        texts = [f"{share / whole:.0%}" for share in (*shares, whole - sum(shares))]
        lines.append(f"| {shape}, {name} | {whole * 1e3:.1f} | {' | '.join(texts)} |")
    return lines


def main() -> None:
    torch.set_num_threads(1)
    unit = unit_costs()
    print(machine(), cpu_level())
    print(f"product: {2e-9 / unit['product']:.0f} GFLOP/s")
    for name in ("softmax", "dropout", "normal", "fresh", "written"):
        print(f"{name}: {unit[name] * 1e9:.2f} ns")
    mu, logvar = torch.randn(2, 4096, 1024).unbind()
    whole = seconds(lambda: functional.reparameterize_kl(mu, logvar), 0.5) / mu.numel()
    normal, fresh = unit["normal"], unit["fresh"]
    print(f"reparameterize_kl: {whole * 1e9:.2f} ns: normals {normal / whole:.0%}, fresh memory {fresh / whole:.0%}")
    print("| call | ms | products | softmax | the rest |\n|---|---|---|---|---|")
    for shape in SHAPES:
        print("\n".join(attention_rows(unit, shape)), flush=True)


if __name__ == "__main__":
    main()
