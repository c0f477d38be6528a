// cpu_attention_softmax and its backward as operators: what ops/_attention_blocked.py does to a tile.
#include "common/torch_api.h"
#include "cpu/softmax.h"

namespace fastgen::cpu {
namespace {

float* matrix(const Tensor& tensor, const char* name, const Tensor& scores) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() &&
                      tensor.numel() == scores.numel() && tensor.dim() >= 1 && tensor.size(-1) == scores.size(-1),
                  name, ": expected a contiguous float32 tensor with the elements of scores");
  return static_cast<float*>(tensor.mutable_data_ptr());
}

float* rows(const Tensor& tensor, const char* name, int64_t count) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() && tensor.numel() == count, name,
                  ": expected a contiguous float32 tensor with an element for each row of scores");
  return static_cast<float*>(tensor.mutable_data_ptr());
}

SoftmaxParams params_of(const Tensor& scores, const MaybeTensor& keep, const Tensor& lse) {
  SoftmaxParams p = {};
  p.scores = matrix(scores, "scores", scores);
  p.keys = scores.size(-1), p.rows = lse.numel();
  STD_TORCH_CHECK(p.rows * p.keys == scores.numel(), "lse: expected an element for each row of scores");
  if (keep.has_value()) p.keep = matrix(*keep, "keep", scores);
  return p;
}

void softmax(const Tensor& scores, const MaybeTensor& keep, const Tensor& lse) {
  SoftmaxParams p = params_of(scores, keep, lse);
  p.lse = rows(lse, "lse", p.rows);
  attention_softmax(p);
}

void backward(const Tensor& scores, const Tensor& grads, const MaybeTensor& keep, const Tensor& lse,
              const Tensor& delta) {
  SoftmaxParams p = params_of(scores, keep, lse);
  p.grads = matrix(grads, "grads", scores);
  p.lse = rows(lse, "lse", p.rows), p.delta = rows(delta, "delta", p.rows);
  attention_softmax_backward(p);
}

}  // namespace

FASTGEN_LIBRARY_IMPL(FASTGEN_NAMESPACE, FASTGEN_DISPATCH_KEY, m) {
  m.impl("cpu_attention_softmax", TORCH_BOX(&softmax));
  m.impl("cpu_attention_softmax_backward", TORCH_BOX(&backward));
}

}  // namespace fastgen::cpu
