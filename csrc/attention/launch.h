// The interface between api.cpp and the kernels: the launchers of launchers.h, dispatched by dtype. For api.cpp alone.
#pragma once

#include "attention/decode_plan.h"
#include "attention/launchers.h"
#include "attention/sm90/tangent_launcher.h"
#include "common/dispatch.h"

namespace fastgen::attention {

inline void launch_forward(const ForwardParams& params, DType dtype, void* stream) {
  dispatch_dtype(dtype, [&]<typename T>(std::type_identity<T>) { launch_forward<T>(params, stream); });
}
// The floats of ForwardParams::parts; 0: none.
inline int64_t forward_workspace(const Problem& problem, DType dtype) {
  int64_t floats = 0;
  dispatch_dtype(dtype, [&]<typename T>(std::type_identity<T>) {
    if (is_decode(problem)) {
      floats = decode_workspace<T>(problem);
    } else if constexpr (sizeof(T) == 2) {
      floats = wide_forward_workspace<T>(problem);
    }
  });
  return floats;
}
inline void launch_backward(const BackwardParams& params, DType dtype, void* stream) {
  dispatch_dtype(dtype, [&]<typename T>(std::type_identity<T>) {
    if constexpr (sizeof(T) == 2) {
      const sm90::BackwardLauncher launcher = sm90::backward_launcher<T>;
      if (launcher != nullptr && sm90::is_wanted() && launcher(params, stream)) return;
    }
    if (launch_one_tile<T>(params, stream)) return;
    launch_backward_query<T>(params, stream);
    launch_backward_key_value<T>(params, stream);
  });
}
// Whether one kernel computes the gradient of a mask of these sizes and all others.
inline bool takes_mask_gradient(const Problem& problem, const int (&mask)[4], DType dtype) {
  bool takes = false;
  dispatch_dtype(dtype, [&]<typename T>(std::type_identity<T>) { takes = one_tile_splits<T>(problem, mask) > 0; });
  return takes;
}
// Where takes_mask_gradient is true, in the place of launch_backward; else after it.
inline void launch_mask_gradient(const BackwardParams& params, const MaskGradient& gradient, DType dtype,
                                 void* stream) {
  dispatch_dtype(dtype, [&]<typename T>(std::type_identity<T>) {
    if (one_tile_splits<T>(params.problem, gradient.sizes) > 0) {
      launch_one_tile_mask<T>(params, gradient, stream);
    } else {
      launch_mask_gradient<T>(params, gradient, stream);
    }
  });
}
inline void launch_tangent(const TangentParams& params, DType dtype, void* stream) {
  dispatch_dtype(dtype, [&]<typename T>(std::type_identity<T>) {
    if constexpr (sizeof(T) == 2) {
      const sm90::TangentLauncher launcher = sm90::tangent_launcher<T>;
      if (launcher != nullptr && sm90::is_wanted() && launcher(params, stream)) return;
    }
    launch_tangent<T>(params, stream);
  });
}
// Output and tangent by one kernel; false, with nothing launched, if none takes the problem.
inline bool launch_forward_tangent(const sm90::ForwardTangentParams& params, DType dtype, void* stream) {
  bool launched = false;
  dispatch_dtype(dtype, [&]<typename T>(std::type_identity<T>) {
    if constexpr (sizeof(T) == 2) {
      const sm90::ForwardTangentLauncher launcher = sm90::forward_tangent_launcher<T>;
      launched = launcher != nullptr && sm90::is_wanted() && launcher(params, stream);
    }
  });
  return launched;
}
inline void launch_second_order(const SecondOrderParams& params, DType dtype, void* stream) {
  dispatch_dtype(dtype, [&]<typename T>(std::type_identity<T>) {
    launch_second_order_query<T>(params, stream);
    launch_second_order_key_value<T>(params, stream);
  });
}
inline void launch_mask_second_order(const SecondOrderParams& params, const MaskGradient& gradient, DType dtype,
                                     void* stream) {
  dispatch_dtype(dtype,
                 [&]<typename T>(std::type_identity<T>) { launch_mask_second_order<T>(params, gradient, stream); });
}
inline int mask_splits(const Problem& problem, const int (&mask)[4], DType dtype, bool second_order) {
  int splits = 1;
  dispatch_dtype(dtype, [&]<typename T>(std::type_identity<T>) {
    splits = second_order ? mask_second_order_splits<T>(problem, mask) : one_tile_splits<T>(problem, mask);
    if (splits == 0) splits = mask_splits<T>(problem, mask);
  });
  return splits;
}

}  // namespace fastgen::attention
