// Launchers of one storage type, instantiated in instantiations/.
#pragma once

#include "common/dispatch.h"
#include "common/error.h"
#include "device/launch.cuh"
#include "projection/heads_backward.cuh"
#include "projection/plan.h"
#include "projection/project.cuh"
#include "projection/weight_gradient.cuh"

namespace fastgen::projection {

template <typename Body>
void dispatch_tile(int tile, Body&& body) {
  static_assert(kTileCount == 2, "one case per tile");
  tile == 0 ? body(std::integral_constant<int, 0>{}) : body(std::integral_constant<int, 1>{});
}

inline unsigned checked_blocks(int64_t blocks, int64_t most) { return device::grid_size(blocks, "projection", most); }

inline int staged_bytes(const TileShape& shape, int element_size, bool left_k_rows, bool right_k_rows) {
  return larger(pipeline_bytes(shape, element_size, left_k_rows, right_k_rows), staging_bytes(shape));
}

// The largest head that has to be in one tile; 1 without QK-norm and RoPE.
inline int widest_head(const ProjectParams& p) {
  int widest = 1;
  for (int i = 0; i < larger(p.epilogue.norm_count, p.epilogue.rotated); ++i)
    widest = larger(widest, p.out.parts[i].dim);
  return widest;
}

template <typename T>
void project(ProjectParams p, cudaStream_t stream) {
  const bool whole_heads = p.epilogue.norm_count > 0 || p.epilogue.rotated > 0;
  const Plan plan = project_plan(p.tokens, p.out.channels, widest_head(p), device::multiprocessors());
  p.band_count = make_bands(p.bands, p.out, whole_heads, plan.tile);
  const unsigned blocks = checked_blocks(plan.row_tiles * column_tiles(p.bands, p.band_count), INT32_MAX);
  const bool across = p.x.channel != 1, down = p.inputs_rows;
  const TileShape& shape = kTileShapes[plan.tile];
  const int bytes = staged_bytes(shape, sizeof(T), across, down);
  dispatch_tile(plan.tile, [&](auto index) {
    dispatch_bool(across, [&](auto tokens_across) {
      dispatch_bool(down, [&](auto inputs_rows) {
        constexpr auto kernel =
            projection_project<T, decltype(index)::value, decltype(tokens_across)::value, decltype(inputs_rows)::value>;
        device::launch("projection_project", +kernel,
                       {dim3(blocks), dim3(shape.threads()), static_cast<size_t>(bytes), stream}, p);
      });
    });
  });
}

template <typename T>
void weight_gradient(WeightGradientParams p, cudaStream_t stream) {
  const Plan plan = gradient_plan(p.tokens, p.grad.channels, p.x.channels, sizeof(T), device::multiprocessors());
  p.splits = plan.splits;
  p.tiles = ceil_div(gradient_tiles(p.tokens, sizeof(T)), plan.splits);
  const dim3 grid(checked_blocks(plan.column_tiles, INT32_MAX), checked_blocks(plan.row_tiles, UINT16_MAX),
                  checked_blocks(plan.splits, UINT16_MAX));
  const TileShape& shape = kTileShapes[plan.tile];
  const auto launch = [&]<int kTile, bool kGradAcross, bool kAcross>() {
    constexpr auto kernel = projection_weight_gradient<T, kTile, kGradAcross, kAcross>;
    const int bytes = pipeline_bytes(shape, sizeof(T), !kGradAcross, !kAcross);
    device::launch("projection_weight_gradient", +kernel,
                   {grid, dim3(shape.threads()), static_cast<size_t>(bytes), stream}, p);
  };
  const bool grad_across = p.grad.channel != 1, across = p.x.channel != 1;
  if (grad_across && across)
    throw Error("projection", "the gradient or the input has contiguous channels, as heads do");
  dispatch_tile(plan.tile, [&]<int kTile>(std::integral_constant<int, kTile>) {
    if (grad_across) {
      launch.template operator()<kTile, true, false>();
    } else if (across) {
      launch.template operator()<kTile, false, true>();
    } else {
      launch.template operator()<kTile, false, false>();
    }
  });
}

template <typename T>
void reduce(const ReduceParams& p, cudaStream_t stream) {
  const dim3 grid(checked_blocks(p.rows, INT32_MAX));
  device::launch("projection_reduce", +projection_reduce<T>, {grid, dim3(kSumThreads), 0, stream}, p);
}

template <typename T>
void heads_backward(const HeadBackwardParams& p, cudaStream_t stream) {
  const int dim = p.grad.parts[0].dim;
  const int64_t heads = static_cast<int64_t>(p.tokens.batch) * p.tokens.count * (p.grad.channels / dim);
  const dim3 grid(checked_blocks(head_blocks(heads, device::multiprocessors()), INT32_MAX));
  const size_t bytes = 2 * (kHeadThreads / 32) * sizeof(float) * static_cast<size_t>(dim);
  device::launch("projection_heads_backward", +projection_heads_backward<T>, {grid, dim3(kHeadThreads), bytes, stream},
                 p);
}

template <typename T>
void scale_rows(const void* weight, int64_t weight_row, const Vector& gate, void* out, int rows, int columns,
                cudaStream_t stream) {
  device::launch("projection_scale_rows", +projection_scale_rows<T>,
                 {dim3(checked_blocks(rows, INT32_MAX)), dim3(kSumThreads), 0, stream}, static_cast<const T*>(weight),
                 weight_row, gate, static_cast<T*>(out), columns);
}

template <typename T>
void sum_rows(const float* parts, int rows, int columns, void* out, cudaStream_t stream) {
  device::launch("projection_sum_rows", +projection_sum_rows<T>,
                 {dim3(checked_blocks(columns, INT32_MAX)), dim3(kSumThreads), 0, stream}, parts, rows, columns,
                 static_cast<T*>(out));
}

}  // namespace fastgen::projection
