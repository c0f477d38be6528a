// Launchers of one storage type; the instantiations define one each.
#pragma once

#include <stdexcept>

#include "common/dispatch.h"
#include "device/launch.cuh"
#include "projection/heads_backward.cuh"
#include "projection/project.cuh"
#include "projection/weight_gradient.cuh"

namespace fastgen::projection {

template <typename Body>
void dispatch_shape(int shape, Body&& body) {
  static_assert(kShapeCount == 2, "a case for each");
  shape == 0 ? body(std::integral_constant<int, 0>{}) : body(std::integral_constant<int, 1>{});
}

inline unsigned checked_blocks(int64_t blocks, int64_t most) {
  if (blocks > most) throw std::runtime_error("projection: more tokens or channels than one launch has blocks for");
  return static_cast<unsigned>(blocks);
}

inline int staged_bytes(const Shape& shape, int element_size, bool left_down, bool right_down) {
  return larger(pipeline_bytes(shape, element_size, left_down, right_down), staging_bytes(shape));
}

// Heads that a tile has to have whole; 1 where there are none.
inline int widest_head(const ProjectParams& p) {
  int widest = 1;
  for (int i = 0; i < larger(p.finish.norm_count, p.finish.rotated); ++i) widest = larger(widest, p.out.parts[i].dim);
  return widest;
}

template <typename T>
void project(ProjectParams p, cudaStream_t stream) {
  const bool whole_heads = p.finish.norm_count > 0 || p.finish.rotated > 0;
  const Plan plan = project_plan(p.tokens, p.out.channels, widest_head(p), device::multiprocessors());
  p.band_count = make_bands(p.bands, p.out, whole_heads, plan.shape);
  const unsigned blocks = checked_blocks(plan.row_tiles * column_tiles(p.bands, p.band_count), INT32_MAX);
  const bool across = p.x.channel != 1, down = p.inputs_down;
  const Shape& shape = kShapes[plan.shape];
  const int bytes = staged_bytes(shape, sizeof(T), across, down);
  dispatch_shape(plan.shape, [&](auto index) {
    dispatch_bool(across, [&](auto tokens_across) {
      dispatch_bool(down, [&](auto inputs_down) {
        constexpr auto kernel =
            projection_project<T, decltype(index)::value, decltype(tokens_across)::value, decltype(inputs_down)::value>;
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
  p.steps = ceil_div(gradient_steps(p.tokens, sizeof(T)), plan.splits);
  const dim3 grid(checked_blocks(plan.column_tiles, INT32_MAX), checked_blocks(plan.row_tiles, UINT16_MAX),
                  checked_blocks(plan.splits, UINT16_MAX));
  const Shape& shape = kShapes[plan.shape];
  dispatch_shape(plan.shape, [&](auto index) {
    dispatch_bool(p.grad.channel != 1, [&](auto grad_across) {
      dispatch_bool(p.x.channel != 1, [&](auto across) {
        constexpr auto kernel = projection_weight_gradient<T, decltype(index)::value, decltype(grad_across)::value,
                                                           decltype(across)::value>;
        const int bytes = pipeline_bytes(shape, sizeof(T), !decltype(grad_across)::value, !decltype(across)::value);
        device::launch("projection_weight_gradient", +kernel,
                       {grid, dim3(shape.threads()), static_cast<size_t>(bytes), stream}, p);
      });
    });
  });
}

template <typename T>
void finish(const FinishParams& p, cudaStream_t stream) {
  const dim3 grid(checked_blocks(p.rows, INT32_MAX));
  device::launch("projection_finish", +projection_finish<T>, {grid, dim3(kSumThreads), 0, stream}, p);
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
                 {dim3(static_cast<unsigned>(rows)), dim3(kSumThreads), 0, stream}, static_cast<const T*>(weight),
                 weight_row, gate, static_cast<T*>(out), columns);
}

template <typename T>
void sum_rows(const float* parts, int rows, int columns, void* out, cudaStream_t stream) {
  device::launch("projection_sum_rows", +projection_sum_rows<T>,
                 {dim3(static_cast<unsigned>(columns)), dim3(kSumThreads), 0, stream}, parts, rows, columns,
                 static_cast<T*>(out));
}

}  // namespace fastgen::projection
