// Checks of operands: shapes, dtypes, devices, storage. Errors name the argument, the expected and the actual value.
#pragma once

#include <initializer_list>
#include <string>

#include "common/torch_api.h"

namespace fastgen {

// The product of sizes, checked for negative sizes and overflow of int64.
inline int64_t checked_product(std::initializer_list<int64_t> sizes, const char* name) {
  int64_t product = 1;
  for (const int64_t size : sizes) {
    STD_TORCH_CHECK(size >= 0, name, ": expected sizes >= 0, got ", size);
    STD_TORCH_CHECK(!__builtin_mul_overflow(product, size, &product), name,
                    ": expected sizes whose product has 63 bits, the last of them is ", size);
  }
  return product;
}

template <typename Sizes>
std::string text_of(const Sizes& sizes) {
  std::string text = "(";
  for (const int64_t size : sizes) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + ")";
}

inline int64_t bytes_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Bool: return 1;
    case ScalarType::Half:
    case ScalarType::BFloat16: return 2;
    case ScalarType::Int:
    case ScalarType::Float: return 4;
    default: return 8;
  }
}

// Whether the storage holds every element, which may be false after the storage was resized.
inline bool is_backed(const Tensor& tensor) {
  if (tensor.numel() == 0) return true;
  int64_t end = tensor.storage_offset() + 1, bytes = 0, extent = 0;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    if (__builtin_mul_overflow(tensor.size(dim) - 1, tensor.stride(dim), &extent) ||
        __builtin_add_overflow(end, extent, &end)) {
      return false;
    }
  }
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes));
  return !__builtin_mul_overflow(end, bytes_of(tensor.scalar_type()), &end) && end <= bytes;
}

// Checks dims, dtype, device and storage.
inline void check_tensor(const Tensor& tensor, const char* name, int64_t dims, ScalarType dtype, const Tensor& like) {
  STD_TORCH_CHECK(tensor.dim() == dims, name, ": expected ", dims, " dims, got shape ", text_of(tensor.sizes()));
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, ": expected ", torch::headeronly::toString(dtype), ", got ",
                  torch::headeronly::toString(tensor.scalar_type()));
  STD_TORCH_CHECK(tensor.device() == like.device(), name, ": expected the device of the other tensors");
  STD_TORCH_CHECK(is_backed(tensor), name, ": expected a tensor whose storage holds its elements");
}

// The same, and the shape.
template <typename Sizes>
void check_operand(const Tensor& tensor, const char* name, const Sizes& shape, ScalarType dtype, const Tensor& like) {
  check_tensor(tensor, name, static_cast<int64_t>(shape.size()), dtype, like);
  int64_t dim = 0;
  for (const int64_t size : shape) {
    STD_TORCH_CHECK(tensor.size(dim++) == size, name, ": expected shape ", text_of(shape), ", got ",
                    text_of(tensor.sizes()));
  }
}
inline void check_operand(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape,
                          ScalarType dtype, const Tensor& like) {
  check_operand<std::initializer_list<int64_t>>(tensor, name, shape, dtype, like);
}

// Seeds: contiguous, and their number divides ``batch``.
inline void check_seed(const Tensor& seed, int64_t batch, const Tensor& like) {
  check_tensor(seed, "seed", 1, ScalarType::Long, like);
  STD_TORCH_CHECK(seed.is_contiguous(), "seed: expected a contiguous tensor");
  STD_TORCH_CHECK(seed.numel() > 0 && batch % seed.numel() == 0,
                  "seed: expected a number of seeds that divides the batch, ", batch, ", got ", seed.numel());
}

// The bound of attention's scores: 0, or within the range in which float32 computes it (fastgen/checks.py).
inline void check_softcap(double softcap) {
  STD_TORCH_CHECK(softcap == 0.0 || (softcap >= 1e-30 && softcap <= 1e30),
                  "softcap: expected 0, or a number from 1e-30 to 1e30, got ", softcap);
}

inline void check_probability(double p, const char* name) {
  STD_TORCH_CHECK(p >= 0.0 && p < 1.0, name, ": expected a probability in [0, 1), got ", p);
}

}  // namespace fastgen
