// Launcher of one storage type. An instantiation file enters it in launcher.h.
#pragma once

#include "attention/launching.cuh"
#include "attention/sm90/forward.cuh"
#include "attention/sm90/launcher.h"

namespace fastgen::attention::sm90 {

template <typename T, int kDim, bool kPadded>
void launch_forward(const ForwardParams& p, const Sizes& sizes, void* stream) {
  const Problem& problem = p.problem;
  const bool causal = problem.window_left != kUnbounded || problem.window_right != kUnbounded;
  const Schedule schedule = {sizes.batch * sizes.heads * ceil_div(sizes.queries, BLOCK_M),
                             heads_in_turn(sizes, causal)};
  ForwardMaps maps;
  maps.query = map_of<T>(p.query, problem.batch, problem.heads, problem.queries, problem.key_dim, BLOCK_M);
  maps.key = map_of<T>(p.key, problem.batch, problem.key_heads, problem.keys, problem.key_dim, BLOCK_N);
  maps.value = map_of<T>(p.value, problem.batch, problem.key_heads, problem.keys, problem.value_dim, BLOCK_N);
  const Plan plan = forward_plan(sizes, device::multiprocessors());
  device::launch("attention_forward_sm90", +attention_forward_sm90<T, kDim, kPadded>, launch_config(plan, stream), maps,
                 p, schedule);
}

// A boolean mask of keys, the same for all queries, and nothing else that needs the scores.
inline bool is_padded(const Problem& p) {
  return p.mask.kind == MaskKind::kBool && p.mask.query == 0 && p.dropout.seeds == nullptr && p.softcap == 0.0f &&
         p.sequences.count == 0;
}

template <typename T>
bool try_forward(const ForwardParams& p, void* stream) {
  const Problem& problem = p.problem;
  const bool padded = is_padded(problem);
  Sizes sizes = sizes_of(problem, sizeof(T));
  sizes.plain = sizes.plain || padded;
  const bool served = refusal(sizes) == nullptr && device::architecture() == 90 &&
                      has_map(p.query, problem.batch, problem.heads, problem.queries) &&
                      has_map(p.key, problem.batch, problem.key_heads, problem.keys) &&
                      has_map(p.value, problem.batch, problem.key_heads, problem.keys);
  if (!served) return false;
  dispatch_bool(padded, [&](auto with_padding) {
    constexpr bool kPadded = decltype(with_padding)::value;
    if (head_dim_of(sizes) == 64) {
      launch_forward<T, 64, kPadded>(p, sizes, stream);
    } else {
      launch_forward<T, 128, kPadded>(p, sizes, stream);
    }
  });
  return true;
}

}  // namespace fastgen::attention::sm90
