// The launchers of attention_backward_one_tile and attention_backward_one_head. Declared in launchers.h.
#pragma once

#include "attention/launch.cuh"
#include "attention/one_head.cuh"
#include "attention/one_tile.cuh"

namespace fastgen::attention {

template <typename T>
constexpr auto& one_tile_table() {
  if constexpr (sizeof(T) == 4) {
    return kOneTile32;
  } else {
    return kOneTile16;
  }
}

template <typename T, OneTileKind kKind>
void launch_one_tile(const OneTilePlan& found, const BackwardParams& p, const MaskGradient& gradient, void* stream) {
  const auto one = [&]<size_t i>() {
    constexpr OneTileShape kShape = one_tile_table<T>()[i];
    constexpr int kBlocks = kKind == OneTileKind::kLearned ? kShape.blocks_with_mask : kShape.blocks;
    if constexpr (kBlocks > 0) {
      if (found.entry != static_cast<int>(i)) return;
      constexpr auto kernel = attention_backward_one_tile<T, kShape.dims.key, kShape.rows, kBlocks, kKind>;
      device::launch("attention_backward_one_tile", +kernel, launch_config(found.plan, stream), p, gradient);
    }
  };
  [&]<size_t... i>(std::index_sequence<i...>) {
    (one.template operator()<i>(), ...);
  }(std::make_index_sequence<length(one_tile_table<T>())>{});
}

template <typename T>
bool launch_one_head(const Sizes& sizes, const BackwardParams& p, void* stream) {
  if constexpr (sizeof(T) == 2) {
    if (!sizes.plain) return false;  // without a question to the device
    const OneHeadPlan found = one_head_plan(sizes, current_gpu());
    if (!found.taken) return false;
    constexpr auto kernel = attention_backward_one_head<T, kOneHeadDims.key>;
    device::launch("attention_backward_one_head", +kernel, launch_config(found.plan, stream), p);
    return true;
  } else {
    return false;
  }
}

template <typename T>
bool launch_one_tile(const BackwardParams& p, void* stream) {
  const Sizes sizes = sizes_of(p.problem, sizeof(T));
  const OneTilePlan found = one_tile_plan(sizes, p.problem.softcap != 0.0f);
  if (found.entry < 0) return launch_one_head<T>(sizes, p, stream);
  if constexpr (sizeof(T) == 2) {  // as dispatch_plain
    if (sizes.plain) {
      launch_one_tile<T, OneTileKind::kPlain>(found, p, {}, stream);
      return true;
    }
  }
  launch_one_tile<T, OneTileKind::kMasked>(found, p, {}, stream);
  return true;
}

template <typename T>
OneTilePlan one_tile_mask_plan(const Problem& problem, const int (&mask)[4]) {
  const bool extras = problem.softcap != 0.0f || problem.dropout.seeds != nullptr;
  return one_tile_mask_plan(sizes_of(problem, sizeof(T)), extras, mask, device::multiprocessors());
}

template <typename T>
int one_tile_splits(const Problem& problem, const int (&mask)[4]) {
  const OneTilePlan found = one_tile_mask_plan<T>(problem, mask);
  return found.entry < 0 ? 0 : found.plan.slices;
}

template <typename T>
void launch_one_tile_mask(const BackwardParams& p, const MaskGradient& gradient, void* stream) {
  OneTilePlan found = one_tile_mask_plan<T>(p.problem, gradient.sizes);
  found.plan.slices = gradient.splits;
  launch_one_tile<T, OneTileKind::kLearned>(found, p, gradient, stream);
  launch_sum_parts<T>(gradient, stream);
}

}  // namespace fastgen::attention
