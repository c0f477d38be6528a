// The four projection operators: check, allocate, fill the params, launch.
#include <tuple>

#include "projection/launch.h"
#include "projection/operands.h"
#include "projection/plan.h"

namespace fastgen::projection {
namespace {

using Tensors = std::vector<Tensor>;

struct Sizes {
  int64_t batch, length, channels;

  Sizes(const Tensor& x, bool channels_first)
      : batch(x.size(0)), length(x.size(channels_first ? 2 : 1)), channels(x.size(channels_first ? 1 : 2)) {}
};

bool is_length_first(const Tensor& tokens) {
  return !tokens.is_contiguous() && tokens.stride(2) == 1 && tokens.stride(0) == tokens.size(2) &&
         tokens.stride(1) == tokens.size(0) * tokens.size(2);
}

// (B, H, N, D) in the layout of the operator's fake: (B, N, H, D) in memory, or (N, B, H, D).
Tensor empty_heads(const Tensor& like, int64_t batch, int64_t heads, int64_t length, int64_t dim, bool length_first) {
  const int64_t row = heads * dim;
  return empty_strided<4>(like, {batch, heads, length, dim},
                          {length_first ? row : length * row, dim, length_first ? batch * row : row, 1},
                          like.scalar_type());
}

// An output (B, N, C), or (B, C, N) with rows padded to multiples of 16 bytes; finish() returns the unpadded tensor.
class WrittenFlat {
 public:
  WrittenFlat(const Tensor& like, const Sizes& sizes, bool channels_first, bool length_first)
      : tensor_(allocate(like, sizes, sizes.length, channels_first, length_first)), target_(tensor_) {
    const int64_t chunk = kAlignment / element_size(like);
    if (channels_first && sizes.length % chunk != 0) {
      target_ = allocate(like, sizes, ceil_div(sizes.length, chunk) * chunk, true, false);
    }
  }
  Matrix matrix(bool channels_first) const { return flat_matrix(target_, channels_first); }
  Tensor finish() {
    if (target_.size(2) != tensor_.size(2)) {
      torch::stable::copy_(tensor_, torch::stable::narrow(target_, 2, 0, tensor_.size(2)));
    }
    return tensor_;
  }
  Tensor zero() {
    torch::stable::zero_(tensor_);
    return tensor_;
  }

