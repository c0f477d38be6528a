// Launch plans: the grid, block and shared memory of each kernel for a problem. Host code, exposed by
// fastgen.backend.plans.
#pragma once

#include "attention/params.h"
#include "attention/tiles.h"

namespace fastgen::attention {

// The part of a problem that determines its launch plans.
struct Sizes {
  int64_t batch, heads, key_heads, queries, keys;
  int key_dim, value_dim, element_size;
  bool plain;         // no mask, dropout, softcap or packed sequences
  int sequences = 0;  // packed ones

  constexpr Dims head_dims() const { return head_dims_of(kHeadDims, {key_dim, value_dim}); }
  // Of tangents and second derivatives: whether they take the kernels of wide heads.
  constexpr bool is_wide_second_order() const { return find_head_dims(kSecondOrderHeadDims, {key_dim, value_dim}) < 0; }
  constexpr Dims second_order_head_dims() const {
    const Dims dims = {key_dim, value_dim};
    return is_wide_second_order() ? head_dims_of(kWideSecondOrderHeadDims, dims)
                                  : head_dims_of(kSecondOrderHeadDims, dims);
  }
  constexpr Dims mask_head_dims(bool second_order) const {
    const Dims dims = {key_dim, value_dim};
    if (second_order && is_wide_second_order()) return second_order_head_dims();
    return second_order ? head_dims_of(kMaskSecondOrderHeadDims, dims) : head_dims_of(kMaskHeadDims, dims);
  }
};

inline Sizes sizes_of(const Problem& p, int element_size) {
  const bool plain =
      p.mask.kind == MaskKind::kNone && p.dropout.seeds == nullptr && p.softcap == 0.0f && p.sequences.count == 0;
  return {p.batch,   p.heads,     p.key_heads,  p.queries, p.keys,
          p.key_dim, p.value_dim, element_size, plain,     p.sequences.count};
}

// gridDim = (blocks, slices), blockDim = 32 * warps.
struct Plan {
  Dims dims;  // compiled head dims
  int warps;
  int owned, iterated;  // BLOCK_M and BLOCK_N, or BLOCK_N and BLOCK_M in key_value kernels
  int tiles_per_block;  // owned tiles that a block processes in sequence
  int64_t blocks;
  int slices;
  int shared_bytes;
  int stages = 0, query_buffers = 1;  // 0 stages: of the tile table
  bool wide = false;                  // a kernel of wide heads
  int splits = 1;                     // of the keys
};

// A block processes several query tiles if each has few key tiles and the grid is much larger than the GPU.
constexpr int kBlocksPerMultiprocessor = 16;  // that at least remain
constexpr int kMaxTilesPerBlock = 8;
constexpr int kFewKeyTiles = 4;

constexpr int warps_for(int64_t rows, const TileShape& shape) {
  const int64_t needed = ceil_div(rows, shape.owned(1));
  return static_cast<int>(needed < 1 ? 1 : needed < shape.warps ? needed : shape.warps);
}

// ``heads`` heads with ``rows`` rows each are distributed over blocks; the output has ``columns`` columns. Packed
// sequences: blocks have the size for their average length, because lengths are in device memory.
constexpr Plan plan_rows(Dims dims, const TileShape& shape, int64_t rows, int64_t heads, int columns,
                         int sequences = 0) {
  const int warps = warps_for(sequences > 0 ? ceil_div(rows, sequences) : rows, shape), owned = shape.owned(warps);
  const int slices = static_cast<int>(ceil_div(columns, shape.columns));
  return {dims, warps, owned, shape.iterated, 1, heads * tiles_of_head(rows, owned, sequences), slices, 0};
}

// Chooses stages and query buffers, and sets the shared memory: bytes(warps, buffers).
template <typename Bytes>
constexpr void set_buffers(Plan& plan, Buffers most, const Gpu& gpu, Bytes&& bytes) {
  const auto of_plan = [&](Buffers buffers) { return bytes(plan.warps, buffers); };
  const Buffers buffers = choose_buffers(most, plan.blocks * plan.slices, gpu, of_plan);
  plan.stages = buffers.stages, plan.query_buffers = buffers.queries;
  plan.shared_bytes = of_plan(buffers);
}

// Parts of the keys whose results attention_combine adds, and the floats of their workspace: sums, then a maximum and a
// sum of weights, for each query of each head.
constexpr int kMaxSplits = 64;
constexpr int64_t split_floats(const Sizes& sizes, int splits) {
  return splits == 1 ? 0 : splits * sizes.batch * sizes.heads * sizes.queries * (int64_t{sizes.value_dim} + 2);
}

// The kernels of wide heads: wide.cuh, wide_backward.cuh. ``rows``: owned, of all sequences; ``bytes`` by stages. A
// problem with few rows is left to the other kernels, which take a warp for 16 of them.
template <typename Bytes>
constexpr Plan wide_plan(const Sizes& sizes, const Gpu& gpu, const WideShape& shape, int64_t rows, int64_t heads,
                         Bytes&& bytes) {
  const Dims dims = sizes.head_dims();
  Plan plan = {dims, kWideWarps, shape.owned, shape.iterated, 1, 0, 1, 0};
  plan.blocks = heads * tiles_of_head(rows, plan.owned, sizes.sequences);
  plan.stages = bytes(dims, 2) <= gpu.shared_limit ? 2 : 1;
  plan.shared_bytes = bytes(dims, plan.stages);
  plan.wide = sizes.element_size == 2 && is_wide(dims) && rows > kFragmentRows && plan.shared_bytes <= gpu.shared_limit;
  return plan;
}

// Splits of the keys, where there are fewer blocks than multiprocessors: the smallest number of splits that leaves the
// multiprocessors almost as little idle as the best one. Each split adds a row of sums to write and to read for a
// query.
constexpr int kMaxWideSplits = 4;
constexpr int kWideSplitKeys = 128;  // of a split, at least

constexpr int wide_splits(int64_t blocks, int64_t keys, int multiprocessors) {
  if (blocks >= multiprocessors) return 1;
  const auto busy = [&](int64_t splits) {  // in 1 / 1024
    return 1024 * blocks * splits / (ceil_div(blocks * splits, multiprocessors) * multiprocessors);
  };
  const int64_t by_keys = keys / kWideSplitKeys, most = by_keys < kMaxWideSplits ? by_keys : kMaxWideSplits;
  int64_t best = 1;
  for (int64_t splits = 2; splits <= most; ++splits) {
    if (9 * busy(splits) > 10 * busy(best)) best = splits;
  }
  return static_cast<int>(best);
}

constexpr Plan wide_forward_plan(const Sizes& sizes, const Gpu& gpu) {
  Plan plan = wide_plan(sizes, gpu, kWideForward, sizes.queries, sizes.batch * sizes.heads,
                        [&](Dims dims, int stages) { return wide_forward_bytes(dims, sizes.element_size, stages); });
  if (plan.wide && sizes.sequences == 0) plan.splits = wide_splits(plan.blocks, sizes.keys, gpu.multiprocessors);
  return plan;
}

constexpr Plan wide_backward_query_plan(const Sizes& sizes, const Gpu& gpu) {
  return wide_plan(sizes, gpu, kWideBackward, sizes.queries, sizes.batch * sizes.heads,
                   [&](Dims dims, int stages) { return wide_backward_bytes(dims, sizes.element_size, stages); });
}
constexpr Plan wide_backward_key_value_plan(const Sizes& sizes, const Gpu& gpu) {
  return wide_plan(sizes, gpu, kWideBackward, sizes.keys, sizes.batch * sizes.key_heads,
                   [&](Dims dims, int stages) { return wide_backward_bytes(dims, sizes.element_size, stages); });
}

constexpr Plan forward_plan(const Sizes& sizes, const Gpu& gpu) {
  const Dims dims = sizes.head_dims();
  if (const Plan wide = wide_forward_plan(sizes, gpu); wide.wide) return wide;
  const TileShape shape = forward_shape(dims, sizes.element_size, sizes.plain);
  Plan plan = plan_rows(dims, shape, sizes.queries, sizes.batch * sizes.heads, dims.value, sizes.sequences);
  set_buffers(
      plan, {shape.stages, query_buffers(dims, sizes.element_size, sizes.plain)}, gpu,
      [&](int warps, Buffers buffers) { return forward_bytes(dims, sizes.element_size, sizes.plain, warps, buffers); });
  if (sizes.sequences == 0 && plan.query_buffers == 2 && ceil_div(sizes.keys, shape.iterated) <= kFewKeyTiles) {
    const int64_t tiles = plan.blocks / (int64_t{gpu.multiprocessors} * kBlocksPerMultiprocessor);
    plan.tiles_per_block = static_cast<int>(tiles < 1 ? 1 : tiles < kMaxTilesPerBlock ? tiles : kMaxTilesPerBlock);
    plan.blocks = ceil_div(plan.blocks, plan.tiles_per_block);
  }
  return plan;
}

constexpr void set_backward_buffers(Plan& plan, const Sizes& sizes, const TileShape& shape, const Gpu& gpu) {
  set_buffers(plan, {shape.stages, 1}, gpu, [&](int warps, Buffers buffers) {
    return backward_bytes(plan.dims, shape, sizes.element_size, warps, buffers);
  });
}

constexpr Plan backward_query_plan(const Sizes& sizes, const Gpu& gpu) {
  const Dims dims = sizes.head_dims();
  if (const Plan wide = wide_backward_query_plan(sizes, gpu); wide.wide) return wide;
  const TileShape shape = backward_query_shape(dims, sizes.element_size);
  Plan plan = plan_rows(dims, shape, sizes.queries, sizes.batch * sizes.heads, dims.key, sizes.sequences);
  set_backward_buffers(plan, sizes, shape, gpu);
  return plan;
}

constexpr Plan backward_key_value_plan(const Sizes& sizes, const Gpu& gpu) {
  const Dims dims = sizes.head_dims();
  if (const Plan wide = wide_backward_key_value_plan(sizes, gpu); wide.wide) return wide;
  const TileShape shape = backward_key_value_shape(dims, sizes.element_size);
  Plan plan = plan_rows(dims, shape, sizes.keys, sizes.batch * sizes.key_heads, widest(dims), sizes.sequences);
  set_backward_buffers(plan, sizes, shape, gpu);
  return plan;
}

// Tangents and second order of wide heads. ``rows``: owned, of all sequences; ``bytes`` by stages.
template <typename Bytes>
constexpr Plan wide_second_order_plan(const Sizes& sizes, const Gpu& gpu, int64_t rows, int64_t heads, Bytes&& bytes) {
  const Dims dims = sizes.second_order_head_dims();
  Plan plan = {dims, kWideWarps, kWideOwned, wide_iterated(sizes.element_size), 1, 0, 1, 0};
  plan.blocks = heads * tiles_of_head(rows, plan.owned, sizes.sequences);
  plan.stages = bytes(dims, 2) <= gpu.shared_limit ? 2 : 1;
  plan.shared_bytes = bytes(dims, plan.stages);
  plan.wide = true;
  return plan;
}

constexpr Plan tangent_plan(const Sizes& sizes, const Gpu& gpu) {
  if (sizes.is_wide_second_order()) {
    return wide_second_order_plan(sizes, gpu, sizes.queries, sizes.batch * sizes.heads, [&](Dims dims, int stages) {
      return wide_tangent_bytes(dims, sizes.element_size, stages);
    });
  }
  const Dims dims = sizes.second_order_head_dims();
  const TileShape shape = tangent_shape(dims, sizes.element_size);
  Plan plan = plan_rows(dims, shape, sizes.queries, sizes.batch * sizes.heads, dims.value, sizes.sequences);
  set_buffers(plan, {shape.stages, 1}, gpu,
              [&](int warps, Buffers buffers) { return tangent_bytes(dims, sizes.element_size, warps, buffers); });
  return plan;
}

constexpr void set_second_order_buffers(Plan& plan, const Sizes& sizes, const TileShape& shape, const Gpu& gpu,
                                        bool owns_queries) {
  set_buffers(plan, {shape.stages, 1}, gpu, [&](int warps, Buffers buffers) {
    return second_order_bytes(plan.dims, sizes.element_size, warps, buffers, owns_queries);
  });
}

constexpr Plan second_order_query_plan(const Sizes& sizes, const Gpu& gpu) {
  if (sizes.is_wide_second_order()) {
    return wide_second_order_plan(sizes, gpu, sizes.queries, sizes.batch * sizes.heads, [&](Dims dims, int stages) {
      return wide_second_order_bytes(dims, sizes.element_size, stages, true);
    });
  }
  const Dims dims = sizes.second_order_head_dims();
  const TileShape shape = second_order_shape(dims, sizes.element_size);
  Plan plan = plan_rows(dims, shape, sizes.queries, sizes.batch * sizes.heads, dims.key, sizes.sequences);
  set_second_order_buffers(plan, sizes, shape, gpu, true);
  return plan;
}

constexpr Plan second_order_key_value_plan(const Sizes& sizes, const Gpu& gpu) {
  if (sizes.is_wide_second_order()) {
    return wide_second_order_plan(sizes, gpu, sizes.keys, sizes.batch * sizes.key_heads, [&](Dims dims, int stages) {
      return wide_second_order_bytes(dims, sizes.element_size, stages, false);
    });
  }
  const Dims dims = sizes.second_order_head_dims();
  const TileShape shape = second_order_shape(dims, sizes.element_size);
  Plan plan = plan_rows(dims, shape, sizes.keys, sizes.batch * sizes.key_heads, widest(dims), sizes.sequences);
  set_second_order_buffers(plan, sizes, shape, gpu, false);
  return plan;
}

// A block owns a tile of the mask's gradient and iterates over everything that the mask is broadcast to. If there are
// few tiles, ``slices`` blocks share one, and their partial sums are added in order by attention_sum_parts.
constexpr Plan mask_plan(const Sizes& sizes, const int (&mask)[4], int multiprocessors, bool second_order) {
  const int size = sizes.element_size;
  const Dims dims = sizes.mask_head_dims(second_order);
  Plan plan = {};
  if (second_order && sizes.is_wide_second_order()) {
    plan = {dims, kWideWarps, kWideOwned, wide_iterated(size), 1, ceil_div(sizes.queries, kWideOwned), 1, 0};
    plan.shared_bytes = wide_second_order_bytes(dims, size, 1, true);
  } else {
    const TileShape shape = second_order ? mask_second_order_shape(dims, size) : mask_gradient_shape(dims, size);
    plan = plan_rows(dims, shape, sizes.queries, 1, dims.key);
    plan.shared_bytes =
        second_order ? mask_second_order_bytes(dims, size, plan.warps) : mask_gradient_bytes(dims, size, plan.warps);
  }
  const int64_t query_tiles = plan.blocks, key_tiles = ceil_div(sizes.keys, plan.iterated);
  const int64_t all = sizes.batch * sizes.heads * query_tiles * key_tiles;
  plan.blocks = int64_t{mask[0]} * mask[1] * (mask[2] == 1 ? 1 : query_tiles) * (mask[3] == 1 ? 1 : key_tiles);
  const int64_t tiles_each = plan.blocks > 0 ? all / plan.blocks : 1;
  const int64_t wanted =
      tiles_each > 0 ? ceil_div(int64_t{multiprocessors} * kBlocksPerMultiprocessor, plan.blocks) : 1;
  const int64_t splits = wanted < tiles_each ? wanted : tiles_each;
  plan.slices = static_cast<int>(splits < 1 ? 1 : splits);
  return plan;
}

}  // namespace fastgen::attention
