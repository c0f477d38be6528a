// Checks of the operators that work on a tile of scores in place: operands are dense float32 and must not overlap.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "common/operand_checks.h"

namespace fastgen::cpu {

// scores (..., keys): the product of the leading dims, and the last.
struct TileSize {
  int64_t rows, keys;

  explicit TileSize(const Tensor& scores) : rows(1), keys(0) {
    STD_TORCH_CHECK(scores.dim() >= 1, "scores: expected at least one dim");
    keys = scores.size(scores.dim() - 1);
    for (int64_t dim = 0; dim + 1 < scores.dim(); ++dim) rows = checked_product({rows, scores.size(dim)}, "scores");
  }
};

inline void check_dense(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor, got shape ", text_of(tensor.sizes()),
                  " with strides ", text_of(tensor.strides()));
}

// A matrix of the shape of scores.
inline float* matrix(const Tensor& tensor, const char* name, const Tensor& scores) {
  check_operand(tensor, name, scores.sizes(), ScalarType::Float, scores);
  check_dense(tensor, name);
  return static_cast<float*>(tensor.mutable_data_ptr());
}

// One float per row of scores, in any shape.
inline float* row_vector(const Tensor& tensor, const char* name, const Tensor& scores, int64_t rows) {
  check_tensor(tensor, name, tensor.dim(), ScalarType::Float, scores);
  STD_TORCH_CHECK(tensor.numel() == rows, name, ": expected an element for each of the ", rows,
                  " rows of scores, got shape ", text_of(tensor.sizes()));
  check_dense(tensor, name);
  return static_cast<float*>(tensor.mutable_data_ptr());
}

struct Span {
  const char* name;
  const float* data;  // null: absent
  int64_t size;
};

// Outputs must not overlap other operands.
inline void check_apart(std::initializer_list<Span> written, std::initializer_list<Span> read) {
  const auto apart = [](const Span& a, const Span& b) {
    STD_TORCH_CHECK(a.data == nullptr || b.data == nullptr || a.size == 0 || b.size == 0 || a.data + a.size <= b.data ||
                        b.data + b.size <= a.data,
                    b.name, ": expected memory of its own, got some that ", a.name, " is written to");
  };
  for (const Span* a = written.begin(); a != written.end(); ++a) {
    for (const Span* b = a + 1; b != written.end(); ++b) apart(*a, *b);
    for (const Span& b : read) apart(*a, b);
  }
}

}  // namespace fastgen::cpu
