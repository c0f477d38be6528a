// Operators cpu_finish_heads and cpu_finish_heads_backward: QK-norm and rotary embedding of projected heads.
#include <tuple>

#include "common/operand_checks.h"
#include "projection/cpu/heads.h"

namespace fastgen::cpu {
namespace {

Heads heads_of(const Tensor& tensor) {
  return {const_cast<void*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

Tensor readable(const Tensor& tensor, const char* name, const Tensor& like) {
  STD_TORCH_CHECK(like.dim() == 4, "part: expected four dims, got shape ", text_of(like.sizes()));
  check_operand(tensor, name, like.sizes(), like.scalar_type(), like);
  return tensor.numel() == 0 || tensor.size(3) == 1 || tensor.stride(3) == 1 ? tensor
                                                                             : torch::stable::contiguous(tensor);
}

// (B, H, N, D) with memory layout (B, N, H, D).
Tensor empty_like_heads(const Tensor& part) {
  const int64_t heads = part.size(1), tokens = part.size(2), dim = part.size(3);
  return empty_strided<4>(part, {part.size(0), heads, tokens, dim}, {tokens * heads * dim, dim, heads * dim, 1},
                          part.scalar_type());
}

// Arguments shared by forward and backward; owns the converted tensors.
class Problem {
 public:
  Problem(const Tensor& part, const MaybeTensor& norm, const MaybeTensor& cos, const MaybeTensor& sin, double eps,
          bool interleaved)
      : dtype(dtype_of(part, "part")), part_(readable(part, "part", part)) {
    STD_TORCH_CHECK(part.size(3) >= 1 && part.size(3) <= kWidestHead, "part: expected heads of 1 to ", kWidestHead,
                    " channels, got ", part.size(3));
    checked_product({part.size(0), part.size(1), part.size(2), part.size(3)}, "part");
    params = {part.size(0), part.size(1), part.size(2), part.size(3)};
    params.input = heads_of(part_);
    params.eps = static_cast<float>(eps), params.interleaved = interleaved;
    if (norm.has_value()) {
      dtype_of(*norm, "norm");
      check_operand(*norm, "norm", {params.dim}, norm->scalar_type(), part);
      norm_ = torch::stable::contiguous(torch::stable::to(*norm, ScalarType::Float));
      params.norm = norm_->const_data_ptr<float>();
    }
    STD_TORCH_CHECK(cos.has_value() == sin.has_value(), "sin: expected together with cos");
    if (!cos.has_value()) return;
    check_tensor(*cos, "cos", 3, ScalarType::Float, part);
    STD_TORCH_CHECK((cos->size(0) == 1 || cos->size(0) == params.batch) && cos->size(1) == params.tokens &&
                        cos->size(2) <= params.dim / 2,
                    "cos: expected (1 or ", params.batch, ", ", params.tokens, ", at most ", params.dim / 2, "), got ",
                    text_of(cos->sizes()));
    check_operand(*sin, "sin", cos->sizes(), ScalarType::Float, part);
    cos_ = torch::stable::contiguous(*cos), sin_ = torch::stable::contiguous(*sin);
    params.cos = cos_->const_data_ptr<float>(), params.sin = sin_->const_data_ptr<float>();
    params.half = cos_->size(2), params.table_batch = cos_->size(0) > 1 ? params.tokens * params.half : 0;
  }
  HeadsParams params = {};
  const DType dtype;

 private:
  Tensor part_;
  MaybeTensor norm_, cos_, sin_;
};

Tensor forward(const Tensor& part, const MaybeTensor& norm, const MaybeTensor& cos, const MaybeTensor& sin, double eps,
               bool interleaved) {
  Problem problem(part, norm, cos, sin, eps, interleaved);
  Tensor out = empty_like_heads(part);
  problem.params.output = heads_of(out);
  if (part.numel() > 0) heads_epilogue(problem.params, problem.dtype);
  return out;
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& part, const MaybeTensor& norm,
                                    const MaybeTensor& cos, const MaybeTensor& sin, double eps, bool interleaved) {
  Problem problem(part, norm, cos, sin, eps, interleaved);
  const Tensor upstream = readable(grad, "grad", part);
  Tensor out = empty_like_heads(part);
  Tensor grad_norm = torch::stable::new_zeros(part, {norm.has_value() ? part.size(3) : 0}, ScalarType::Float);
  problem.params.grad = heads_of(upstream), problem.params.output = heads_of(out);
  problem.params.grad_norm = static_cast<float*>(grad_norm.mutable_data_ptr());
  if (part.numel() > 0) heads_epilogue_backward(problem.params, problem.dtype);
  return {out, norm.has_value() ? torch::stable::to(grad_norm, norm->scalar_type()) : grad_norm};
}

}  // namespace

FASTGEN_LIBRARY_IMPL(FASTGEN_NAMESPACE, FASTGEN_DISPATCH_KEY, m) {
  m.impl("cpu_finish_heads", TORCH_BOX(&forward));
  m.impl("cpu_finish_heads_backward", TORCH_BOX(&backward));
}

}  // namespace fastgen::cpu
