"""The KV cache: steps are equal to full attention, compiled or not."""

from __future__ import annotations

import copy
import doctest
import pickle

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from fastgen import functional
from fastgen.nn import KVCache, cache

B, H, HK, D, DV = 2, 4, 2, 8, 6


def tokens(length, batch=B):
    return (
        torch.randn(batch, H, length, D, dtype=torch.float64),
        torch.randn(batch, HK, length, D, dtype=torch.float64),
        torch.randn(batch, HK, length, DV, dtype=torch.float64),
    )


def attend(query, key, value, mask=None, **kwargs):
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True, **kwargs)


def empty(max_length=12, batch=B, **kwargs):
    return KVCache(batch, HK, max_length, D, DV, dtype=torch.float64, **kwargs)


def steps(store, query, key, value, sizes):
    """Attention of a sequence that is written in parts."""
    outs, start = [], 0
    for size in sizes:
        part = slice(start, start + size)
        keys, values, mask = store.update(key[:, :, part], value[:, :, part])
        outs.append(attend(query[:, :, part], keys, values, mask))
        start += size
    return torch.cat(outs, dim=2)


def eager_steps(store, query, key, value, sizes):
    """``steps`` by ``append``."""
    outs, start = [], 0
    for size in sizes:
        part = slice(start, start + size)
        store.make_room(size)
        mask = store.mask(size)
        keys, values = store.append(key[:, :, part], value[:, :, part])
        assert keys.data_ptr() >= store.keys.data_ptr()
        outs.append(attend(query[:, :, part], keys, values, mask))
        start += size
    return torch.cat(outs, dim=2)


def banded(query, key, value, *, window=None, segment=None):
    """Causal attention within a window, or within a segment and the one before."""
    place = torch.arange(query.size(2))
    mask = place <= place[:, None]
    if window is not None:
        mask &= place >= place[:, None] - window
    if segment is not None:
        mask &= place >= (place[:, None] // segment - 1) * segment
    return attend(query, key, value, mask)


@pytest.mark.parametrize("sizes", [[9], [1] * 9, [5, 1, 1, 2], [3, 6]], ids=str)
@pytest.mark.parametrize("max_length", [9, 16])
@pytest.mark.parametrize("window", [None, 0, 3])
def test_steps_equal_full_causal_attention(sizes, max_length, window):
    query, key, value = tokens(9)
    out = steps(empty(max_length, window=window), query, key, value, sizes)
    wanted = attend(query, key, value, is_causal=True, window=None if window is None else (window, 0))
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)


BOUNDS = [{}, {"window": 0}, {"window": 3}, {"segment": 1}, {"segment": 3}]


@pytest.mark.parametrize("bound", BOUNDS, ids=str)
@pytest.mark.parametrize("sizes", [[9], [1] * 9, [5, 1, 1, 2], [3, 6]], ids=str)
def test_updated_and_appended_tokens_attend_within_their_window_or_segments(bound, sizes):
    query, key, value = tokens(9)
    wanted = banded(query, key, value, **bound)
    for way in (steps, eager_steps):
        store = empty(9, **bound)
        torch.testing.assert_close(way(store, query, key, value, sizes), wanted, rtol=1e-12, atol=1e-12)
        assert store.position.item() == store.num_tokens == 9


@pytest.mark.parametrize("bound", BOUNDS[1:], ids=str)
@pytest.mark.parametrize("padding", [None, [2, 0]], ids=str)
def test_a_text_longer_than_the_cache_drops_what_is_out_of_reach(bound, padding):
    query, key, value = tokens(40)
    store = empty(8, **bound)
    if padding is not None:
        store.reset(torch.tensor(padding))
    out = eager_steps(store, query, key, value, [3, 1, 3, *[1] * 20, 2, *[1] * 11])
    for b, pad in enumerate(padding or [0, 0]):
        alone = banded(*(t[b : b + 1, :, pad:] for t in (query, key, value)), **bound)
        torch.testing.assert_close(out[b : b + 1, :, pad:], alone, rtol=1e-12, atol=1e-12)
        assert store.positions(1).expand(2, 1)[b].item() == 40 - pad
    assert store.num_tokens == 40
    assert store.position.item() <= 8


def test_single_unpadded_tokens_need_no_mask():
    store = empty()
    assert store.mask(1) is None
    assert store.mask(2).shape == (1, 1, 2, 2)
    store.reset(torch.tensor([1, 0]))
    assert store.mask(1).shape == (B, 1, 1, 1)


def test_left_padded_sequences_equal_unpadded_ones():
    query, key, value = tokens(7)
    store, padding = empty(), torch.tensor([3, 0])
    store.reset(padding)
    for tensor in (query, key, value):  # padding is masked
        tensor[0, :, :3] = torch.nan
    out = steps(store, query.nan_to_num(), key, value, [5, 1, 1])
    assert store.update(key[:, :, :1], value[:, :, :1])[2].shape == (B, 1, 1, 12)
    for b, pad in enumerate(padding.tolist()):
        alone = tuple(t[b : b + 1, :, pad:] for t in (query, key, value))
        torch.testing.assert_close(out[b : b + 1, :, pad:], attend(*alone, is_causal=True), rtol=1e-12, atol=1e-12)
    assert (out[0, :, :3] == 0).all(), "queries of padding are fully masked"


