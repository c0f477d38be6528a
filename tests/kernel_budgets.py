"""Resource budgets of each CUDA kernel, checked by tests/compile_check.py.

A multiprocessor of sm_80 and sm_90a has 65536 registers, allocated per warp in multiples of 8 per thread. With 256
threads per block the maximum is 32 registers for 8 blocks (all 2048 threads), 40 for 6, 48 for 5, 64 for 4, 80 for 3,
128 for 2. A budget is one of these limits, for the instantiation that needs most.
"""

from __future__ import annotations

from typing import NamedTuple


class Budget(NamedTuple):
    registers: int
    shared_bytes: int = 0  # static
    stack_bytes: int = 0  # 0: no access to local memory either


BUDGETS = {
    # launch_bounds(256): 80 registers keep 3 blocks, with 24 KiB and more of loads in flight.
    # Shared: block_sum's float per warp.
    "latent_forward": Budget(registers=80, shared_bytes=32),
    # As latent_forward; no sum over the block.
    "latent_backward": Budget(registers=80),
    # launch_bounds(256): 32 registers keep 8 blocks, all 2048 threads.
    "latent_sum_parts": Budget(registers=32),
    # launch_bounds(128): accumulators and scores are in registers, two blocks per multiprocessor; no spills.
    # Shared memory is dynamic: csrc/attention/tiles.h.
    "attention_forward": Budget(registers=255),
    # 384 threads: 168 registers at the launch, of which the consumers have 240 and the producer 24 later on; 512: 128,
    # 160 and 32. Shared: mbarriers, aligned like dynamic shared memory.
    "attention_forward_sm90": Budget(registers=168, shared_bytes=1024),
    # The same; the consumers have 240, or 232 with padding, in the first and 224 in the second, whose producer reads
    # logsumexp and delta.
    "attention_backward_query_sm90": Budget(registers=168, shared_bytes=1024),
    "attention_backward_key_value_sm90": Budget(registers=168, shared_bytes=1024),
    # The consumers have 240, or 232 with padding.
    "attention_tangent_sm90": Budget(registers=168, shared_bytes=1024),
    "attention_forward_wide_sm90": Budget(registers=168, shared_bytes=1024),
    "attention_forward_tangent_sm90": Budget(registers=168, shared_bytes=1024),
    "attention_forward_wide": Budget(registers=255),
    "attention_backward_query_wide": Budget(registers=255),
    "attention_backward_key_value_wide": Budget(registers=255),
    # launch_bounds(128), or 64 for head dims above 128. Up to 128 it needs 159 registers, which keep three blocks.
    "attention_decode": Budget(registers=255),
    # launch_bounds(128): 128 registers keep 4 blocks. Shared: a row of floats per warp, up to 512.
    "attention_combine": Budget(registers=128, shared_bytes=8192),
    "attention_backward_query": Budget(registers=255),
    "attention_backward_key_value": Budget(registers=255),
    # launch_bounds and blocks: csrc/attention/one_tile.h.
    "attention_backward_one_tile": Budget(registers=255),
    # Shared: one float per column and warp, 64 x 4.
    # launch_bounds(256): one block.
    "attention_backward_one_head": Budget(registers=255),
    "attention_mask_gradient": Budget(registers=255, shared_bytes=1024),
    # Twice as many score tiles as forward and backward, with smaller BLOCK_M and BLOCK_N accordingly.
    "attention_tangent": Budget(registers=255),
    "attention_second_order_query": Budget(registers=255),
    "attention_second_order_key_value": Budget(registers=255),
    # launch_bounds(256): one block. In 16 bits at most 208.
    "attention_tangent_wide": Budget(registers=255),
    "attention_second_order_query_wide": Budget(registers=255),
    "attention_second_order_key_value_wide": Budget(registers=255),
    "attention_mask_second_order_wide": Budget(registers=255),
    "attention_mask_second_order": Budget(registers=255, shared_bytes=1024),
    # launch_bounds(256): 32 registers keep 8 blocks. Shared: a float per thread.
    "attention_sum_parts": Budget(registers=32, shared_bytes=1024),
    # 128 x 128 tiles have 256 threads: 128 registers keep two blocks of 16-bit products; 3xTF32 keeps one.
    "projection_project": Budget(registers=192),
    "projection_weight_gradient": Budget(registers=200),
    # launch_bounds(256), each one pass over memory. Static shared memory: block_sum's, aligned like dynamic.
    "projection_reduce": Budget(registers=40, shared_bytes=1024),
    "projection_sum_rows": Budget(registers=32, shared_bytes=1024),
    "projection_scale_rows": Budget(registers=32),
    # One warp per head: 80 registers keep 3 blocks.
    "projection_heads_backward": Budget(registers=80),
}

