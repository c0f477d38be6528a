"""Decoding: sampling text with KV caches against a loop without, and the attention of one step against torch's.

Both ways of sampling take 256 tokens from one model, within its context, with the same noise.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.functional import scaled_dot_product_attention
from fastgen.models.transformer_lm import TextOptions, TransformerLM, TransformerLMConfig, choose
from fastgen.testing import interleaved_times, median_ratio

TOKENS = 256
CONTEXT = TOKENS + 1


def make(device: torch.device) -> TransformerLM:
    torch.manual_seed(0)
    return TransformerLM(TransformerLMConfig(context=CONTEXT)).to(device).eval()


@torch.no_grad()
def without_a_cache(model: TransformerLM, prompt: Tensor, options: TextOptions) -> Tensor:
    generator, text = torch.Generator().manual_seed(0), prompt
    for _ in range(TOKENS):
        text = torch.cat((text, choose(model(text)[:, -1], options, generator)), dim=1)
    return text


@pytest.mark.parametrize("batch", [1, 8])
def test_sampling_with_a_cache(benchmark, device: torch.device, batch: int) -> None:
    """extra_info: median over rounds of the time without a cache divided by ours."""
    model, options = make(device), TextOptions(prompt="a", length=TOKENS)
    start = model.config.vocabulary.index("a")
    prompt = torch.full((batch, 1), start, device=device)

    def ours() -> list[str]:
        return model.draw(batch, options, generator=torch.Generator().manual_seed(0)).texts

    def loop() -> Tensor:
        return without_a_cache(model, prompt, options)

    vocabulary = model.config.vocabulary
    same = sum(text == "".join(vocabulary[i] for i in row) for text, row in zip(ours(), loop().tolist(), strict=True))
    assert same >= batch - batch // 8  # rounding may change a sampled token
    times = interleaved_times({"ours": ours, "no cache": loop}, rounds=5, synchronize=device.type == "cuda")
    benchmark.extra_info["shape"] = f"{batch} x {TOKENS} tokens"
    benchmark.extra_info["ratios"] = {"no cache": median_ratio(times["no cache"], times["ours"])}
    benchmark.pedantic(ours, rounds=3)


# (B, H, Hk, N, M, D): a batch, one text against caches of several lengths, grouped heads, several tokens at once.
STEPS = [
    (64, 8, 8, 1, 2048, 64),
    (1, 8, 8, 1, 4096, 64),
    (1, 8, 8, 1, 32768, 64),
    (1, 32, 8, 1, 8192, 128),
    (1, 32, 8, 16, 8192, 128),
]


@pytest.mark.parametrize("filled", [1.0, 0.25])
@pytest.mark.parametrize("sizes", STEPS, ids=str)
def test_attention_of_a_step(against, device: torch.device, sizes: tuple[int, ...], filled: float) -> None:
    """The first part of a cache is filled: below 1 by a boolean mask, as ``KVCache.update`` returns it.

    GB/s: of the filled keys and values, the least that a step reads.
    """
    batch, heads, key_heads, queries, keys, dim = sizes
    if device.type == "cpu":
        batch, keys = min(batch, 4), min(keys, 4096)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    query = torch.randn(batch, heads, queries, dim, device=device, dtype=dtype)
    key, value = torch.randn(2, batch, key_heads, keys, dim, device=device, dtype=dtype)
    length = int(filled * keys)
    mask = None if filled == 1 else (torch.arange(keys, device=device) < length)[None, None, None]

    def call(function):
        return function(query, key, value, mask, enable_gqa=heads != key_heads)

    with torch.no_grad():
        against(
            lambda: call(scaled_dot_product_attention),
            {"sdpa": lambda: call(F.scaled_dot_product_attention)},
            bytes_moved=2 * batch * key_heads * length * dim * query.element_size(),
        )