def test_unwritten_slots_are_masked():
    query, key, value = tokens(4)
    store = empty()
    store.keys.fill_(torch.nan)
    store.values.fill_(torch.inf)
    out = steps(store, query, key, value, [3, 1])
    torch.testing.assert_close(out, attend(query, key, value, is_causal=True))


def test_reset_empties_the_cache():
    query, key, value = tokens(6)
    store = empty(8)
    store.reset(torch.tensor([1, 0], dtype=torch.int32))
    steps(store, *tokens(5), [5])
    store.reset()
    out = steps(store, query, key, value, [4, 2])
    torch.testing.assert_close(out, attend(query, key, value, is_causal=True))
    assert store.position.item() == 6


def test_reorder_continues_other_sequences():
    query, key, value = tokens(6, batch=3)
    order = torch.tensor([2, 2, 0])
    store = empty(batch=3)
    store.reset(torch.tensor([0, 1, 2]))
    steps(store, query[:, :, :4], key[:, :, :4], value[:, :, :4], [4])
    places = [buffer.data_ptr() for buffer in store.buffers()]
    store.reorder(order)
    assert places == [buffer.data_ptr() for buffer in store.buffers()]
    out = steps(store, query[:, :, 4:], key[:, :, 4:], value[:, :, 4:], [1, 1])
    for b, (source, pad) in enumerate(((2, 2), (2, 2), (0, 0))):
        whole = [torch.cat((t[source, :, pad:4], t[b, :, 4:]), dim=1).unsqueeze(0) for t in (query, key, value)]
        torch.testing.assert_close(out[b : b + 1], attend(*whole, is_causal=True)[:, :, -2:])


def test_positions():
    store = empty()
    assert store.positions(3).tolist() == [0, 1, 2]
    store.reset(torch.tensor([2, 0]))
    assert store.positions(4).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    store.update(*tokens(4)[1:])
    assert store.positions(1).tolist() == [[2], [4]]
    assert store.position.tolist() == [4]


@pytest.mark.parametrize("padded", [False, True])
def test_a_compiled_step_is_compiled_once(padded):
    query, key, value = tokens(9)
    store, plain = empty(), empty()
    if padded:
        store.reset(torch.tensor([2, 0]))
        plain.reset(torch.tensor([2, 0]))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def step(query, key, value):
        keys, values, mask = store.update(key, value)
        return attend(query, keys, values, mask)

    prefix = [t[:, :, :4] for t in (query, key, value)]
    torch.testing.assert_close(steps(store, *prefix, [4]), steps(plain, *prefix, [4]))
    for n in range(4, 9):
        one = [t[:, :, n : n + 1].contiguous() for t in (query, key, value)]
        torch.testing.assert_close(step(*one), steps(plain, *one, [1]))
    assert counter.frame_count == 1
    assert store.position.item() == 9


def test_export_of_a_step():
    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.cache = empty()

        def forward(self, query, key, value):
            keys, values, mask = self.cache.update(key, value)
            return attend(query, keys, values, mask)

    query, key, value = tokens(3)
    one = [t[:, :, :1].contiguous() for t in (query, key, value)]
    module = torch.export.export(Step(), tuple(one)).module()
    outs = [module(*(t[:, :, n : n + 1].contiguous() for t in (query, key, value))) for n in range(3)]
    torch.testing.assert_close(torch.cat(outs, dim=2), attend(query, key, value, is_causal=True))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_made_in_inference_and_written_outside_or_the_other_way_round(mode):
    query, key, value = tokens(4)
    with mode():
        store = empty()
        first = steps(store, query[:, :, :2], key[:, :, :2], value[:, :, :2], [2])
    second = steps(store, query[:, :, 2:], key[:, :, 2:], value[:, :, 2:], [2])
    torch.testing.assert_close(torch.cat((first, second), dim=2), attend(query, key, value, is_causal=True))


def test_copies_are_independent():
    query, key, value = tokens(4)
    store = empty()
    steps(store, query[:, :, :3], key[:, :, :3], value[:, :, :3], [3])
    last = [t[:, :, 3:] for t in (query, key, value)]
    wanted = attend(query, key, value, is_causal=True)[:, :, 3:]
    for other in (copy.deepcopy(store), pickle.loads(pickle.dumps(store)), store):
        torch.testing.assert_close(steps(other, *last, [1]), wanted)
    assert store.state_dict() == {}


@pytest.mark.parametrize("padding", [None, torch.zeros(B, dtype=torch.long, device="meta")])
def test_a_step_reads_nothing_on_the_host(padding):
    """A CUDA graph can capture it: on the meta device there is nothing to read."""
    store = empty(device="meta")
    store.reset(padding)
    keys, values, mask = store.update(*(t.to("meta") for t in tokens(3)[1:]))
    store.reorder(torch.zeros(B, dtype=torch.long, device="meta"))
    assert keys is store.keys
    assert values is store.values
    assert mask.shape == (1 if padding is None else B, 1, 3, 12)
    assert store.positions(2).device.type == "meta"


