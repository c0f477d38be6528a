// Fused attention as operators: what ops/attention.py calls where torch's fused kernels do not fit.
#include <tuple>

#include "common/torch_api.h"
#include "cpu/attention.h"
#include "cpu/attention_backward.h"

namespace fastgen::cpu {
namespace {

void set_strides(const Tensor& tensor, const char* name, int64_t (&strides)[3]) {
  STD_TORCH_CHECK(tensor.dim() == 4 && tensor.scalar_type() == ScalarType::Float && tensor.stride(3) == 1, name,
                  ": expected a float32 tensor of four dims, the last of them contiguous");
  for (int i = 0; i < 3; ++i) strides[i] = tensor.stride(i);
}

// A float32 tensor of the host. Not a view: an output that is one may not carry a forward-mode tangent.
template <int kDims>
Tensor empty_strided(const int64_t (&sizes)[kDims], const int64_t (&strides)[kDims]) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(kDims, sizes, strides, aoti_torch_dtype_float32(),
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

void check_head_dims(int64_t key_dim, int64_t value_dim) {
  STD_TORCH_CHECK(key_dim <= kMaxKeyDim && value_dim <= kMaxValueDim && value_dim % kValueStep == 0,
                  "query, value: expected head dims up to 64 and 256, the value's a multiple of 16");
}

std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value, bool is_causal,
                                   double scale) {
  AttentionParams p;
  set_strides(query, "query", p.query_strides);
  set_strides(key, "key", p.key_strides);
  set_strides(value, "value", p.value_strides);
  p.query = query.const_data_ptr<float>(), p.key = key.const_data_ptr<float>();
  p.value = value.const_data_ptr<float>();
  p.batch = query.size(0), p.heads = query.size(1), p.queries = query.size(2), p.key_dim = query.size(3);
  p.key_heads = key.size(1), p.keys = key.size(2), p.value_dim = value.size(3);
  STD_TORCH_CHECK(key.size(0) == p.batch && key.size(3) == p.key_dim && p.heads % p.key_heads == 0 && p.keys > 0 &&
                      value.size(0) == p.batch && value.size(1) == p.key_heads && value.size(2) == p.keys,
                  "key, value: expected shapes that fit the query, and at least one key");
  check_head_dims(p.key_dim, p.value_dim);
  p.is_causal = is_causal, p.scale = static_cast<float>(scale);
  // In memory (B, N, H, Dv) where the query is so; lse (B, N, H). See allocate_out in ops/_attention_blocked.py.
  const bool rows_first = p.heads > 1 && p.query_strides[1] < p.query_strides[2];
  const int64_t row = rows_first ? p.heads * p.value_dim : p.value_dim;
  const int64_t head = rows_first ? p.value_dim : p.queries * p.value_dim;
  Tensor out =
      empty_strided<4>({p.batch, p.heads, p.queries, p.value_dim}, {p.heads * p.queries * p.value_dim, head, row, 1});
  Tensor lse = empty_strided<3>({p.batch, p.heads, p.queries}, {p.heads * p.queries, 1, p.heads});
  set_strides(out, "out", p.out_strides);
  p.out = static_cast<float*>(out.mutable_data_ptr()), p.lse = static_cast<float*>(lse.mutable_data_ptr());
  attention_forward(p);
  return {out, lse};
}

void set_row_strides(const Tensor& tensor, const char* name, const AttentionBackwardParams& p, int64_t (&strides)[3]) {
  STD_TORCH_CHECK(tensor.dim() == 3 && tensor.scalar_type() == ScalarType::Float && tensor.size(0) == p.batch &&
                      tensor.size(1) == p.heads && tensor.size(2) == p.queries,
                  name, ": expected a float32 tensor of shape (B, H, N)");
  for (int i = 0; i < 3; ++i) strides[i] = tensor.stride(i);
}

// In memory (B, N, H, D). See allocate_grad in ops/_attention_blocked.py.
Tensor empty_grad(const Tensor& like, int64_t (&strides)[3]) {
  const int64_t heads = like.size(1), rows = like.size(2), dim = like.size(3);
  Tensor grad = empty_strided<4>({like.size(0), heads, rows, dim}, {heads * rows * dim, dim, heads * dim, 1});
  set_strides(grad, "grad", strides);
  return grad;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_out, const MaybeTensor& grad_lse, const Tensor& query,
                                            const Tensor& key, const Tensor& value, const Tensor& out,
                                            const Tensor& lse, bool is_causal, double scale) {
  AttentionBackwardParams p;
  set_strides(query, "query", p.query_strides);
  set_strides(key, "key", p.key_strides);
  set_strides(value, "value", p.value_strides);
  set_strides(out, "out", p.out_strides);
  set_strides(grad_out, "grad_out", p.grad_out_strides);
  p.batch = query.size(0), p.heads = query.size(1), p.queries = query.size(2), p.key_dim = query.size(3);
  p.key_heads = key.size(1), p.keys = key.size(2), p.value_dim = value.size(3);
  const auto fits = [](const Tensor& tensor, int64_t batch, int64_t heads, int64_t rows, int64_t dim) {
    return tensor.size(0) == batch && tensor.size(1) == heads && tensor.size(2) == rows && tensor.size(3) == dim;
  };
  STD_TORCH_CHECK(p.key_heads > 0 && p.heads % p.key_heads == 0 && p.keys > 0 &&
                      fits(key, p.batch, p.key_heads, p.keys, p.key_dim) &&
                      fits(value, p.batch, p.key_heads, p.keys, p.value_dim),
                  "key, value: expected shapes that fit the query, and at least one key");
  STD_TORCH_CHECK(
      fits(out, p.batch, p.heads, p.queries, p.value_dim) && fits(grad_out, p.batch, p.heads, p.queries, p.value_dim),
      "out, grad_out: expected the shape of the output");
  check_head_dims(p.key_dim, p.value_dim);
  set_row_strides(lse, "lse", p, p.lse_strides);
  if (grad_lse) set_row_strides(*grad_lse, "grad_lse", p, p.grad_lse_strides);
  p.query = query.const_data_ptr<float>(), p.key = key.const_data_ptr<float>();
  p.value = value.const_data_ptr<float>(), p.out = out.const_data_ptr<float>();
  p.grad_out = grad_out.const_data_ptr<float>(), p.lse = lse.const_data_ptr<float>();
  p.grad_lse = grad_lse ? grad_lse->const_data_ptr<float>() : nullptr;
  p.is_causal = is_causal, p.scale = static_cast<float>(scale);
  Tensor grad_query = empty_grad(query, p.grad_query_strides), grad_key = empty_grad(key, p.grad_key_strides);
  Tensor grad_value = empty_grad(value, p.grad_value_strides);
  p.grad_query = static_cast<float*>(grad_query.mutable_data_ptr());
  p.grad_key = static_cast<float*>(grad_key.mutable_data_ptr());
  p.grad_value = static_cast<float*>(grad_value.mutable_data_ptr());
  attention_backward(p);
  return {grad_query, grad_key, grad_value};
}

}  // namespace

FASTGEN_LIBRARY_IMPL(FASTGEN_NAMESPACE, FASTGEN_DISPATCH_KEY, m) {
  m.impl("cpu_attention_forward", TORCH_BOX(&forward));
  m.impl("cpu_attention_backward", TORCH_BOX(&backward));
}

}  // namespace fastgen::cpu
