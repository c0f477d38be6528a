// CUDA implementation of projection/launch.h.
#include "projection/launch.h"

#include "common/dispatch.h"
#include "device/launch.cuh"

namespace fastgen::projection {

// Defined in instantiations/.
template <typename T>
void project(ProjectParams params, cudaStream_t stream);
template <typename T>
void weight_gradient(WeightGradientParams params, cudaStream_t stream);
template <typename T>
void reduce(const ReduceParams& params, cudaStream_t stream);
template <typename T>
void heads_backward(const HeadBackwardParams& params, cudaStream_t stream);
template <typename T>
void scale_rows(const void* weight, int64_t weight_row, const Vector& gate, void* out, int rows, int columns,
                cudaStream_t stream);
template <typename T>
void sum_rows(const float* parts, int rows, int columns, void* out, cudaStream_t stream);

int multiprocessors() { return device::multiprocessors(); }

void launch_project(ProjectParams params, DType dtype, void* stream) {
  dispatch_dtype(dtype,
                 [&](auto type) { project<typename decltype(type)::type>(params, static_cast<cudaStream_t>(stream)); });
}

void launch_weight_gradient(WeightGradientParams params, DType dtype, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  dispatch_dtype(dtype, [&](auto type) { weight_gradient<typename decltype(type)::type>(params, cuda_stream); });
}

void launch_reduce(const ReduceParams& params, DType dtype, void* stream) {
  dispatch_dtype(dtype,
                 [&](auto type) { reduce<typename decltype(type)::type>(params, static_cast<cudaStream_t>(stream)); });
}

void launch_heads_backward(const HeadBackwardParams& params, DType dtype, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  dispatch_dtype(dtype, [&](auto type) { heads_backward<typename decltype(type)::type>(params, cuda_stream); });
}

void launch_scale_rows(const void* weight, int64_t weight_row, const Vector& gate, void* out, int rows, int columns,
                       DType dtype, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  dispatch_dtype(dtype, [&](auto type) {
    scale_rows<typename decltype(type)::type>(weight, weight_row, gate, out, rows, columns, cuda_stream);
  });
}

void launch_sum_rows(const float* parts, int rows, int columns, void* out, DType dtype, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  dispatch_dtype(dtype,
                 [&](auto type) { sum_rows<typename decltype(type)::type>(parts, rows, columns, out, cuda_stream); });
}

}  // namespace fastgen::projection
