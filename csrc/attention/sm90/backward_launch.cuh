// Launcher of the backward pass of one storage type. An instantiation file enters it in launcher.h.
#pragma once

#include "attention/launching.cuh"
#include "attention/sm90/backward_key_value.cuh"
#include "attention/sm90/backward_query.cuh"
#include "attention/sm90/launch.cuh"

namespace fastgen::attention::sm90 {

template <typename T>
BackwardMaps backward_maps(const BackwardParams& p, int query_rows, int key_rows) {
  const Problem& problem = p.problem;
  const int batch = problem.batch;
  BackwardMaps maps;
  maps.query = map_of<T>(p.query, batch, problem.heads, problem.queries, problem.key_dim, query_rows);
  maps.grad_out = map_of<T>(p.grad_out, batch, problem.heads, problem.queries, problem.value_dim, query_rows);
  maps.key = map_of<T>(p.key, batch, problem.key_heads, problem.keys, problem.key_dim, key_rows);
  maps.value = map_of<T>(p.value, batch, problem.key_heads, problem.keys, problem.value_dim, key_rows);
  return maps;
}

// In this order: the first writes delta, which the second reads.
template <typename T, int kDim, bool kPadded>
void launch_backward(const BackwardParams& p, const Sizes& sizes, void* stream) {
  const Problem& problem = p.problem;
  const bool causal = problem.window_left != kUnbounded || problem.window_right != kUnbounded;
  const int multiprocessors = device::multiprocessors();
  const auto launch = [&](const char* name, auto kernel, bool owns_keys, int heads_in_turn) {
    const BackwardShape shape = backward_shape(kDim, owns_keys);
    const int query_rows = owns_keys ? shape.iterated : shape.owned,
              key_rows = owns_keys ? shape.owned : shape.iterated;
    const int tiles = static_cast<int>(device::grid_size(backward_tiles(sizes, owns_keys), name));
    const Plan plan = backward_plan(sizes, owns_keys, multiprocessors);
    device::launch(name, kernel, launch_config(plan, stream), backward_maps<T>(p, query_rows, key_rows), p,
                   BackwardSchedule{tiles, heads_in_turn, problem.heads / problem.key_heads});
  };
  launch("attention_backward_query_sm90", +attention_backward_query_sm90<T, kDim, kPadded>, false,
         heads_in_turn(sizes, causal));
  Sizes by_key = sizes;  // what a key head reads in turn: the queries of its group
  by_key.heads = sizes.key_heads, by_key.keys = sizes.heads / sizes.key_heads * sizes.queries;
  launch("attention_backward_key_value_sm90", +attention_backward_key_value_sm90<T, kDim, kPadded>, true,
         heads_in_turn(by_key, causal));
}

template <typename T>
bool try_backward(const BackwardParams& p, void* stream) {
  const Problem& problem = p.problem;
  const bool padded = is_padded(problem);
  Sizes sizes = sizes_of(problem, sizeof(T));
  sizes.plain = sizes.plain || padded;
  const bool served = backward_refusal(sizes) == nullptr && device::architecture() == 90 &&
                      has_map(p.query, problem.batch, problem.heads, problem.queries) &&
                      has_map(p.grad_out, problem.batch, problem.heads, problem.queries) &&
                      has_map(p.key, problem.batch, problem.key_heads, problem.keys) &&
                      has_map(p.value, problem.batch, problem.key_heads, problem.keys);
  if (!served) return false;
  dispatch_bool(padded, [&](auto with_padding) {
    constexpr bool kPadded = decltype(with_padding)::value;
    if (backward_head_dim_of(sizes) == 64) {
      launch_backward<T, 64, kPadded>(p, sizes, stream);
    } else {
      launch_backward<T, 128, kPadded>(p, sizes, stream);
    }
  });
  return true;
}

}  // namespace fastgen::attention::sm90
