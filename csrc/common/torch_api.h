// What the api.cpp files share: the stable-ABI headers, dtypes, the current stream.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "common/types.h"

// Set by the build: the namespace and dispatch key that this library's kernels are registered under.
#ifndef FASTGEN_NAMESPACE
#error "compile with -DFASTGEN_NAMESPACE=... and -DFASTGEN_DISPATCH_KEY=..."
#endif
#define FASTGEN_LIBRARY_IMPL(ns, key, m) STABLE_TORCH_LIBRARY_IMPL(ns, key, m)

namespace fastgen {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    default: STD_TORCH_CHECK(false, name, ": expected float32, float16 or bfloat16");
  }
  return DType::kFloat32;
}

// Makes the tensor's device current for its lifetime, and knows the current stream there.
class DeviceScope {
 public:
  explicit DeviceScope(const Tensor& tensor);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;
  void* stream() const { return stream_; }

 private:
  void* guard_ = nullptr;
  void* stream_ = nullptr;
};

}  // namespace fastgen
