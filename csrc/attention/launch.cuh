// Launchers of one storage type: plan, choose the instantiation, launch. Declared in launchers.h.
#pragma once

#include "attention/backward.cuh"
#include "attention/decode_plan.h"
#include "attention/forward.cuh"
#include "attention/launching.cuh"
#include "attention/mask_launch.cuh"
#include "attention/mask_second_order.cuh"
#include "attention/second_order.cuh"
#include "attention/sm90/launcher.h"
#include "attention/tangent.cuh"
#include "common/error.h"
#include "device/launch.cuh"

namespace fastgen::attention {

template <typename T>
void launch_forward(ForwardParams p, void* stream) {
  if (is_decode(p.problem)) return launch_decode<T>(p, stream);
  if constexpr (sizeof(T) == 2) {
    const sm90::ForwardLauncher launcher = sm90::forward_launcher<T>;
    if (launcher != nullptr && sm90::is_wanted() && launcher(p, stream)) return;
  }
  const Sizes sizes = sizes_of(p.problem, sizeof(T));
  const Plan plan = forward_plan(sizes, current_gpu());
  if constexpr (sizeof(T) == 2) {
    if (plan.wide) return launch_forward_wide<T>(p, stream);
  }
  p.tiles_per_block = plan.tiles_per_block, p.stages = plan.stages, p.query_buffers = plan.query_buffers;
  dispatch_head_dims<kHeadDims>(plan.dims, [&]<int kKeyDim, int kValueDim>() {
    dispatch_bool(sizes.plain, [&](auto plain) {
      constexpr auto kernel = attention_forward<T, kKeyDim, kValueDim, decltype(plain)::value>;
      device::launch("attention_forward", +kernel, launch_config(plan, stream), p);
    });
  });
}

template <typename T>
void launch_backward_query(BackwardParams p, void* stream) {
  const Sizes sizes = sizes_of(p.problem, sizeof(T));
  const Plan plan = backward_query_plan(sizes, current_gpu());
  if constexpr (sizeof(T) == 2) {
    if (plan.wide) return launch_backward_query_wide<T>(p, stream);
  }
  p.stages = plan.stages;
  dispatch_head_dims<kHeadDims>(plan.dims, [&]<int kKeyDim, int kValueDim>() {
    dispatch_plain<T, kKeyDim, kValueDim>(sizes.plain, [&](auto plain) {
      constexpr auto kernel = attention_backward_query<T, kKeyDim, kValueDim, decltype(plain)::value>;
      device::launch("attention_backward_query", +kernel, launch_config(plan, stream), p);
    });
  });
}

template <typename T>
void launch_backward_key_value(BackwardParams p, void* stream) {
  const Sizes sizes = sizes_of(p.problem, sizeof(T));
  if (sizes.keys == 0) return;
  const Plan plan = backward_key_value_plan(sizes, current_gpu());
  if constexpr (sizeof(T) == 2) {
    if (plan.wide) return launch_backward_key_value_wide<T>(p, stream);
  }
  p.stages = plan.stages;
  dispatch_head_dims<kHeadDims>(plan.dims, [&]<int kKeyDim, int kValueDim>() {
    dispatch_plain<T, kKeyDim, kValueDim>(sizes.plain, [&](auto plain) {
      constexpr auto kernel = attention_backward_key_value<T, kKeyDim, kValueDim, decltype(plain)::value>;
      device::launch("attention_backward_key_value", +kernel, launch_config(plan, stream), p);
    });
  });
}

template <typename T>
void launch_tangent(TangentParams p, void* stream) {
  const Sizes sizes = sizes_of(p.problem, sizeof(T));
  if (sizes.is_wide_second_order()) return launch_tangent_wide<T>(p, stream);
  const Plan plan = tangent_plan(sizes, current_gpu());
  p.stages = plan.stages;
  dispatch_head_dims<kSecondOrderHeadDims>(plan.dims, [&]<int kKeyDim, int kValueDim>() {
    dispatch_plain<T, kKeyDim, kValueDim>(sizes.plain, [&](auto plain) {
      constexpr auto kernel = attention_tangent<T, kKeyDim, kValueDim, decltype(plain)::value>;
      device::launch("attention_tangent", +kernel, launch_config(plan, stream), p);
    });
  });
}

template <typename T>
void launch_second_order_query(SecondOrderParams p, void* stream) {
  const Sizes sizes = sizes_of(p.first.problem, sizeof(T));
  if (sizes.is_wide_second_order()) return launch_second_order_query_wide<T>(p, stream);
  const Plan plan = second_order_query_plan(sizes, current_gpu());
  p.first.stages = plan.stages;
  dispatch_head_dims<kSecondOrderHeadDims>(plan.dims, [&]<int kKeyDim, int kValueDim>() {
    device::launch("attention_second_order_query", +attention_second_order_query<T, kKeyDim, kValueDim>,
                   launch_config(plan, stream), p);
  });
}

template <typename T>
void launch_second_order_key_value(SecondOrderParams p, void* stream) {
  const Sizes sizes = sizes_of(p.first.problem, sizeof(T));
  if (sizes.keys == 0) return;
  if (sizes.is_wide_second_order()) return launch_second_order_key_value_wide<T>(p, stream);
  const Plan plan = second_order_key_value_plan(sizes, current_gpu());
  p.first.stages = plan.stages;
  dispatch_head_dims<kSecondOrderHeadDims>(plan.dims, [&]<int kKeyDim, int kValueDim>() {
    device::launch("attention_second_order_key_value", +attention_second_order_key_value<T, kKeyDim, kValueDim>,
                   launch_config(plan, stream), p);
  });
}

template <typename T>
int mask_splits(const Problem& problem, const int (&mask)[4]) {
  return mask_plan(sizes_of(problem, sizeof(T)), mask, device::multiprocessors(), false).slices;
}
template <typename T>
int mask_second_order_splits(const Problem& problem, const int (&mask)[4]) {
  return mask_plan(sizes_of(problem, sizeof(T)), mask, device::multiprocessors(), true).slices;
}

template <typename T>
void launch_mask_gradient(const BackwardParams& p, const MaskGradient& gradient, void* stream) {
  const Plan plan = mask_plan(sizes_of(p.problem, sizeof(T)), gradient.sizes, device::multiprocessors(), false);
  dispatch_head_dims<kMaskHeadDims>(plan.dims, [&]<int kKeyDim, int kValueDim>() {
    launch_mask<T>("attention_mask_gradient", +attention_mask_gradient<T, kKeyDim, kValueDim>, plan, p, gradient,
                   stream);
  });
}

template <typename T>
void launch_mask_second_order(const SecondOrderParams& p, const MaskGradient& gradient, void* stream) {
  const Sizes sizes = sizes_of(p.first.problem, sizeof(T));
  if (sizes.is_wide_second_order()) return launch_mask_second_order_wide<T>(p, gradient, stream);
  const Plan plan = mask_plan(sizes, gradient.sizes, device::multiprocessors(), true);
  dispatch_head_dims<kMaskSecondOrderHeadDims>(plan.dims, [&]<int kKeyDim, int kValueDim>() {
    launch_mask<T>("attention_mask_second_order", +attention_mask_second_order<T, kKeyDim, kValueDim>, plan, p,
                   gradient, stream);
  });
}

}  // namespace fastgen::attention
