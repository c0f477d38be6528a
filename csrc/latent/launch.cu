// The CUDA backend of latent/launch.h.
#include "latent/launch.h"

#include "common/dispatch.h"
#include "device/launch.cuh"

namespace fastgen::latent {

// Defined in instantiations/.
template <typename T>
void forward(const ForwardParams& params, cudaStream_t stream);
template <typename T>
void backward(const BackwardParams& params, cudaStream_t stream);

int multiprocessors() { return device::multiprocessors(); }

void launch_forward(const ForwardParams& params, DType dtype, void* stream) {
  dispatch_dtype(dtype, [&](auto type) {
    forward<typename decltype(type)::type>(params, static_cast<cudaStream_t>(stream));
  });
}

void launch_backward(const BackwardParams& params, DType dtype, void* stream) {
  dispatch_dtype(dtype, [&](auto type) {
    backward<typename decltype(type)::type>(params, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace fastgen::latent
