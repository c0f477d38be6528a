// Operators cpu_attention_tangent and cpu_attention_second_order.
#include <tuple>

#include "attention/cpu/arguments.h"
#include "attention/cpu/second_order.h"

namespace fastgen::cpu {
namespace {

SecondOrderParams read_tangents(const Problem& problem, const Tensor& query, const Tensor& out, const Tensor& lse,
                                const MaybeTensor& tangent_query, const MaybeTensor& tangent_key,
                                const MaybeTensor& tangent_value, const MaybeTensor& tangent_mask) {
  SecondOrderParams params;
  params.problem = problem;
  const Problem& p = problem;
  params.tangent_query = read_optional(tangent_query, "tangent_query", {p.batch, p.heads, p.queries, p.key_dim}, query);
  params.tangent_key = read_optional(tangent_key, "tangent_key", {p.batch, p.key_heads, p.keys, p.key_dim}, query);
  params.tangent_value =
      read_optional(tangent_value, "tangent_value", {p.batch, p.key_heads, p.keys, p.value_dim}, query);
  params.tangent_mask = read_mask(tangent_mask, "tangent_mask", p, query);
  STD_TORCH_CHECK(params.tangent_mask.allowed == nullptr, "tangent_mask: expected a float32 tensor, got a boolean one");
  params.out = read_operand(out, "out", {p.batch, p.heads, p.queries, p.value_dim}, query);
  params.lse = read_rows(lse, "lse", p, query);
  return params;
}

std::tuple<Tensor, Tensor> tangent(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
                                   const Tensor& lse, const MaybeTensor& mask, const MaybeTensor& seed,
                                   const MaybeTensor& tangent_query, const MaybeTensor& tangent_key,
                                   const MaybeTensor& tangent_value, const MaybeTensor& tangent_mask, double dropout_p,
                                   int64_t window_left, int64_t window_right, double scale) {
  const Problem p = read_problem(query, key, value, mask, seed, {dropout_p, window_left, window_right, scale});
  SecondOrderParams params = read_tangents(p, query, out, lse, tangent_query, tangent_key, tangent_value, tangent_mask);
  Tensor tangent_out = empty_out(p), tangent_lse = empty_lse(p);
  params.tangent_out = result_of(tangent_out), params.tangent_lse = result_of(tangent_lse);
  attention_tangent(params);
  return {tangent_out, tangent_lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> second_order(
    const Tensor& grad_out, const MaybeTensor& grad_lse, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& out, const Tensor& lse, const MaybeTensor& mask, const MaybeTensor& seed,
    const MaybeTensor& tangent_query, const MaybeTensor& tangent_key, const MaybeTensor& tangent_value,
    const MaybeTensor& tangent_mask, double dropout_p, int64_t window_left, int64_t window_right, double scale) {
  const Problem p = read_problem(query, key, value, mask, seed, {dropout_p, window_left, window_right, scale});
  SecondOrderParams params = read_tangents(p, query, out, lse, tangent_query, tangent_key, tangent_value, tangent_mask);
  params.grad_out = read_operand(grad_out, "grad_out", {p.batch, p.heads, p.queries, p.value_dim}, query);
  if (grad_lse) params.grad_lse = read_rows(*grad_lse, "grad_lse", p, query);
  Tensor tangent_out = empty_out(p), tangent_lse = empty_lse(p);
  Tensor grad_query = empty_grad(query), grad_key = empty_grad(key), grad_value = empty_grad(value);
  params.tangent_out = result_of(tangent_out), params.tangent_lse = result_of(tangent_lse);
  params.grad_query = result_of(grad_query), params.grad_key = result_of(grad_key);
  params.grad_value = result_of(grad_value);
  attention_second_order(params);
  return {tangent_out, tangent_lse, grad_query, grad_key, grad_value};
}

}  // namespace

FASTGEN_LIBRARY_IMPL(FASTGEN_NAMESPACE, FASTGEN_DISPATCH_KEY, m) {
  m.impl("cpu_attention_tangent", TORCH_BOX(&tangent));
  m.impl("cpu_attention_second_order", TORCH_BOX(&second_order));
}

}  // namespace fastgen::cpu
