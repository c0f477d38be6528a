// The attention operators: check, allocate, fill the params, launch.
#include <tuple>

#include "attention/launch.h"
#include "attention/operands.h"

namespace fastgen::attention {
namespace {

// Allocates the workspace of the forward pass, and launches it.
void run_forward(ForwardParams& p, const Tensor& query, DType dtype, void* stream) {
  std::optional<Tensor> parts;
  if (const int64_t floats = forward_workspace(p.problem, dtype); floats > 0) {
    parts = torch::stable::new_empty(query, {floats}, ScalarType::Float);
    p.parts = static_cast<float*>(parts->mutable_data_ptr());
  }
  launch_forward(p, dtype, stream);
}

std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value, const MaybeTensor& mask,
                                   const MaybeTensor& seed, const MaybeTensor& sequences, double dropout_p,
                                   int64_t window_left, int64_t window_right, double scale, double softcap,
                                   bool allow_tf32) {
  const DType dtype = dtype_of(query, "query");
  const DeviceScope scope(query);
  const Read q(query, "query", query), k(key, "key", query), v(value, "value", query);
  const MaybeTensor read_mask = readable(mask, query);
  ForwardParams p;
  p.query = q.operand(), p.key = k.operand(), p.value = v.operand();
  p.problem = problem_of(query, key, value, q.dim(), v.dim(), read_mask, seed, sequences,
                         {dropout_p, window_left, window_right, scale, softcap, allow_tf32});
  Written out(query, value.size(3), rows_first(query));
  Tensor lse = empty_rows(query);
  p.out = out.result(), p.lse = row_result(lse);
  index_by_row(p.problem, p.query, p.key, p.value, p.out, p.lse);
  if (lse.numel() > 0) run_forward(p, query, dtype, scope.stream());
  return {out.finish(), lse};
}

void check_mask_grad(const MaybeTensor& mask, bool wanted) {
  STD_TORCH_CHECK(!wanted || !mask.has_value() || mask->scalar_type() != ScalarType::Bool,
                  "mask_grad: expected False for a boolean mask, which has no gradient");
}

// Allocates the gradient of a mask and computes it with launch(gradient).
template <typename Launch>
Tensor mask_gradient(const Problem& problem, const MaybeTensor& given, const MaybeTensor& read, const Tensor& query,
                     DType dtype, bool wanted, bool second_order, Launch&& launch) {
  if (!wanted || !read.has_value()) return empty<1>(query, {0}, query.scalar_type());
  const Tensor& mask = *read;
  MaskGradient gradient;
  for (int i = 0; i < 4; ++i) gradient.sizes[i] = static_cast<int>(mask.size(i));
  Tensor grad = empty<4>(mask, {mask.size(0), mask.size(1), mask.size(2), mask.size(3)}, mask.scalar_type());
  std::optional<Tensor> parts;
  if (query.size(0) * query.size(1) * query.size(2) * problem.keys == 0) {
    torch::stable::zero_(grad);
  } else if (grad.numel() > 0) {
    gradient.data = grad.mutable_data_ptr(), gradient.kind = mask_kind(mask, query);
    gradient.splits = mask_splits(problem, gradient.sizes, dtype, second_order);
    if (gradient.splits > 1) {
      parts = empty<2>(query, {gradient.splits, grad.numel()}, ScalarType::Float);
      gradient.parts = static_cast<float*>(parts->mutable_data_ptr());
    }
    launch(gradient);
  }
  return grad.scalar_type() == given->scalar_type() ? grad : torch::stable::to(grad, given->scalar_type());
}

// Whether launch_mask_gradient computes all gradients.
bool is_computed_with_mask(const Problem& problem, const MaybeTensor& mask, DType dtype, bool wanted) {
  if (!wanted || !mask.has_value()) return false;
  int sizes[4];
  for (int i = 0; i < 4; ++i) sizes[i] = static_cast<int>(mask->size(i));
  return takes_mask_gradient(problem, sizes, dtype);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_out, const MaybeTensor& grad_lse,
                                                    const Tensor& query, const Tensor& key, const Tensor& value,
                                                    const Tensor& out, const Tensor& lse, const MaybeTensor& mask,
                                                    const MaybeTensor& seed, const MaybeTensor& sequences,
                                                    double dropout_p, int64_t window_left, int64_t window_right,
                                                    double scale, double softcap, bool allow_tf32, bool mask_grad) {
  const DType dtype = dtype_of(query, "query");
  const DeviceScope scope(query);
  const Read q(query, "query", query), k(key, "key", query), v(value, "value", query);
  const Read o = read_out(out, "out", query, value), d = read_out(grad_out, "grad_out", query, value);
  check_mask_grad(mask, mask_grad);
  const MaybeTensor read_mask = readable(mask, query);
  BackwardParams p;
  p.query = q.operand(), p.key = k.operand(), p.value = v.operand(), p.out = o.operand(), p.grad_out = d.operand();
  p.problem = problem_of(query, key, value, q.dim(), v.dim(), read_mask, seed, sequences,
                         {dropout_p, window_left, window_right, scale, softcap, allow_tf32});
  p.lse = row_input(lse, "lse", query);
  if (grad_lse.has_value()) p.grad_lse = row_input(*grad_lse, "grad_lse", query);
  const int64_t rows = lse.numel();
  Tensor delta = empty<1>(query, {rows}, ScalarType::Float);
  p.delta = static_cast<float*>(delta.mutable_data_ptr());
  Written grad_query = gradient_of(query), grad_key = gradient_of(key), grad_value = gradient_of(value);
  p.grad_query = grad_query.result(), p.grad_key = grad_key.result(), p.grad_value = grad_value.result();
  index_by_row(p.problem, p.query, p.key, p.value, p.out, p.grad_out, p.grad_query, p.grad_key, p.grad_value, p.lse,
               p.grad_lse);
  if (rows > 0 && !is_computed_with_mask(p.problem, read_mask, dtype, mask_grad)) {
    launch_backward(p, dtype, scope.stream());
  }
  Tensor grad_mask =
      mask_gradient(p.problem, mask, read_mask, query, dtype, mask_grad, false,
                    [&](const MaskGradient& gradient) { launch_mask_gradient(p, gradient, dtype, scope.stream()); });
  if (rows == 0) return {grad_query.zero(), grad_key.zero(), grad_value.zero(), grad_mask};
  return {grad_query.finish(), grad_key.finish(), grad_value.finish(), grad_mask};
}

// The optional tangents; owns the tensors that were copied.
class GivenTangents {
 public:
  GivenTangents(const Tensor& query, const Tensor& key, const Tensor& value, const MaybeTensor& of_query,
                const MaybeTensor& of_key, const MaybeTensor& of_value, const MaybeTensor& of_mask)
      : query_(of_query, "tangent_query", query, query),
        key_(of_key, "tangent_key", key, query),
        value_(of_value, "tangent_value", value, query),
        mask_(readable(of_mask, query)) {
    STD_TORCH_CHECK(!mask_.has_value() || mask_kind(*mask_, query) != MaskKind::kBool,
                    "tangent_mask: expected a floating tensor");
    tangents_ = {query_.operand(), key_.operand(), value_.operand(),
                 mask_of(mask_, query, key.size(2), "tangent_mask")};
  }
  const Tangents& tangents() const { return tangents_; }

