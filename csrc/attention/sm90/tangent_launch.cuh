// Launcher of the tangent of one storage type. An instantiation file enters it in tangent_launcher.h.
#pragma once

#include "attention/sm90/launch.cuh"
#include "attention/sm90/tangent.cuh"
#include "attention/sm90/tangent_launcher.h"

namespace fastgen::attention::sm90 {

template <typename T, int kDim, bool kPadded>
void launch_tangent(const TangentParams& p, const Sizes& sizes, void* stream) {
  const Problem& problem = p.problem;
  constexpr BackwardShape shape = tangent_shape90(kDim, kPadded);
  const Schedule schedule = {sizes.batch * sizes.heads * ceil_div(sizes.queries, shape.owned),
                             heads_in_turn(sizes, is_windowed(problem))};
  const auto of_queries = [&](const Operand& operand) {
    return map_of<T>(operand, problem.batch, problem.heads, problem.queries, problem.key_dim, shape.owned);
  };
  const auto of_keys = [&](const Operand& operand, int dim) {
    return map_of<T>(operand, problem.batch, problem.key_heads, problem.keys, dim, shape.iterated);
  };
  TangentMaps maps;
  maps.query = of_queries(p.query), maps.tangent_query = of_queries(p.tangents.query);
  maps.key = of_keys(p.key, problem.key_dim), maps.tangent_key = of_keys(p.tangents.key, problem.key_dim);
  maps.value = of_keys(p.value, problem.value_dim), maps.tangent_value = of_keys(p.tangents.value, problem.value_dim);
  const Plan plan = tangent_plan90(sizes, device::multiprocessors(), kPadded);
  device::launch("attention_tangent_sm90", +attention_tangent_sm90<T, kDim, kPadded>, launch_config(plan, stream), maps,
                 p, schedule);
}

// All of query, key and value have a tangent, and the mask has none.
template <typename T>
bool try_tangent(const TangentParams& p, void* stream) {
  const Problem& problem = p.problem;
  const bool padded = is_padded(problem);
  Sizes sizes = sizes_of(problem, sizeof(T));
  sizes.plain = (sizes.plain || padded) && p.tangents.mask.kind == MaskKind::kNone;
  const auto has_maps = [&](const Operand& operand, const Operand& tangent, int heads, int rows) {
    return tangent.data != nullptr && has_map(operand, problem.batch, heads, rows) &&
           has_map(tangent, problem.batch, heads, rows);
  };
  const bool served = tangent_refusal(sizes) == nullptr && device::architecture() == 90 &&
                      has_maps(p.query, p.tangents.query, problem.heads, problem.queries) &&
                      has_maps(p.key, p.tangents.key, problem.key_heads, problem.keys) &&
                      has_maps(p.value, p.tangents.value, problem.key_heads, problem.keys);
  if (!served) return false;
  dispatch_bool(padded, [&](auto with_padding) {
    constexpr bool kPadded = decltype(with_padding)::value;
    if (backward_head_dim_of(sizes) == 64) {
      launch_tangent<T, 64, kPadded>(p, sizes, stream);
    } else {
      launch_tangent<T, 128, kPadded>(p, sizes, stream);
    }
  });
  return true;
}

}  // namespace fastgen::attention::sm90
