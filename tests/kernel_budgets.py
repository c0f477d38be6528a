"""The most that each CUDA kernel may use: read by tests/compile_check.py, which fails on a kernel over its budget.

A multiprocessor of sm_80 and sm_90a has 65536 registers, given out per warp in multiples of 8 a thread. With 256
threads a block that is, at most: 32 registers for 8 blocks (all 2048 threads), 40 for 6, 48 for 5, 64 for 4, 80 for 3,
128 for 2. A budget is one of these steps, for the instantiation that needs most.
"""

from __future__ import annotations

from typing import NamedTuple


class Budget(NamedTuple):
    registers: int
    shared_bytes: int = 0  # static
    stack_bytes: int = 0  # 0: no access to local memory either


BUDGETS = {
    # launch_bounds(256): 80 registers keep 3 blocks, whose threads have 24 KiB and more of loads in flight.
    # Shared: block_sum's float per warp.
    "latent_forward": Budget(registers=80, shared_bytes=32),
    # As latent_forward; no sum over the block.
    "latent_backward": Budget(registers=80),
    # launch_bounds(256): 32 registers keep 8 blocks, all 2048 threads; a thread does little.
    "latent_sum_parts": Budget(registers=32),
    # launch_bounds(128): sums and scores stay in registers, so two blocks share a multiprocessor; what must not happen
    # is a spill. Shared memory is dynamic: csrc/attention/config.h.
    "attention_forward": Budget(registers=255),
    "attention_backward_query": Budget(registers=255),
    "attention_backward_key_value": Budget(registers=255),
    # Shared: a float for each of 64 columns and 4 warps.
    "attention_mask_gradient": Budget(registers=255, shared_bytes=1024),
    # Twice the tiles of scores of forward and backward, with as many rows and columns as that leaves room for.
    "attention_tangent": Budget(registers=255),
    "attention_second_order_query": Budget(registers=255),
    "attention_second_order_key_value": Budget(registers=255),
    "attention_mask_second_order": Budget(registers=255, shared_bytes=1024),
    # launch_bounds(256), as latent_sum_parts; the division of what is stored by dtype.
    "attention_sum_parts": Budget(registers=40),
    # Large tiles have 256 threads: 128 registers keep two blocks of 16-bit products; float32's splits leave one.
    "projection_project": Budget(registers=192),
    "projection_weight_gradient": Budget(registers=192),
    # launch_bounds(256), each a pass over memory. Static shared memory: block_sum's, at the alignment of the dynamic.
    "projection_finish": Budget(registers=40, shared_bytes=1024),
    "projection_sum_rows": Budget(registers=32, shared_bytes=1024),
    "projection_scale_rows": Budget(registers=32),
    # A warp for each head: 80 registers keep 3 blocks.
    "projection_heads_backward": Budget(registers=80),
}
