// Operators cpu_attention_forward and cpu_attention_backward: used where torch's fused kernels do not apply.
#include <tuple>

#include "attention/cpu/backward.h"
#include "attention/cpu/forward.h"
#include "common/operand_checks.h"

namespace fastgen::cpu {
namespace {

// A float32 operand (B, H, N, D) with a contiguous last dim, and the strides of the others.
void read_operand(const Tensor& tensor, const char* name, const Tensor& query, int64_t (&strides)[3]) {
  check_tensor(tensor, name, 4, ScalarType::Float, query);
  STD_TORCH_CHECK(tensor.numel() == 0 || tensor.size(3) == 1 || tensor.stride(3) == 1, name,
                  ": expected a contiguous last dim, got strides ", text_of(tensor.strides()));
  for (int i = 0; i < 3; ++i) strides[i] = tensor.stride(i);
}

// A float32 CPU tensor. Not a view: an output that is a view cannot carry a forward-mode tangent.
template <int kDims>
Tensor empty_strided(const int64_t (&sizes)[kDims], const int64_t (&strides)[kDims]) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(kDims, sizes, strides, aoti_torch_dtype_float32(),
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// Checks query, key and value and writes them to the params of the forward or backward pass.
template <typename Params>
void read_problem(const Tensor& query, const Tensor& key, const Tensor& value, Params& p) {
  read_operand(query, "query", query, p.query_strides);
  read_operand(key, "key", query, p.key_strides);
  read_operand(value, "value", query, p.value_strides);
  p.batch = query.size(0), p.heads = query.size(1), p.queries = query.size(2), p.key_dim = query.size(3);
  p.key_heads = key.size(1), p.keys = key.size(2), p.value_dim = value.size(3);
  STD_TORCH_CHECK(p.key_heads > 0 && p.heads % p.key_heads == 0 && p.keys > 0,
                  "key: expected a number of heads that divides query's ", p.heads, " and at least one key, got ",
                  text_of(key.sizes()));
  check_operand(key, "key", {p.batch, p.key_heads, p.keys, p.key_dim}, ScalarType::Float, query);
  check_operand(value, "value", {p.batch, p.key_heads, p.keys, p.value_dim}, ScalarType::Float, query);
  STD_TORCH_CHECK(p.key_dim <= kMaxKeyDim && p.value_dim <= kMaxValueDim && p.value_dim % kValueStep == 0,
                  "query, value: expected head dims up to 64 and 256, the value's a multiple of 16, got ", p.key_dim,
                  " and ", p.value_dim);
  for (const int64_t dim : {p.key_dim, p.value_dim}) {
    checked_product({p.batch, p.heads, p.queries, dim}, "query");
    checked_product({p.batch, p.key_heads, p.keys, dim}, "key");
  }
  p.query = query.const_data_ptr<float>(), p.key = key.const_data_ptr<float>();
  p.value = value.const_data_ptr<float>();
}

std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value, bool is_causal,
                                   double scale) {
  AttentionParams p;
  read_problem(query, key, value, p);
  p.is_causal = is_causal, p.scale = static_cast<float>(scale);
  // Memory layout (B, N, H, Dv) if the query has it; lse (B, N, H). See allocate_out in
  // fastgen/ops/attention/blocked.py.
  const bool rows_first = p.heads > 1 && p.query_strides[1] < p.query_strides[2];
  const int64_t row = rows_first ? p.heads * p.value_dim : p.value_dim;
  const int64_t head = rows_first ? p.value_dim : p.queries * p.value_dim;
  Tensor out =
      empty_strided<4>({p.batch, p.heads, p.queries, p.value_dim}, {p.heads * p.queries * p.value_dim, head, row, 1});
  Tensor lse = empty_strided<3>({p.batch, p.heads, p.queries}, {p.heads * p.queries, 1, p.heads});
  for (int i = 0; i < 3; ++i) p.out_strides[i] = out.stride(i);
  p.out = static_cast<float*>(out.mutable_data_ptr()), p.lse = static_cast<float*>(lse.mutable_data_ptr());
  attention_forward(p);
  return {out, lse};
}

void read_rows(const Tensor& tensor, const char* name, const AttentionBackwardParams& p, const Tensor& query,
               int64_t (&strides)[3]) {
  check_operand(tensor, name, {p.batch, p.heads, p.queries}, ScalarType::Float, query);
  for (int i = 0; i < 3; ++i) strides[i] = tensor.stride(i);
}

// Memory layout (B, N, H, D). See allocate_grad in fastgen/ops/attention/blocked.py.
Tensor empty_grad(const Tensor& like, int64_t (&strides)[3]) {
  const int64_t heads = like.size(1), rows = like.size(2), dim = like.size(3);
  Tensor grad = empty_strided<4>({like.size(0), heads, rows, dim}, {heads * rows * dim, dim, heads * dim, 1});
  for (int i = 0; i < 3; ++i) strides[i] = grad.stride(i);
  return grad;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_out, const MaybeTensor& grad_lse, const Tensor& query,
                                            const Tensor& key, const Tensor& value, const Tensor& out,
                                            const Tensor& lse, bool is_causal, double scale) {
  AttentionBackwardParams p;
  read_problem(query, key, value, p);
  read_operand(out, "out", query, p.out_strides);
  read_operand(grad_out, "grad_out", query, p.grad_out_strides);
  check_operand(out, "out", {p.batch, p.heads, p.queries, p.value_dim}, ScalarType::Float, query);
  check_operand(grad_out, "grad_out", {p.batch, p.heads, p.queries, p.value_dim}, ScalarType::Float, query);
  read_rows(lse, "lse", p, query, p.lse_strides);
  if (grad_lse) read_rows(*grad_lse, "grad_lse", p, query, p.grad_lse_strides);
  p.out = out.const_data_ptr<float>(), p.grad_out = grad_out.const_data_ptr<float>();
  p.lse = lse.const_data_ptr<float>();
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