# Instructions that a kernel must have (true) or must not have.
REQUIRED_INSTRUCTIONS = {
    # The softmax of a tile runs beside a product: compute_before_wait in csrc/device/wgmma.cuh.
    "attention_forward_sm90": {"HGMMA": True, "UTMALDG": True, "MUFU.EX2 beside products": True, "HMMA": False},
    "attention_backward_query_sm90": {"HGMMA": True, "UTMALDG": True, "HMMA": False},
    "attention_backward_key_value_sm90": {"HGMMA": True, "UTMALDG": True, "HMMA": False},
    "attention_tangent_sm90": {"HGMMA": True, "UTMALDG": True, "MUFU.EX2 beside products": True, "HMMA": False},
    "attention_forward_wide_sm90": {"HGMMA": True, "UTMALDG": True, "MUFU.EX2 beside products": True, "HMMA": False},
    "attention_forward_tangent_sm90": {"HGMMA": True, "UTMALDG": True, "MUFU.EX2 beside products": True, "HMMA": False},
}

LOOP_KERNELS = [
    "attention_forward<BFloat16, 64, 64, true>",
    "attention_forward<BFloat16, 64, 64, false>",
    "attention_forward<BFloat16, 128, 128, true>",
    "attention_forward<BFloat16, 128, 128, false>",
    "attention_forward<BFloat16, 256, 256, true>",
    "attention_forward<BFloat16, 256, 256, false>",
    "attention_forward_sm90<BFloat16, 64, 2, 128, false>",
    "attention_forward_sm90<BFloat16, 64, 3, 128, false>",
    "attention_forward_sm90<BFloat16, 128, 2, 128, false>",
    "attention_forward_sm90<BFloat16, 128, 2, 160, false>",
    "attention_forward_sm90<BFloat16, 128, 2, 128, true>",
    "attention_forward_sm90<BFloat16, 192, 2, 96, false>",
    "attention_forward_sm90<BFloat16, 256, 2, 80, false>",
    "attention_forward_wide_sm90<BFloat16>",
    "attention_backward_query_sm90<BFloat16, 64, false>",
    "attention_backward_query_sm90<BFloat16, 64, true>",
    "attention_backward_query_sm90<BFloat16, 128, false>",
    "attention_backward_query_sm90<BFloat16, 128, true>",
    "attention_backward_key_value_sm90<BFloat16, 64, false>",
    "attention_backward_key_value_sm90<BFloat16, 64, true>",
    "attention_backward_key_value_sm90<BFloat16, 128, false>",
    "attention_backward_key_value_sm90<BFloat16, 128, true>",
    "attention_tangent_sm90<BFloat16, 64, false>",
    "attention_tangent_sm90<BFloat16, 64, true>",
    "attention_tangent_sm90<BFloat16, 128, false>",
    "attention_tangent_sm90<BFloat16, 128, true>",
    "attention_forward_tangent_sm90<BFloat16, 64, false>",
    "attention_forward_tangent_sm90<BFloat16, 64, true>",
    "attention_backward_query<BFloat16, 64, 64, true>",
    "attention_backward_query<BFloat16, 128, 128, true>",
    "attention_backward_key_value<BFloat16, 64, 64, true>",
    "attention_backward_key_value<BFloat16, 128, 128, true>",
    "attention_backward_one_head<BFloat16, 64>",
    "attention_tangent<BFloat16, 64, 64, true>",
    "attention_second_order_query<BFloat16, 64, 64>",
    "attention_second_order_key_value<BFloat16, 64, 64>",
    "attention_tangent_wide<BFloat16, 512, 512>",
    "attention_second_order_query_wide<BFloat16, 512, 512>",
    "attention_second_order_key_value_wide<BFloat16, 512, 512>",
    "projection_project<BFloat16, 1, false, false>",
]
r"""Kernels whose main loop has a budget in tests/loop_budgets.json: instructions in the loop, and those that a thread
executes for each score of a tile of which everything is visible (of a warp for each matrix instruction, where there are
no scores). ``--tighten`` sets the budgets to 3% above what the compiled kernels use; these sources have all of them:

    python tests/compile_check.py --arch 80 --arch 90a --tighten csrc/projection/instantiations/bfloat16.cu \
        csrc/attention/instantiations/{forward,tangent,wide_second_order}_bfloat16.cu \
        csrc/attention/instantiations/second_order_{query,key_value}_bfloat16.cu \
        csrc/attention/instantiations/backward_{query,key_value,one_tile}_bfloat16.cu
    python tests/compile_check.py --arch 90a --tighten csrc/attention/\
        csrc/attention/sm90/instantiations/{forward,forward_wide,backward,tangent,forward_tangent}_bfloat16.cu

The CPU library has to be of the same sources: launch plans say how large tiles are.
"""