 private:
  MaybeRead query_, key_, value_;
  MaybeTensor mask_;
  Tangents tangents_;
};

void index_tangent_by_row(TangentParams& p) {
  index_by_row(p.problem, p.query, p.key, p.value, p.out, p.lse, p.tangents.query, p.tangents.key, p.tangents.value,
               p.tangent_out, p.tangent_lse);
}

std::tuple<Tensor, Tensor> tangent(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
                                   const Tensor& lse, const MaybeTensor& mask, const MaybeTensor& seed,
                                   const MaybeTensor& sequences, const MaybeTensor& tangent_query,
                                   const MaybeTensor& tangent_key, const MaybeTensor& tangent_value,
                                   const MaybeTensor& tangent_mask, double dropout_p, int64_t window_left,
                                   int64_t window_right, double scale, double softcap, bool allow_tf32) {
  const DType dtype = dtype_of(query, "query");
  const DeviceScope scope(query);
  const Read q(query, "query", query), k(key, "key", query), v(value, "value", query);
  const Read o = read_out(out, "out", query, value);
  const MaybeTensor read_mask = readable(mask, query);
  const GivenTangents given(query, key, value, tangent_query, tangent_key, tangent_value, tangent_mask);
  TangentParams p;
  p.query = q.operand(), p.key = k.operand(), p.value = v.operand(), p.out = o.operand();
  p.tangents = given.tangents();
  p.problem = problem_of(query, key, value, q.dim(), v.dim(), read_mask, seed, sequences,
                         {dropout_p, window_left, window_right, scale, softcap, allow_tf32});
  p.lse = row_input(lse, "lse", query);
  Written tangent_out(query, value.size(3), rows_first(query));
  Tensor tangent_lse = empty_rows(query);
  p.tangent_out = tangent_out.result(), p.tangent_lse = row_result(tangent_lse);
  index_tangent_by_row(p);
  if (lse.numel() > 0) launch_tangent(p, dtype, scope.stream());
  return {tangent_out.finish(), tangent_lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_tangent(
    const Tensor& query, const Tensor& key, const Tensor& value, const MaybeTensor& mask, const MaybeTensor& seed,
    const MaybeTensor& sequences, const MaybeTensor& tangent_query, const MaybeTensor& tangent_key,
    const MaybeTensor& tangent_value, const MaybeTensor& tangent_mask, double dropout_p, int64_t window_left,
    int64_t window_right, double scale, double softcap, bool allow_tf32) {
  const DType dtype = dtype_of(query, "query");
  const DeviceScope scope(query);
  const Read q(query, "query", query), k(key, "key", query), v(value, "value", query);
  const MaybeTensor read_mask = readable(mask, query);
  const GivenTangents given(query, key, value, tangent_query, tangent_key, tangent_value, tangent_mask);
  sm90::ForwardTangentParams both;
  both.query = q.operand(), both.key = k.operand(), both.value = v.operand(), both.tangents = given.tangents();
  both.problem = problem_of(query, key, value, q.dim(), v.dim(), read_mask, seed, sequences,
                            {dropout_p, window_left, window_right, scale, softcap, allow_tf32});
  Written out(query, value.size(3), rows_first(query)), tangent_out(query, value.size(3), rows_first(query));
  Tensor lse = empty_rows(query), tangent_lse = empty_rows(query);
  both.out = out.result(), both.lse = row_result(lse);
  both.tangent_out = tangent_out.result(), both.tangent_lse = row_result(tangent_lse);
  index_by_row(both.problem, both.query, both.key, both.value, both.out, both.lse, both.tangents.query,
               both.tangents.key, both.tangents.value, both.tangent_out, both.tangent_lse);
  if (lse.numel() > 0 && !launch_forward_tangent(both, dtype, scope.stream())) {
    ForwardParams p;
    p.problem = both.problem, p.query = both.query, p.key = both.key, p.value = both.value;
    p.out = both.out, p.lse = both.lse;
    run_forward(p, query, dtype, scope.stream());
    TangentParams t;
    t.problem = both.problem, t.query = both.query, t.key = both.key, t.value = both.value;
    t.out = {both.out.data, both.out.batch, both.out.head, both.out.row};
    t.lse = {both.lse.data, both.lse.batch, both.lse.head, both.lse.row};
    t.tangents = both.tangents, t.tangent_out = both.tangent_out, t.tangent_lse = both.tangent_lse;
    launch_tangent(t, dtype, scope.stream());
  }
  return {out.finish(), lse, tangent_out.finish(), tangent_lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> second_order(
    const Tensor& grad_out, const MaybeTensor& grad_lse, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& out, const Tensor& lse, const MaybeTensor& mask, const MaybeTensor& seed,
    const MaybeTensor& sequences, const MaybeTensor& tangent_query, const MaybeTensor& tangent_key,
    const MaybeTensor& tangent_value, const MaybeTensor& tangent_mask, double dropout_p, int64_t window_left,
    int64_t window_right, double scale, double softcap, bool allow_tf32, bool mask_grad) {
  const DType dtype = dtype_of(query, "query");
  const DeviceScope scope(query);
  const Read q(query, "query", query), k(key, "key", query), v(value, "value", query);
  const Read o = read_out(out, "out", query, value), d = read_out(grad_out, "grad_out", query, value);
  check_mask_grad(mask, mask_grad);
  const MaybeTensor read_mask = readable(mask, query);
  const GivenTangents given(query, key, value, tangent_query, tangent_key, tangent_value, tangent_mask);
  TangentParams t;
  t.query = q.operand(), t.key = k.operand(), t.value = v.operand(), t.out = o.operand();
  t.tangents = given.tangents();
  t.problem = problem_of(query, key, value, q.dim(), v.dim(), read_mask, seed, sequences,
                         {dropout_p, window_left, window_right, scale, softcap, allow_tf32});
  t.lse = row_input(lse, "lse", query);
  Written tangent_out(query, value.size(3), rows_first(query));
  Tensor tangent_lse = empty_rows(query);
  t.tangent_out = tangent_out.result(), t.tangent_lse = row_result(tangent_lse);
  index_tangent_by_row(t);

  SecondOrderParams p;
  BackwardParams& first = p.first;
  first.problem = t.problem, first.lse = t.lse;
  first.query = t.query, first.key = t.key, first.value = t.value, first.out = t.out, first.grad_out = d.operand();
  if (grad_lse.has_value()) first.grad_lse = row_input(*grad_lse, "grad_lse", query);
  const int64_t rows = lse.numel();
  Tensor deltas = empty<1>(query, {2 * rows}, ScalarType::Float);
  first.delta = static_cast<float*>(deltas.mutable_data_ptr()), p.second_delta = first.delta + rows;
  Written grad_query = gradient_of(query), grad_key = gradient_of(key), grad_value = gradient_of(value);
  first.grad_query = grad_query.result(), first.grad_key = grad_key.result(), first.grad_value = grad_value.result();
  p.tangents = t.tangents;
  p.tangent_out = {t.tangent_out.data, t.tangent_out.batch, t.tangent_out.head, t.tangent_out.row};
  p.tangent_lse = row_input(tangent_lse, "tangent_lse", query);
  index_by_row(t.problem, first.grad_out, first.grad_query, first.grad_key, first.grad_value, first.grad_lse,
               p.tangent_lse);
  if (rows > 0) {
    launch_tangent(t, dtype, scope.stream());
    launch_second_order(p, dtype, scope.stream());
  }
  Tensor grad_mask = mask_gradient(
      t.problem, mask, read_mask, query, dtype, mask_grad, true,
      [&](const MaskGradient& gradient) { launch_mask_second_order(p, gradient, dtype, scope.stream()); });
  if (rows == 0) {
    return {tangent_out.finish(), tangent_lse, grad_query.zero(), grad_key.zero(), grad_value.zero(), grad_mask};
  }
  return {tangent_out.finish(), tangent_lse, grad_query.finish(), grad_key.finish(), grad_value.finish(), grad_mask};
}

}  // namespace

FASTGEN_LIBRARY_IMPL(FASTGEN_NAMESPACE, FASTGEN_DISPATCH_KEY, m) {
  m.impl("attention_forward", TORCH_BOX(&forward));
  m.impl("attention_backward", TORCH_BOX(&backward));
  m.impl("attention_tangent", TORCH_BOX(&tangent));
  m.impl("attention_forward_tangent", TORCH_BOX(&forward_tangent));
  m.impl("attention_second_order", TORCH_BOX(&second_order));
}

}  // namespace fastgen::attention
