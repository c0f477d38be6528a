"""Checks that run in two processes, over gloo on the CPU, and compare with one process.

    python -m tests.nn.distributed_checks RANK STORE

The first process prints JSON: "ok" or the error of each check.
"""

from __future__ import annotations

import copy
import datetime
import json
import sys
import traceback

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import fastgen
from fastgen import functional
from fastgen import nn as layers
from fastgen.losses import r1_penalty

WIDTH, PROCESSES = 16, 2
CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


def random(*sizes):
    """The same in every process."""
    return torch.randn(sizes, dtype=torch.float64)


def output(layer, x):
    if isinstance(layer, nn.MultiheadAttention):
        return layer(x, x, x, need_weights=False)[0]
    out = layer(x)
    return out[0] if isinstance(out, tuple) else out


def accelerated(layer):
    assert fastgen.accelerate(layer).replaced
    return layer


LAYERS = {
    "MultiheadAttention": lambda: layers.MultiheadAttention(WIDTH, 2, batch_first=True),
    "TransformerEncoderLayer": lambda: layers.TransformerEncoderLayer(WIDTH, 2, WIDTH, 0.0, batch_first=True),
    "LSTM": lambda: layers.LSTM(WIDTH, WIDTH, batch_first=True),
    "accelerated TransformerEncoder": lambda: accelerated(
        nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 2, WIDTH, 0.0, batch_first=True), 2)
    ),
    "accelerated GRU": lambda: accelerated(nn.GRU(WIDTH, WIDTH, batch_first=True)),
}


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_gradients(layer, expected, factor=1.0):
    for (name, own), other in zip(layer.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(full(own.grad) * factor, other.grad, msg=lambda text, name=name: f"{name}: {text}")


@check
def data_parallel(mesh, rank):
    """DDP: the gradients of a loss and of a gradient penalty are the means of those of the parts of a batch."""
    for make in LAYERS.values():
        layer = make().double()
        expected, x = copy.deepcopy(layer), random(4, 5, WIDTH)
        parallel = nn.parallel.DistributedDataParallel(layer)
        part = x.chunk(PROCESSES)[rank]
        output(expected, x).square().sum().backward()
        output(parallel, part).square().sum().backward() if not isinstance(layer, nn.MultiheadAttention) else parallel(
            part, part, part, need_weights=False
        )[0].square().sum().backward()
        assert_gradients(layer, expected, PROCESSES)


@check
def gradient_penalty_data_parallel(mesh, rank):
    layer = LAYERS["TransformerEncoderLayer"]().double()
    expected, x = copy.deepcopy(layer), random(4, 5, WIDTH)
    parallel = nn.parallel.DistributedDataParallel(layer)
    for each, real in ((parallel, x.chunk(PROCESSES)[rank]), (expected, x)):
        real = real.clone().requires_grad_()
        (r1_penalty(each(real).square().sum((1, 2)), real) + 0 * each(real).sum()).backward()
    assert_gradients(layer, expected)


@check
def fully_sharded(mesh, rank):
    """FSDP2, of the whole layer and of each part that has parameters."""
    for make in LAYERS.values():
        for parts in (False, True):
            layer = make().double()
            expected, x = copy.deepcopy(layer), random(4, 5, WIDTH)
            output(expected, x).square().sum().backward()
            own = [part for part in layer.modules() if any(True for _ in part.parameters(recurse=False))]
            for part in reversed(own) if parts else []:
                if part is not layer:
                    fully_shard(part, mesh=mesh)
            fully_shard(layer, mesh=mesh)
            out = output(layer, x.chunk(PROCESSES)[rank])
            torch.testing.assert_close(out, output(expected, x).chunk(PROCESSES)[rank])
            out.square().sum().backward()
            assert_gradients(layer, expected, PROCESSES)


def attention_results(attend, tensors, mask):
    """Output, gradients, and gradients of a gradient penalty."""
    leaves = [tensor.detach().requires_grad_() for tensor in (*tensors, *([] if mask is None else [mask]))]
    out = attend(*leaves)
    grads = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
    penalty = sum(full(grad.square().sum()) if isinstance(grad, DTensor) else grad.square().sum() for grad in grads)
    return [out, *grads, *torch.autograd.grad(penalty, leaves)]


@check
def attention_of_sharded_heads_or_batch(mesh, rank):
    grouped = {"enable_gqa": True}
    for keys, mask_shape, options in (
        (4, None, {"is_causal": True}),
        (4, (5, 5), {}),
        (4, (1, 4, 5, 5), {}),
        (2, (2, 1, 1, 5), grouped),
        (1, None, grouped),
    ):
        tensors = random(2, 4, 5, 8), random(2, keys, 5, 8), random(2, keys, 5, 6)
        mask = None if mask_shape is None else random(*mask_shape)
        attend = lambda *t, options=options: functional.scaled_dot_product_attention(*t, **options)  # noqa: E731
        expected = attention_results(attend, tensors, mask)
        for placement in (Shard(0), Shard(1), Replicate()):
            if placement == Shard(1) and keys < PROCESSES:
                continue
            own = [distribute_tensor(tensor, mesh, [placement]) for tensor in tensors]
            shared = None if mask is None else distribute_tensor(mask, mesh, [Replicate()])
            results = attention_results(attend, own, shared)
            assert results[0].placements == (placement,)
            for a, b in zip(results, expected, strict=True):
                torch.testing.assert_close(full(a), b)


@check
def tangents_of_sharded_heads(mesh, rank):
    operator = torch.ops.fastgen.attention_tangent
    tensors = [random(2, 4, 5, 8) for _ in range(3)]
    tensors += functional.scaled_dot_product_attention(*tensors, return_lse=True)
    tangents = [random(2, 4, 5, 8) for _ in range(3)]
    options = (None, 0.0, -1, -1, 8**-0.5, 0.0, False)
    expected = operator(*tensors, None, None, None, *tangents, *options)
    with torch.no_grad():
        functional.scaled_dot_product_attention(*(distribute_tensor(t, mesh, [Shard(1)]) for t in tensors[:3]))
    from fastgen.backend import call

    own, own_tangents = ([distribute_tensor(t, mesh, [Shard(1)]) for t in group] for group in (tensors, tangents))
    for a, b in zip(
        call("fastgen", "attention_tangent", *own, None, None, None, *own_tangents, *options), expected, strict=True
    ):
        assert a.placements == (Shard(1),)
        torch.testing.assert_close(full(a), b)


class Block(nn.Module):
    """Attention with a linear layer for each of query, key and value, as models for tensor parallelism have."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        heads = [layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.query, self.key, self.value)]
        return self.out(functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2))


@check
def tensor_parallel_heads(mesh, rank):
    for local in (True, False):
        block = Block().double()
        expected, x = copy.deepcopy(block), random(2, 5, WIDTH)
        output(expected, x).square().sum().backward()
        plan = {name: ColwiseParallel(use_local_output=local) for name in ("query", "key", "value")}
        parallelize_module(block, mesh, {**plan, "out": RowwiseParallel()})
        out = block(x)
        torch.testing.assert_close(out, expected(x))
        out.square().sum().backward()
        assert_gradients(block, expected)


@check
def tensor_parallel_encoder_layer(mesh, rank):
    """The feed-forward network and the output projection; the packed projection of query, key and value is whole."""
    for make in (
        LAYERS["TransformerEncoderLayer"],
        lambda: accelerated(nn.TransformerEncoderLayer(WIDTH, 2, WIDTH, 0.0, batch_first=True)),
    ):
        layer = make().double()
        expected, x = copy.deepcopy(layer), random(2, 5, WIDTH)
        expected(x).square().sum().backward()
        plan = {
            "linear1": ColwiseParallel(),
            "linear2": RowwiseParallel(),
            "self_attn.out_proj": RowwiseParallel(input_layouts=Replicate()),
        }
        parallelize_module(layer, mesh, plan)
        out = layer(x)
        torch.testing.assert_close(out, expected(x))
        out.square().sum().backward()
        assert_gradients(layer, expected)


@check
def errors_say_what_to_do(mesh, rank):
    x = distribute_tensor(random(2, WIDTH, 5), mesh, [Shard(0)])
    weight = distribute_tensor(random(WIDTH, WIDTH), mesh, [Replicate()])
    with pytest.raises(NotImplementedError, match=r"projection_forward: expected plain tensors.*give it local tensors"):
        functional.multi_head_projection(x, weight, num_heads=2, channels_first=True)
    heads = distribute_tensor(random(2, 4, 5, 8), mesh, [Shard(1)])
    expected = r"attention_forward: expected each tensor to be a DTensor.*the seed of dropout.*give it local tensors"
    for _ in range(2):  # before and after the rule is registered
        with pytest.raises(NotImplementedError, match=expected):
            functional.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.5)
        functional.scaled_dot_product_attention(heads, heads, heads)
    with pytest.raises(NotImplementedError, match=expected):
        functional.scaled_dot_product_attention(heads, heads, full(heads))


def main(rank, store):
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=100)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES, timeout=limit)
    mesh, results = init_device_mesh("cpu", (PROCESSES,)), {}
    for name, function in CHECKS.items():
        torch.manual_seed(0)
        try:
            function(mesh, rank)
            results[name] = "ok"
        except Exception:
            results[name] = traceback.format_exc()
    if rank == 0:
        print(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
