// The interface between api.cpp and the kernels: launchers of one storage type, defined in launch.cuh and instantiated
// in instantiations/ (a file for each launcher and type, which compile in parallel), and their dispatch by dtype.
#pragma once

#include "attention/decode_plan.h"
#include "attention/params.h"
#include "common/dispatch.h"

namespace fastgen::attention {

// ``stream`` is a cudaStream_t. Launchers do not synchronize. Queries and heads must not be empty; keys may be.
template <typename T>
void launch_forward(ForwardParams params, void* stream);
// Of problems whose plan is wide. Half and BFloat16.
template <typename T>
void launch_forward_wide(ForwardParams params, void* stream);
template <typename T>
int64_t wide_forward_workspace(const Problem& problem);
template <typename T>
void launch_backward_query_wide(BackwardParams params, void* stream);
template <typename T>
void launch_backward_key_value_wide(BackwardParams params, void* stream);
// The part of launch_forward for few queries against many keys, and the floats of ForwardParams::parts that it needs.
template <typename T>
void launch_decode(ForwardParams params, void* stream);
template <typename T>
int64_t decode_workspace(const Problem& problem);
// Two halves of the backward pass, in this order: the first one writes delta, which the second one reads, as does
// launch_mask_gradient.
template <typename T>
void launch_backward_query(BackwardParams params, void* stream);
template <typename T>
void launch_backward_key_value(BackwardParams params, void* stream);
template <typename T>
void launch_mask_gradient(const BackwardParams& params, const MaskGradient& gradient, void* stream);
// The whole backward pass in one kernel; false, with nothing launched, if the scores of a head do not fit one tile.
template <typename T>
bool launch_one_tile(const BackwardParams& params, void* stream);
// The same with the gradient of the mask, if one_tile_splits is not 0.
template <typename T>
void launch_one_tile_mask(const BackwardParams& params, const MaskGradient& gradient, void* stream);

template <typename T>
void launch_tangent(const TangentParams& params, void* stream);
template <typename T>
void launch_second_order(const SecondOrderParams& params, void* stream);
// Reads the deltas that launch_second_order writes.
template <typename T>
void launch_mask_second_order(const SecondOrderParams& params, const MaskGradient& gradient, void* stream);

// The number of partial sums of the gradient of a mask.
template <typename T>
int mask_splits(const Problem& problem, const int (&mask)[4]);
template <typename T>
int one_tile_splits(const Problem& problem, const int (&mask)[4]);
template <typename T>
int mask_second_order_splits(const Problem& problem, const int (&mask)[4]);

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
  dispatch_dtype(dtype, [&]<typename T>(std::type_identity<T>) { launch_tangent<T>(params, stream); });
}
inline void launch_second_order(const SecondOrderParams& params, DType dtype, void* stream) {
  dispatch_dtype(dtype, [&]<typename T>(std::type_identity<T>) { launch_second_order<T>(params, stream); });
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
