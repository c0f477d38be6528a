// Launchers of the tangent of one storage type. Instantiation files enter them in tangent_launcher.h.
#pragma once

#include "attention/sm90/launch.cuh"
#include "attention/sm90/tangent.cuh"
#include "attention/sm90/tangent_launcher.h"

namespace fastgen::attention::sm90 {

// P: TangentParams or ForwardTangentParams.
template <typename T, typename P>
TangentMaps tangent_maps(const P& p, const BackwardShape& shape) {
  const Problem& problem = p.problem;
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
  return maps;
}
// All of query, key and value have a tangent, and tensor maps.
template <typename P>
bool has_tangent_maps(const P& p) {
  const Problem& problem = p.problem;
  const auto has_maps = [&](const Operand& operand, const Operand& tangent, int heads, int rows) {
    return tangent.data != nullptr && has_map(operand, problem.batch, heads, rows) &&
           has_map(tangent, problem.batch, heads, rows);
  };
  return has_maps(p.query, p.tangents.query, problem.heads, problem.queries) &&
         has_maps(p.key, p.tangents.key, problem.key_heads, problem.keys) &&
         has_maps(p.value, p.tangents.value, problem.key_heads, problem.keys);
}
inline Schedule tangent_schedule(const Problem& problem, const Sizes& sizes) {
  return {sizes.batch * sizes.heads * ceil_div(sizes.queries, BLOCK_M), heads_in_turn(sizes, is_windowed(problem))};
}
template <typename T>
Sizes tangent_sizes(const Problem& problem, const Tangents& tangents) {
  Sizes sizes = sizes_of(problem, sizeof(T));
  sizes.plain = (sizes.plain || is_padded(problem)) && tangents.mask.kind == MaskKind::kNone;
  return sizes;
}

template <typename T, int kDim, bool kPadded>
void launch_tangent(const TangentParams& p, const Sizes& sizes, void* stream) {
  const TangentMaps maps = tangent_maps<T>(p, tangent_shape90(kDim, kPadded));
  const Plan plan = tangent_plan90(sizes, device::multiprocessors(), kPadded);
  device::launch("attention_tangent_sm90", +attention_tangent_sm90<T, kDim, kPadded>, launch_config(plan, stream), maps,
                 p, tangent_schedule(p.problem, sizes));
}

template <typename T>
bool try_tangent(const TangentParams& p, void* stream) {
  const Sizes sizes = tangent_sizes<T>(p.problem, p.tangents);
  if (tangent_refusal(sizes) != nullptr || device::architecture() != 90 || !has_tangent_maps(p)) return false;
  dispatch_bool(is_padded(p.problem), [&](auto with_padding) {
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
