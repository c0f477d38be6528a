// Operators cpu_attention_forward and cpu_attention_backward.
#include <tuple>

#include "attention/cpu/arguments.h"
#include "attention/cpu/backward.h"
#include "attention/cpu/forward.h"

namespace fastgen::cpu {
namespace {

std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value, const MaybeTensor& mask,
                                   const MaybeTensor& seed, double dropout_p, int64_t window_left, int64_t window_right,
                                   double scale) {
  const Problem p = read_problem(query, key, value, mask, seed, {dropout_p, window_left, window_right, scale});
  Tensor out = empty_out(p), lse = empty_lse(p);
  attention_forward({p, result_of(out), result_of(lse)});
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_out, const MaybeTensor& grad_lse,
                                                    const Tensor& query, const Tensor& key, const Tensor& value,
                                                    const Tensor& out, const Tensor& lse, const MaybeTensor& mask,
                                                    const MaybeTensor& seed, double dropout_p, int64_t window_left,
                                                    int64_t window_right, double scale, bool mask_grad) {
  BackwardParams params;
  params.problem = read_problem(query, key, value, mask, seed, {dropout_p, window_left, window_right, scale});
  const Problem& p = params.problem;
  params.out = read_operand(out, "out", {p.batch, p.heads, p.queries, p.value_dim}, query);
  params.grad_out = read_operand(grad_out, "grad_out", {p.batch, p.heads, p.queries, p.value_dim}, query);
  params.lse = read_rows(lse, "lse", p, query);
  if (grad_lse) params.grad_lse = read_rows(*grad_lse, "grad_lse", p, query);
  Tensor grad_query = empty_grad(query), grad_key = empty_grad(key), grad_value = empty_grad(value);
  params.grad_query = result_of(grad_query), params.grad_key = result_of(grad_key);
  params.grad_value = result_of(grad_value);
  Tensor grad_mask = torch::stable::new_empty(query, {0}, ScalarType::Float);
  if (mask_grad) {
    STD_TORCH_CHECK(p.mask.added != nullptr && mask->size(2) == p.queries && mask->size(3) == p.keys,
                    "mask_grad: expected False, or a float mask that is broadcast over batch and heads alone");
    grad_mask = torch::stable::new_empty(query, mask->sizes(), ScalarType::Float);
    torch::stable::zero_(grad_mask);
    params.grad_mask = static_cast<float*>(grad_mask.mutable_data_ptr());
    for (int i = 0; i < 2; ++i) params.grad_mask_strides[i] = mask->size(i) == 1 ? 0 : grad_mask.stride(i);
  }
  attention_backward(params);
  return {grad_query, grad_key, grad_value, grad_mask};
}

}  // namespace

FASTGEN_LIBRARY_IMPL(FASTGEN_NAMESPACE, FASTGEN_DISPATCH_KEY, m) {
  m.impl("cpu_attention_forward", TORCH_BOX(&forward));
  m.impl("cpu_attention_backward", TORCH_BOX(&backward));
}

}  // namespace fastgen::cpu
