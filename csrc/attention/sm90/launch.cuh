// Launcher of one storage type. An instantiation file enters it in launcher.h.
#pragma once

#include "attention/launching.cuh"
#include "attention/sm90/forward.cuh"
#include "attention/sm90/launcher.h"

namespace fastgen::attention::sm90 {

inline bool is_windowed(const Problem& p) { return p.window_left != kUnbounded || p.window_right != kUnbounded; }

template <typename T, int kDim, int kConsumerCount, int kKeys, bool kPadded>
void launch_forward(const ForwardParams& p, const Sizes& sizes, void* stream) {
  const Problem& problem = p.problem;
  const bool windowed = is_windowed(problem);
  constexpr int kRows = kConsumerCount * kGroupRows;
  const Schedule schedule = {sizes.batch * sizes.heads * ceil_div(sizes.queries, kRows),
                             heads_in_turn(sizes, windowed)};
  ForwardMaps maps;
  maps.query = map_of<T>(p.query, problem.batch, problem.heads, problem.queries, problem.key_dim, kRows);
  maps.key = map_of<T>(p.key, problem.batch, problem.key_heads, problem.keys, problem.key_dim, kKeys);
  maps.value = map_of<T>(p.value, problem.batch, problem.key_heads, problem.keys, problem.value_dim, kKeys);
  const Plan plan = forward_plan(sizes, device::multiprocessors(), kPadded, windowed);
  device::launch("attention_forward_sm90", +attention_forward_sm90<T, kDim, kConsumerCount, kKeys, kPadded>,
                 launch_config(plan, stream), maps, p, schedule);
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
    const int dim = head_dim_of(sizes);
    const bool windowed = is_windowed(problem);
    if (forward_consumers(sizes, device::multiprocessors(), kPadded) == 3) {
      launch_forward<T, 64, 3, BLOCK_N, false>(p, sizes, stream);
    } else if (dim == 64) {
      launch_forward<T, 64, 2, BLOCK_N, kPadded>(p, sizes, stream);
    } else if (forward_keys(sizes, kPadded, windowed) == kLongTile) {
      launch_forward<T, 128, 2, kLongTile, false>(p, sizes, stream);
    } else if (dim == 128) {
      launch_forward<T, 128, 2, BLOCK_N, kPadded>(p, sizes, stream);
    } else if (dim == 192) {
      launch_forward<T, 192, 2, most_keys(192, kPadded), kPadded>(p, sizes, stream);
    } else {
      launch_forward<T, 256, 2, most_keys(256, kPadded), kPadded>(p, sizes, stream);
    }
  });
  return true;
}

}  // namespace fastgen::attention::sm90
