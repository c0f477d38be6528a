// Reads tensors of attention into the structs of the CPU kernels, with checks, and allocates results.
#pragma once

#include <algorithm>

#include "attention/cpu/problem.h"
#include "common/operand_checks.h"

namespace fastgen::cpu {

// A float32 tensor (B, H, rows, D) with a contiguous last dim.
inline Operand read_operand(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape,
                            const Tensor& query) {
  check_operand(tensor, name, shape, ScalarType::Float, query);
  STD_TORCH_CHECK(tensor.numel() == 0 || tensor.size(3) == 1 || tensor.stride(3) == 1, name,
                  ": expected a contiguous last dim, got strides ", text_of(tensor.strides()));
  return {tensor.const_data_ptr<float>(), {tensor.stride(0), tensor.stride(1), tensor.stride(2)}};
}

inline Operand read_optional(const MaybeTensor& tensor, const char* name, std::initializer_list<int64_t> shape,
                             const Tensor& query) {
  return tensor ? read_operand(*tensor, name, shape, query) : Operand{};
}

// A float32 tensor (B, H, N).
inline Operand read_rows(const Tensor& tensor, const char* name, const Problem& p, const Tensor& query) {
  check_operand(tensor, name, {p.batch, p.heads, p.queries}, ScalarType::Float, query);
  return {tensor.const_data_ptr<float>(), {tensor.stride(0), tensor.stride(1), tensor.stride(2)}};
}

// A mask, boolean or float32: each dim full or 1.
inline Mask read_mask(const MaybeTensor& tensor, const char* name, const Problem& p, const Tensor& query) {
  Mask mask;
  if (!tensor) return mask;
  const bool boolean = tensor->scalar_type() == ScalarType::Bool;
  check_tensor(*tensor, name, 4, boolean ? ScalarType::Bool : ScalarType::Float, query);
  const int64_t full[] = {p.batch, p.heads, p.queries, p.keys};
  for (int i = 0; i < 4; ++i) {
    const int64_t size = tensor->size(i);
    STD_TORCH_CHECK(size == full[i] || size == 1, name, ": expected (B, H, N, M), each of them full or 1, got ",
                    text_of(tensor->sizes()));
    mask.strides[i] = size == 1 ? 0 : tensor->stride(i);
  }
  STD_TORCH_CHECK(mask.strides[3] == 0 || mask.strides[3] == 1, name, ": expected a contiguous last dim, got strides ",
                  text_of(tensor->strides()));
  if (boolean) {
    mask.allowed = tensor->const_data_ptr<bool>();
  } else {
    mask.added = tensor->const_data_ptr<float>();
  }
  return mask;
}

struct CallOptions {
  double dropout_p;
  int64_t window_left, window_right;
  double scale;
};

inline Problem read_problem(const Tensor& query, const Tensor& key, const Tensor& value, const MaybeTensor& mask,
                            const MaybeTensor& seed, const CallOptions& options) {
  Problem p;
  for (const auto& [tensor, name] : {std::pair{&query, "query"}, {&key, "key"}, {&value, "value"}}) {
    check_tensor(*tensor, name, 4, ScalarType::Float, query);
  }
  p.batch = query.size(0), p.heads = query.size(1), p.queries = query.size(2), p.key_dim = query.size(3);
  p.key_heads = key.size(1), p.keys = key.size(2), p.value_dim = value.size(3);
  STD_TORCH_CHECK(p.key_heads > 0 && p.heads % p.key_heads == 0 && p.keys > 0,
                  "key: expected a number of heads that divides query's ", p.heads, " and at least one key, got ",
                  text_of(key.sizes()));
  for (const int64_t dim : {p.key_dim, p.value_dim}) {
    checked_product({p.batch, p.heads, p.queries, dim}, "query");
    checked_product({p.batch, p.key_heads, p.keys, dim}, "key");
  }
  p.query = read_operand(query, "query", {p.batch, p.heads, p.queries, p.key_dim}, query);
  p.key = read_operand(key, "key", {p.batch, p.key_heads, p.keys, p.key_dim}, query);
  p.value = read_operand(value, "value", {p.batch, p.key_heads, p.keys, p.value_dim}, query);
  p.mask = read_mask(mask, "mask", p, query);
  check_probability(options.dropout_p, "dropout_p");
  if (seed) {
    check_seed(*seed, p.batch, query);
    p.seeds = seed->const_data_ptr<int64_t>();
    p.rows_per_seed = std::max<int64_t>(1, p.batch / seed->numel() * p.heads * p.queries);
    // The Philox counters, one for four keys of each row, must fit as well.
    checked_product({p.rows_per_seed, p.keys / 4 + 1}, "keys");
    p.dropout_p = static_cast<float>(options.dropout_p);
    p.dropout_factor = 1.0f / static_cast<float>(1.0 - options.dropout_p);
  }
  // Beyond the sequences a bound makes no difference, and row + bound does not overflow.
  const int64_t longest = std::max(p.queries, p.keys);
  p.window_left = std::clamp<int64_t>(options.window_left, -1, longest);
  p.window_right = std::clamp<int64_t>(options.window_right, -1, longest);
  p.scale = static_cast<float>(options.scale);
  return p;
}

// A float32 CPU tensor. Not a view: an output that is a view cannot carry a forward-mode tangent.
template <int kDims>
Tensor empty_strided(const int64_t (&sizes)[kDims], const int64_t (&strides)[kDims]) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(kDims, sizes, strides, aoti_torch_dtype_float32(),
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline Result result_of(Tensor& tensor) {
  return {static_cast<float*>(tensor.mutable_data_ptr()), {tensor.stride(0), tensor.stride(1), tensor.stride(2)}};
}

// allocate_out in fastgen/ops/attention/blocked.py: in memory (B, N, H, Dv) if the query is.
inline Tensor empty_out(const Problem& p) {
  const bool rows_first = p.heads > 1 && p.query.strides[1] < p.query.strides[2];
  const int64_t row = rows_first ? p.heads * p.value_dim : p.value_dim;
  const int64_t head = rows_first ? p.value_dim : p.queries * p.value_dim;
  return empty_strided<4>({p.batch, p.heads, p.queries, p.value_dim},
                          {p.heads * p.queries * p.value_dim, head, row, 1});
}

// allocate_lse: in memory (B, N, H).
inline Tensor empty_lse(const Problem& p) {
  return empty_strided<3>({p.batch, p.heads, p.queries}, {p.heads * p.queries, 1, p.heads});
}

// allocate_grad: in memory (B, N, H, D).
inline Tensor empty_grad(const Tensor& like) {
  const int64_t heads = like.size(1), rows = like.size(2), dim = like.size(3);
  return empty_strided<4>({like.size(0), heads, rows, dim}, {heads * rows * dim, dim, heads * dim, 1});
}

}  // namespace fastgen::cpu