 private:
  static Tensor allocate(const Tensor& like, const Sizes& s, int64_t length, bool channels_first, bool length_first) {
    const int64_t rows = channels_first ? s.channels : length, row = channels_first ? length : s.channels;
    return empty_strided<3>(like, {s.batch, rows, row},
                            {length_first ? row : rows * row, length_first ? s.batch * row : row, 1},
                            like.scalar_type());
  }
  Tensor tensor_, target_;
};

template <int kDims>
Tensor floats(const Tensor& like, const int64_t (&sizes)[kDims]) {
  return empty<kDims>(like, sizes, ScalarType::Float);
}
float* data(Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

Tensor contiguous_of(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// A vector over channels, copied if it is not contiguous.
Tensor dense(const Tensor& vector, const char* name, int64_t size, const Tensor& like) {
  check_operand(vector, name, 1, like);
  STD_TORCH_CHECK(vector.size(0) == size, name, ": expected ", size, " elements, got ", vector.size(0));
  return contiguous_of(vector);
}

struct Tables {
  MaybeTensor cos, sin;

  Tables(const MaybeTensor& of_cos, const MaybeTensor& of_sin, const Tensor& x, int64_t batch, int64_t length) {
    STD_TORCH_CHECK(of_cos.has_value() == of_sin.has_value(), "sin: expected together with cos");
    if (!of_cos.has_value()) return;
    for (const Tensor& table : {*of_cos, *of_sin}) {
      STD_TORCH_CHECK(table.dim() == 3 && (table.size(0) == 1 || table.size(0) == batch) && table.size(1) == length &&
                          table.scalar_type() == ScalarType::Float && table.device() == x.device() &&
                          table.size(0) == of_cos->size(0) && table.size(2) == of_cos->size(2) && is_backed(table),
                      "cos, sin: expected float32 tables (1 or batch, length, half) on the device of x");
    }
    cos = contiguous_of(*of_cos), sin = contiguous_of(*of_sin);
  }
  void fill(HeadEpilogue& epilogue, int64_t rotated, bool interleaved) const {
    if (!cos.has_value()) return;
    epilogue.cos = cos->const_data_ptr<float>(), epilogue.sin = sin->const_data_ptr<float>();
    epilogue.half = checked_int(cos->size(2), "cos"), epilogue.rotated = checked_int(rotated, "rotated");
    epilogue.table_batch = cos->size(0) > 1 ? cos->stride(0) : 0, epilogue.interleaved = interleaved;
  }
};

// The number of parts, and how many of them are normalized and rotated.
void check_parts(size_t parts, size_t norms, int64_t rotated) {
  STD_TORCH_CHECK(parts > 0 && parts <= kMostParts, "heads: kernels take up to ", kMostParts, " parts, got ", parts);
  STD_TORCH_CHECK(norms <= parts, "norms: expected at most one for each of the ", parts, " parts, got ", norms);
  STD_TORCH_CHECK(rotated >= 0 && rotated <= static_cast<int64_t>(parts), "rotated: expected between 0 and the ", parts,
                  " parts, got ", rotated);
}

void check_whole_heads(const Matrix& parts, const HeadEpilogue& epilogue) {
  for (int i = 0; i < epilogue.norm_count || i < epilogue.rotated; ++i) {
    STD_TORCH_CHECK(i < parts.count && parts.parts[i].dim <= kLargestHead,
                    "norms, cos: kernels normalize and rotate heads of up to ", kLargestHead, " channels");
    STD_TORCH_CHECK(i >= epilogue.rotated || 2 * epilogue.half <= parts.parts[i].dim,
                    "cos, sin: expected tables of at most half the head dim");
  }
}

Tensors forward(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const Tensors& norms,
                const MaybeTensor& cos, const MaybeTensor& sin, const std::vector<int64_t>& heads,
                const std::vector<int64_t>& head_dims, bool channels_first, double eps, int64_t rotated,
                bool interleaved, bool keep, bool allow_tf32) {
  const DType dtype = dtype_of(x, "x");
  const DeviceScope scope(x);
  const Read read_x(x, "x", 3, x), read_weight(weight, "weight", 2, x);
  const Sizes sizes(x, channels_first);
  const bool length_first = !channels_first && is_length_first(x);
  check_channels(sizes.channels, "x", x);
  STD_TORCH_CHECK(heads.size() == head_dims.size(), "heads: expected one for each dim");
  check_parts(heads.size(), norms.size(), rotated);
  Tensors outputs, kept, dense_norms;
  std::vector<Matrix> parts, kept_parts;
  ProjectParams p;
  for (size_t i = 0; i < heads.size(); ++i) {
    check_channels(head_dims[i], "head_dims", x);
    STD_TORCH_CHECK(heads[i] > 0, "heads: expected positive numbers, got ", heads[i]);
    checked_product({sizes.batch, heads[i], sizes.length, head_dims[i]}, "heads");
    outputs.push_back(empty_heads(x, sizes.batch, heads[i], sizes.length, head_dims[i], length_first));
    parts.push_back(head_matrix(outputs.back()));
    if (i >= norms.size()) continue;
    dense_norms.push_back(dense(norms[i], "norms", head_dims[i], x));
    p.epilogue.norms[i] = dense_norms.back().const_data_ptr();
    if (!keep) continue;
    kept.push_back(empty_heads(x, sizes.batch, heads[i], sizes.length, head_dims[i], length_first));
    kept_parts.push_back(head_matrix(kept.back()));
  }
  const Tables tables(cos, sin, x, sizes.batch, sizes.length);
  tables.fill(p.epilogue, rotated, interleaved);
  p.epilogue.norm_count = static_cast<int>(norms.size()), p.epilogue.eps = static_cast<float>(eps);
  p.x = flat_matrix(read_x.tensor(), channels_first), p.out = packed(parts);
  if (!kept_parts.empty()) p.epilogue.kept = packed(kept_parts);
  check_whole_heads(p.out, p.epilogue);
  STD_TORCH_CHECK(weight.size(0) == p.out.channels && weight.size(1) == sizes.channels, "weight: expected (",
                  p.out.channels, ", ", sizes.channels, ")");
  MaybeTensor dense_bias;
  if (bias.has_value()) dense_bias = dense(*bias, "bias", p.out.channels, x), p.bias = dense_bias->const_data_ptr();
  p.weight = read_weight.tensor().const_data_ptr(), p.weight_row = read_weight.tensor().stride(0);
  p.exact = !allow_tf32;
  p.tokens = number_tokens(sizes.batch, sizes.length, p.x, p.out);
  if (x.numel() > 0) {
    launch_project(p, dtype, scope.stream());
  } else {
    for (Tensor& output : outputs) torch::stable::zero_(output);
  }
  outputs.insert(outputs.end(), kept.begin(), kept.end());
  return outputs;
}

// Gradients of a weight and its bias from grad and x.
class WeightGradient {
 public:
  WeightGradient(const Tensor& weight, bool with_bias, const Matrix& grad, const Matrix& x, const Tokens& tokens,
                 bool exact, DType dtype, void* stream)
      : grad_weight_(empty<2>(weight, {weight.size(0), weight.size(1)}, weight.scalar_type())),
        grad_bias_(empty<1>(weight, {with_bias ? weight.size(0) : 0}, weight.scalar_type())) {
    const Plan plan =
        gradient_plan(tokens, grad.channels, x.channels, static_cast<int>(element_size(weight)), multiprocessors());
    parts_ = floats(weight, {plan.splits, weight.size(0), weight.size(1)});
    WeightGradientParams p;
    p.tokens = tokens, p.grad = grad, p.x = x, p.exact = exact;
    p.parts = data(*parts_);
    reduce_.parts = p.parts, reduce_.splits = plan.splits;
    reduce_.rows = grad.channels, reduce_.columns = x.channels;
    reduce_.grad_weight = grad_weight_.mutable_data_ptr();
    if (with_bias) {
      bias_parts_ = floats(weight, {plan.splits, weight.size(0)});
      p.bias_parts = data(*bias_parts_);
      reduce_.bias_parts = p.bias_parts, reduce_.grad_bias = grad_bias_.mutable_data_ptr();
    }
    launch_weight_gradient(p, dtype, stream);
  }
  ReduceParams& reduction() { return reduce_; }
  const Tensor& grad_weight() const { return grad_weight_; }
  const Tensor& grad_bias() const { return grad_bias_; }

 private:
  Tensor grad_weight_, grad_bias_;
  MaybeTensor parts_, bias_parts_;
  ReduceParams reduce_;
};

Tensor zeros_like(const Tensor& tensor) {
  std::vector<int64_t> sizes;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) sizes.push_back(tensor.size(dim));
  return torch::stable::new_zeros(tensor, sizes);
}

std::tuple<Tensor, Tensor, Tensor, Tensors> backward(const Tensors& grads, const Tensors& kept, const Tensor& x,
                                                     const Tensor& weight, const Tensors& norms, const MaybeTensor& cos,
                                                     const MaybeTensor& sin, bool bias, bool channels_first, double eps,
                                                     int64_t rotated, bool interleaved, bool allow_tf32) {
  const DType dtype = dtype_of(x, "x");
  const DeviceScope scope(x);
  const Read read_x(x, "x", 3, x), read_weight(weight, "weight", 2, x);
  const Sizes sizes(x, channels_first);
  check_parts(grads.size(), norms.size(), rotated);
  STD_TORCH_CHECK(kept.size() >= norms.size(), "kept: expected one for each of the ", norms.size(), " norms, got ",
                  kept.size());
  int64_t rows = 0;
  for (size_t i = 0; i < grads.size(); ++i) {
    const Tensor& grad = grads[i];
    check_operand(grad, "grads", 4, x);
    check_channels(grad.size(3), "grads", x);
    check_shape(grad, "grads", {sizes.batch, grad.size(1), sizes.length, grad.size(3)});
    if (i < norms.size()) check_shape(kept[i], "kept", {sizes.batch, grad.size(1), sizes.length, grad.size(3)});
    rows += checked_product({grad.size(1), grad.size(3)}, "grads");
  }
  check_channels(sizes.channels, "x", x);
  check_shape(weight, "weight", {rows, sizes.channels});
  WrittenFlat grad_x(x, sizes, channels_first, !channels_first && is_length_first(x));
  if (x.numel() == 0) {
    Tensors no_norms;
    for (const Tensor& norm : norms) no_norms.push_back(zeros_like(norm));
    return {grad_x.zero(), zeros_like(weight), torch::stable::new_zeros(weight, {bias ? weight.size(0) : 0}), no_norms};
  }
  const Tables tables(cos, sin, x, sizes.batch, sizes.length);
  std::vector<Read> reads;
  Tensors before, grad_norms;  // gradients of the heads before QK-norm and RoPE
  std::vector<Matrix> parts;
  for (size_t i = 0; i < grads.size(); ++i) {
    reads.emplace_back(grads[i], "grads", 4, x);
    const Tensor& grad = reads.back().tensor();
    const bool normalized = i < norms.size(),
               rotated_part = tables.cos.has_value() && static_cast<int64_t>(i) < rotated;
    if (!normalized && !rotated_part) {
      parts.push_back(head_matrix(grad));
      continue;
    }
    before.push_back(empty_heads(x, sizes.batch, grad.size(1), sizes.length, grad.size(3), false));
    parts.push_back(head_matrix(before.back()));
    HeadBackwardParams p;
    p.grad = head_matrix(grad), p.out = parts.back();
    if (rotated_part) tables.fill(p.epilogue, 1, interleaved);
    p.epilogue.eps = static_cast<float>(eps);
    p.tokens = number_tokens(sizes.batch, sizes.length, p.grad, p.out);
    const int dim = checked_int(grad.size(3), "head dim");
    STD_TORCH_CHECK(dim <= kLargestHead, "norms, cos: kernels normalize and rotate heads of up to ", kLargestHead,
                    " channels");
    STD_TORCH_CHECK(!rotated_part || 2 * p.epilogue.half <= dim,
                    "cos, sin: expected tables of at most half the head dim");
    if (!normalized) {
      launch_heads_backward(p, dtype, scope.stream());
      continue;
    }
    const Read read_kept(kept[i], "kept", 4, x);
    const Tensor norm = dense(norms[i], "norms", dim, x);
    p.kept = head_matrix(read_kept.tensor()), p.norm = norm.const_data_ptr();
    p.tokens = number_tokens(sizes.batch, sizes.length, p.grad, p.kept, p.out);
    const int blocks =
        checked_int(head_blocks(sizes.batch * sizes.length * grad.size(1), multiprocessors()), "batch, length, heads");
    Tensor sums = floats(x, {blocks, dim});
    p.norm_parts = data(sums);
    launch_heads_backward(p, dtype, scope.stream());
    grad_norms.push_back(empty<1>(x, {dim}, x.scalar_type()));
    launch_sum_rows(p.norm_parts, blocks, dim, grad_norms.back().mutable_data_ptr(), dtype, scope.stream());
  }
  const Matrix grad = packed(parts), of_x = flat_matrix(read_x.tensor(), channels_first);
  ProjectParams p;
  p.x = grad, p.out = grad_x.matrix(channels_first);
  p.weight = read_weight.tensor().const_data_ptr(), p.weight_row = read_weight.tensor().stride(0);
  p.inputs_rows = true, p.exact = !allow_tf32;
  p.tokens = number_tokens(sizes.batch, sizes.length, p.x, p.out);
  launch_project(p, dtype, scope.stream());
  const Tokens tokens = number_tokens(sizes.batch, sizes.length, grad, of_x);
  WeightGradient gradient(weight, bias, grad, of_x, tokens, !allow_tf32, dtype, scope.stream());
  launch_reduce(gradient.reduction(), dtype, scope.stream());
  return {grad_x.finish(), gradient.grad_weight(), gradient.grad_bias(), grad_norms};
}

Vector gate_vector(const MaybeTensor& gate, const Tensor& x, int64_t batch, int64_t channels) {
  if (!gate.has_value()) return {};
  check_operand(*gate, "gate", 3, x);
  STD_TORCH_CHECK((gate->size(0) == 1 || gate->size(0) == batch) && gate->size(1) == 1 &&
                      (gate->size(2) == 1 || gate->size(2) == channels),
                  "gate: expected (1 or batch, 1, 1 or channels)");
  return {gate->const_data_ptr(), gate->size(0) > 1 ? gate->stride(0) : 0, gate->size(2) > 1 ? gate->stride(2) : 0};
}

void check_merge(const Tensor& x, const Tensor& weight) {
  check_operand(x, "x", 4, x);
  check_operand(weight, "weight", 2, x);
  check_channels(x.size(3), "x", x);
  check_channels(weight.size(0), "weight", x);
  const int64_t columns = checked_product({x.size(1), x.size(3)}, "x");
  STD_TORCH_CHECK(weight.size(1) == columns, "weight: expected ", columns, " columns, got ", weight.size(1));
  check_channels(columns, "x", x);
}

struct FlatSizes : Sizes {
  FlatSizes(const Tensor& x, const Tensor& weight) : Sizes(x, false) { length = x.size(2), channels = weight.size(0); }
};

void check_flat(const Tensor& tensor, const char* name, const Sizes& sizes, bool channels_first) {
  if (channels_first) return check_shape(tensor, name, {sizes.batch, sizes.channels, sizes.length});
  check_shape(tensor, name, {sizes.batch, sizes.length, sizes.channels});
}

Tensor merge_forward(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& residual,
                     const MaybeTensor& gate, bool channels_first, bool allow_tf32) {
  const DType dtype = dtype_of(x, "x");
  const DeviceScope scope(x);
  check_merge(x, weight);
  const Read read_x(x, "x", 4, x), read_weight(weight, "weight", 2, x);
  const FlatSizes sizes(x, weight);
  WrittenFlat out(x, sizes, channels_first, false);
  if (x.numel() == 0 || weight.numel() == 0) return out.zero();
  ProjectParams p;
  p.x = head_matrix(read_x.tensor()), p.out = out.matrix(channels_first);
  p.weight = read_weight.tensor().const_data_ptr(), p.weight_row = read_weight.tensor().stride(0);
  MaybeTensor dense_bias;
  if (bias.has_value()) dense_bias = dense(*bias, "bias", sizes.channels, x), p.bias = dense_bias->const_data_ptr();
  p.gate = gate_vector(gate, x, sizes.batch, sizes.channels);
  std::optional<Read> read_residual;
  if (residual.has_value()) {
    check_flat(*residual, "residual", sizes, channels_first);
    read_residual.emplace(*residual, "residual", 3, x);
    p.residual = flat_matrix(read_residual->tensor(), channels_first);
  }
  p.exact = !allow_tf32;
  // A gate per batch entry requires token numbers within the entry.
  p.tokens = p.gate.batch != 0 ? Tokens{checked_int(sizes.batch, "batch"), checked_int(sizes.length, "length"),
                                        static_cast<int>(sizes.length)}
                               : number_tokens(sizes.batch, sizes.length, p.x, p.out, p.residual);
  launch_project(p, dtype, scope.stream());
  return out.finish();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> merge_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                          const MaybeTensor& bias, const MaybeTensor& gate,
                                                          bool channels_first, bool allow_tf32) {
  const DType dtype = dtype_of(x, "x");
  const DeviceScope scope(x);
  check_merge(x, weight);
  const Read read_grad(grad, "grad", 3, x), read_x(x, "x", 4, x), read_weight(weight, "weight", 2, x);
  const FlatSizes sizes(x, weight);
  check_flat(grad, "grad", sizes, channels_first);
  STD_TORCH_CHECK(!gate.has_value() || (gate->dim() == 3 && gate->size(0) == 1),
                  "gate: kernels take one that the batch shares");
  const Vector of_gate = gate_vector(gate, x, sizes.batch, sizes.channels);
  MaybeTensor dense_bias;
  if (bias.has_value()) dense_bias = dense(*bias, "bias", sizes.channels, x);
  Tensor grad_x = empty_heads(x, sizes.batch, x.size(1), sizes.length, x.size(3), false);
  const int64_t gates = gate.has_value() ? gate->numel() : 0;
  const ScalarType own = weight.scalar_type();
  Tensor grad_gate = gate.has_value() ? empty<3>(weight, {1, 1, gates}, own) : empty<1>(weight, {0}, own);
  if (x.numel() == 0 || weight.numel() == 0) {
    torch::stable::zero_(grad_x), torch::stable::zero_(grad_gate);
    return {grad_x, zeros_like(weight), torch::stable::new_zeros(weight, {bias.has_value() ? weight.size(0) : 0}),
            grad_gate};
  }
  ProjectParams p;
  p.x = flat_matrix(read_grad.tensor(), channels_first), p.out = head_matrix(grad_x);
  p.weight = read_weight.tensor().const_data_ptr(), p.weight_row = read_weight.tensor().stride(0);
  p.inputs_rows = true, p.exact = !allow_tf32;
  const int rows = checked_int(weight.size(0), "weight"), columns = checked_int(weight.size(1), "weight");
  MaybeTensor gated;
  if (gate.has_value()) {
    gated = empty<2>(weight, {rows, columns}, weight.scalar_type());
    launch_scale_rows(p.weight, p.weight_row, of_gate, gated->mutable_data_ptr(), rows, columns, dtype, scope.stream());
    p.weight = gated->const_data_ptr(), p.weight_row = columns;
  }
  const Matrix of_x = head_matrix(read_x.tensor());
  p.tokens = number_tokens(sizes.batch, sizes.length, p.x, p.out);
  launch_project(p, dtype, scope.stream());

  const Tokens tokens = number_tokens(sizes.batch, sizes.length, p.x, of_x);
  WeightGradient gradient(weight, bias.has_value(), p.x, of_x, tokens, !allow_tf32, dtype, scope.stream());
  ReduceParams& reduction = gradient.reduction();
  MaybeTensor rows_of_gate;
  if (gate.has_value()) {
    reduction.gate = of_gate;
    reduction.weight = read_weight.tensor().const_data_ptr(), reduction.weight_row = read_weight.tensor().stride(0);
    if (dense_bias.has_value()) reduction.bias = dense_bias->const_data_ptr();
    rows_of_gate = floats(x, {rows});
    reduction.grad_gate = data(*rows_of_gate);
  }
  launch_reduce(reduction, dtype, scope.stream());
  if (gate.has_value()) {
    // One gate for all rows: the sum over rows; otherwise one gate per row.
    launch_sum_rows(reduction.grad_gate, gates == 1 ? rows : 1, checked_int(gates, "gate"),
                    grad_gate.mutable_data_ptr(), dtype, scope.stream());
  }
  return {grad_x, gradient.grad_weight(), gradient.grad_bias(), grad_gate};
}

}  // namespace

FASTGEN_LIBRARY_IMPL(FASTGEN_NAMESPACE, FASTGEN_DISPATCH_KEY, m) {
  m.impl("projection_forward", TORCH_BOX(&forward));
  m.impl("projection_backward", TORCH_BOX(&backward));
  m.impl("merge_heads_forward", TORCH_BOX(&merge_forward));
  m.impl("merge_heads_backward", TORCH_BOX(&merge_backward));
}

}  // namespace fastgen::projection
