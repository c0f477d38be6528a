// Shared by the api.cpp files: stable-ABI headers, dtypes, the current stream.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "common/dispatch.h"
#include "common/types.h"

// Defined by the build: the namespace and dispatch key of this library's operators.
#ifndef FASTGEN_NAMESPACE
#error "compile with -DFASTGEN_NAMESPACE=... and -DFASTGEN_DISPATCH_KEY=..."
#endif
#define FASTGEN_LIBRARY_IMPL(ns, key, m) STABLE_TORCH_LIBRARY_IMPL(ns, key, m)

namespace fastgen {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kAlignment = 16;  // bytes of one vector access

inline DType dtype_of(const Tensor& tensor, const char* name) {
  DType dtype = DType::kFloat32;
  switch (tensor.scalar_type()) {
    case ScalarType::Float: break;
    case ScalarType::Half: dtype = DType::kFloat16; break;
    case ScalarType::BFloat16: dtype = DType::kBFloat16; break;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, float16 or bfloat16, got ",
                      torch::headeronly::toString(tensor.scalar_type()));
  }
  STD_TORCH_CHECK(is_compiled(dtype), name, ": expected a dtype that this library was built for (FASTGEN_DTYPES), got ",
                  torch::headeronly::toString(tensor.scalar_type()));
  return dtype;
}

inline int64_t element_size(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::Float ? 4 : 2; }

inline int checked_int(int64_t value, const char* name) {
  STD_TORCH_CHECK(value <= INT32_MAX, name, ": expected at most 2147483647, got ", value);
  return static_cast<int>(value);
}

// An uninitialized tensor. Not a view: an output that is a view cannot carry a forward-mode tangent.
template <int kDims>
Tensor empty_strided(const Tensor& like, const int64_t (&sizes)[kDims], const int64_t (&strides)[kDims],
                     ScalarType dtype) {
  int32_t stable_dtype = aoti_torch_dtype_float32();
  if (dtype == ScalarType::Half) stable_dtype = aoti_torch_dtype_float16();
  if (dtype == ScalarType::BFloat16) stable_dtype = aoti_torch_dtype_bfloat16();
  const auto device = like.device();
  const int32_t kind = device.is_cuda() ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu();
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(kDims, sizes, strides, stable_dtype, kind,
                                                  device.is_cuda() ? device.index() : 0, &handle));
  return Tensor(handle);
}

// The same, contiguous. Not torch::stable::new_empty, whose way through the dispatcher takes twice as long.
template <int kDims>
Tensor empty(const Tensor& like, const int64_t (&sizes)[kDims], ScalarType dtype) {
  int64_t strides[kDims], stride = 1;
  for (int dim = kDims - 1; dim >= 0; --dim) {
    strides[dim] = stride;
    stride *= sizes[dim] > 1 ? sizes[dim] : 1;
  }
  return empty_strided<kDims>(like, sizes, strides, dtype);
}

// Device guard for the tensor's device, with its current stream.
class DeviceScope {
 public:
  explicit DeviceScope(const Tensor& tensor);
  void* stream() const { return stream_; }

 private:
  // A member, so that it is destroyed if the stream's query throws.
  struct Guard {
    explicit Guard(const Tensor& tensor);
    ~Guard();
    Guard(const Guard&) = delete;
    Guard& operator=(const Guard&) = delete;
    void* handle = nullptr;
  };
  Guard guard_;
  void* stream_ = nullptr;
};

}  // namespace fastgen
