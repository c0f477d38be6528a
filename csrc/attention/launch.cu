// The CUDA backend of attention/launch.h.
#include "attention/launch.h"

#include "attention/config.h"
#include "common/dispatch.h"
#include "device/launch.cuh"

namespace fastgen::attention {

// Defined in instantiations/.
template <typename T>
void forward(ForwardParams params, cudaStream_t stream);
template <typename T>
void backward(const BackwardParams& params, cudaStream_t stream);
template <typename T>
void mask_gradient(const BackwardParams& params, const MaskGradient& gradient, cudaStream_t stream);

template <typename T>
void tangent(const TangentParams& params, cudaStream_t stream);
template <typename T>
void second_order(const SecondOrderParams& params, cudaStream_t stream);
template <typename T>
void mask_second_order(const SecondOrderParams& params, const MaskGradient& gradient, cudaStream_t stream);

void launch_forward(const ForwardParams& params, DType dtype, void* stream) {
  dispatch_dtype(dtype,
                 [&](auto type) { forward<typename decltype(type)::type>(params, static_cast<cudaStream_t>(stream)); });
}

void launch_backward(const BackwardParams& params, DType dtype, void* stream) {
  dispatch_dtype(
      dtype, [&](auto type) { backward<typename decltype(type)::type>(params, static_cast<cudaStream_t>(stream)); });
}

void launch_mask_gradient(const BackwardParams& params, const MaskGradient& gradient, DType dtype, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  dispatch_dtype(dtype,
                 [&](auto type) { mask_gradient<typename decltype(type)::type>(params, gradient, cuda_stream); });
}

void launch_tangent(const TangentParams& params, DType dtype, void* stream) {
  dispatch_dtype(dtype,
                 [&](auto type) { tangent<typename decltype(type)::type>(params, static_cast<cudaStream_t>(stream)); });
}

void launch_second_order(const SecondOrderParams& params, DType dtype, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  dispatch_dtype(dtype, [&](auto type) { second_order<typename decltype(type)::type>(params, cuda_stream); });
}

void launch_mask_second_order(const SecondOrderParams& params, const MaskGradient& gradient, DType dtype,
                              void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  dispatch_dtype(dtype,
                 [&](auto type) { mask_second_order<typename decltype(type)::type>(params, gradient, cuda_stream); });
}

int mask_splits(const Problem& p, const int (&mask)[4], DType dtype, bool twice) {
  const Sizes sizes = sizes_of(p, dtype == DType::kFloat32 ? 4 : 2);
  return mask_plan(sizes, mask, device::multiprocessors(), twice).slices;
}

}  // namespace fastgen::attention