def test_the_buffers_follow_the_module():
    store = KVCache(1, 2, 4, 8).to(torch.bfloat16)
    assert store.keys.dtype == torch.bfloat16
    assert store.position.dtype == torch.int64
    assert store.values.shape == (1, 2, 4, 8)
    key = torch.randn(1, 2, 1, 8, dtype=torch.bfloat16)
    assert torch.equal(store(key, key)[0][:, :, :1], key)


KEY = torch.randn(B, HK, 3, D, dtype=torch.float64)
VALUE = torch.randn(B, HK, 3, DV, dtype=torch.float64)
ERRORS = [
    (lambda: KVCache(0, 1, 4, 8), ValueError, "batch: expected a positive integer, got 0"),
    (lambda: KVCache(1, 1, 4, 8, 0), ValueError, "value_dim: expected a positive integer, got 0"),
    (lambda: KVCache(1, 1, 4, 8, window=-1), ValueError, "window: expected an integer >= 0, or None for unbounded"),
    (lambda: empty().update(KEY[:1], VALUE), ValueError, r"key: expected \(2, 2, N, 8\), got \(1, 2, 3, 8\)"),
    (lambda: empty().update(KEY[0], VALUE), ValueError, r"key: expected \(2, 2, N, 8\), got \(2, 3, 8\)"),
    (lambda: empty().update(KEY, KEY), ValueError, r"value: expected \(2, 2, N, 6\), got \(2, 2, 3, 8\)"),
    (lambda: empty().update(KEY, VALUE[:, :, 1:]), ValueError, "value: expected key's length 3, got 2"),
    (lambda: empty().update(KEY.float(), VALUE), TypeError, "key: .* torch.float64, got torch.float32; build it with"),
    (lambda: empty().update(KEY.to("meta"), VALUE), ValueError, "key: expected the device of the cache, cpu, got meta"),
    (lambda: empty().update([1], VALUE), TypeError, "key: expected a tensor, got list"),
    (lambda: empty(2).update(KEY, VALUE), ValueError, "key: expected at most 2 more tokens, .*max_length = 2, got 3"),
    (
        lambda: empty().update(KEY.clone().requires_grad_(), VALUE),
        RuntimeError,
        r"key: expected a tensor that does not require grad.*torch.no_grad\(\)",
    ),
    (lambda: empty().reset(torch.zeros(3).long()), ValueError, r"padding: expected shape \(B,\) = \(2,\), got \(3,\)"),
    (lambda: empty().reset(torch.zeros(2)), TypeError, "padding: expected an integer tensor, got torch.float32"),
    (lambda: empty().reset([0, 1]), TypeError, "padding: expected a tensor or None, got list"),
    (lambda: empty().reorder(torch.zeros(3).long()), ValueError, r"indices: expected shape \(B,\) = \(2,\)"),
    (lambda: empty().reorder(torch.tensor([0, B])), ValueError, "indices: expected 0 to B - 1 = 1, got 0 to 2"),
    (lambda: empty().reorder(torch.tensor([-1, 0])), ValueError, "indices: expected 0 to B - 1 = 1, got -1 to 0"),
    (lambda: empty().reorder(torch.zeros(2)), TypeError, "indices: expected an integer tensor, .*got torch.float32"),
    (lambda: empty(segment=0), ValueError, "segment: expected a positive integer, got 0"),
    (lambda: empty(segment=2, window=3), ValueError, "window: expected None with segment = 2, got 3"),
    (lambda: empty().append(KEY[:1], VALUE), ValueError, r"key: expected \(2, 2, N, 8\), got \(1, 2, 3, 8\)"),
    (lambda: empty(2).append(KEY, VALUE), ValueError, "key: expected at most 2 more tokens, .*max_length = 2, got 3"),
    (lambda: empty(2).make_room(3), ValueError, "length: expected at most 2 tokens at once, in a cache of 2, got 3"),
    (lambda: empty().positions(0), ValueError, "length: expected a positive integer, got 0"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "text"), ERRORS)
def test_a_bad_argument_is_named(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_a_refused_update_changes_nothing():
    store = empty(4)
    store.update(KEY, VALUE)
    before = [buffer.clone() for buffer in store.buffers()]
    with pytest.raises(ValueError, match="at most 1 more tokens"):
        store.update(KEY, VALUE)
    assert all(torch.equal(a, b) for a, b in zip(before, store.buffers(), strict=True))
    store.update(KEY[:, :, :1], VALUE[:, :, :1])


def test_a_position_beyond_the_end_that_the_host_did_not_count_is_an_error_of_the_device():
    store = empty(3)
    store.update(KEY, VALUE)
    store._written = 0  # as after a replayed graph
    with pytest.raises((RuntimeError, IndexError)):
        store.update(KEY, VALUE)


def test_examples():
    results = doctest.testmod(cache, extraglobs={"torch": torch, "functional": functional})
    assert results.attempted > 0
    assert results.failed == 0
