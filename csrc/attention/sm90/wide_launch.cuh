// Launcher of the forward kernel of head dim 512, of one storage type. An instantiation file enters it in
// wide_launcher.h.
#pragma once

#include "attention/combine_launch.cuh"
#include "attention/launching.cuh"
#include "attention/sm90/wide.cuh"
#include "attention/sm90/wide_launcher.h"

namespace fastgen::attention::sm90 {

template <typename T>
bool try_forward_wide(const ForwardParams& given, void* stream) {
  ForwardParams p = given;
  const Problem& problem = p.problem;
  const Sizes sizes = sizes_of(problem, sizeof(T));
  const bool served = wide_refusal(sizes) == nullptr && device::architecture() == 90 &&
                      has_map(p.query, problem.batch, problem.heads, problem.queries) &&
                      has_map(p.key, problem.batch, problem.key_heads, problem.keys) &&
                      has_map(p.value, problem.batch, problem.key_heads, problem.keys);
  if (!served) return false;
  const Plan plan = wide_forward_plan90(sizes, current_gpu());
  p.splits = plan.splits;
  if (p.splits > 1 && p.parts == nullptr) throw Error("attention_forward_wide_sm90", "split keys need a workspace");
  const bool windowed = problem.window_left != kUnbounded || problem.window_right != kUnbounded;
  const Schedule schedule = {sizes.batch * sizes.heads * ceil_div(sizes.queries, kGroupRows),
                             heads_in_turn(sizes, windowed)};
  ForwardMaps maps;
  maps.query = map_of<T>(p.query, problem.batch, problem.heads, problem.queries, problem.key_dim, kGroupRows);
  maps.key = map_of<T>(p.key, problem.batch, problem.key_heads, problem.keys, problem.key_dim, kWideKeys);
  maps.value = map_of<T>(p.value, problem.batch, problem.key_heads, problem.keys, problem.value_dim, kWideKeys);
  device::Launch config = launch_config(plan, stream);
  config.grid.y = static_cast<unsigned>(p.splits);
  device::launch("attention_forward_wide_sm90", +attention_forward_wide_sm90<T>, config, maps, p, schedule);
  launch_combine<T, kWideDim>(p, sizes, stream);
  return true;
}

}  // namespace fastgen::attention::sm90
